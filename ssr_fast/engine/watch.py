"""The watch of a run: it ends a process whose fellow has died or failed, and a run that hangs, and says why."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import torch.distributed as dist

from ssr_fast.engine.beats import FAILED, LEFT, RUNNING, Beat, Link, Verdict, introduce, vanished
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.stacks import frames_of, table
from ssr_fast.errors import UserError

LOST = 15.0
GRACE = 10.0
_TICK_S = 0.5
_ANSWER_S = 5.0  # for the other processes; one that does not answer is in a call that lets no thread run
_END_S = 20.0  # for a main thread that knows why the run ends
_CONNECTION = re.compile(r"gloo|nccl|c10d|connection|socket|broken pipe|process ?group|collective|time(d )?out", re.I)


class At(Protocol):
    """Watch.at, as who is watched knows it."""

    def __call__(self, place: str, patient: bool = False, /) -> None: ...


def nowhere(place: str, patient: bool = False, /) -> None:
    """For who is not watched."""


def _print(message: str) -> None:
    sys.stderr.write(f"{message}\n")  # at once: other processes write there too


class Watch:
    """Context manager in which a thread watches over this process and, with others, over the run.

    Every process says each second where it is. One that is killed, silent for `lost` seconds, or that has called
    `failed`, ends all others with one sentence each; so does a place that lasts longer than `timeout`, with a table of
    where everybody is. A process that cannot end by itself, in a collective that never returns, is ended by force.

    The thread asks nothing of a GPU. A process counts from its first beat on, until it leaves the context.

    Args:
        ranks: who trains together.
        timeout: seconds for which one place may last; 0 = for ever.
        resume: how to go on later, for the messages: "--resume runs/x".
        report: takes a line (of a hang: several) that explains the end of this process.
        lost: seconds of silence after which a process counts as dead; on one machine a death is seen at once.
        grace: seconds in which the main thread may end by itself, after the end of another process.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        timeout: float,
        resume: str,
        report: Callable[[str], None] = _print,
        lost: float = LOST,
        grace: float = GRACE,
    ) -> None:
        self._ranks, self._timeout, self._resume, self._report = ranks, timeout, resume, report
        self._lost, self._grace = lost, grace
        self._place = ("the start", True)
        self._self = introduce(ranks.rank)
        self._seconds = 0.0  # in the place; by the ticks of our own thread, so that no suspension counts
        self._count = 0
        self._silent: dict[int, float] = {}
        self._unanswered, self._rounds, self._counts = 0.0, 0, dict[int, int]()
        self._asked = False
        self._main = 0
        self._link: Link | None = None
        self._thread: threading.Thread | None = None
        self._over, self._found = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._force_at = float("inf")

    def __enter__(self) -> "Watch":
        self._main = threading.get_ident()
        if self._ranks.world > 1:
            self._link = Link(self._ranks, self._beat)
            self._link.start()
        if self._link is not None or self._timeout > 0:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END_S)
        if self._self.state == RUNNING:
            self._self = replace(self._self, state=LEFT)
        if self._link is not None:
            self._link.leave(_ANSWER_S)
            if self._verdict is not None or self._self.state == FAILED:
                # what still belongs to the group, such as NCCL's own shutdown, may wait for the dead for ever
                _end_in(_END_S, self._self.code if self._verdict is None else self._verdict.code)

    def at(self, place: str, patient: bool = False) -> None:
        """Note what the main thread is in from now on: "step 12". Each call is a sign of life and costs nearly nothing.

        Args:
            place: read behind "in".
            patient: it may last as long as it likes, as what depends on the size of a data set may.
        """
        self._place = (place, patient)  # a new object each time: that is how the thread sees the call

    def failed(self, sentence: str, code: int = 1) -> None:
        """Tell the others, by the next beat, that this process ends by an error of its own, if it is its own.

        Args:
            sentence: why, for the user; lines are joined.
            code: the exit code of all.
        """
        if self._link is None or self._verdict is not None or self._over.is_set():
            return
        self._self = replace(self._self, state=FAILED, sentence="; ".join(sentence.splitlines()), code=code)

    def explain(self, error: BaseException) -> UserError | None:
        """Why the training loop broke, if another process is the reason; waits until that is known.

        Args:
            error: what came out of the loop.

        Returns:
            One sentence with the rank, where it was last and what to do; None if this process is the reason itself.
        """
        if self._link is None or not any(map(_of_connection, _causes(error))):
            return None
        self._force_at = float("inf")
        known = self._found.wait(self._lost + _ANSWER_S)
        if not known or self._verdict is None:
            return None
        self._force_at = time.monotonic() + _END_S
        return UserError(self._line(self._verdict))

    def _beat(self) -> Beat:
        """Our next beat; called by the link's thread."""
        link = self._link
        assert link is not None
        self._count += 1
        asked = self._asked or (link.verdict is not None and not link.verdict.sentence)
        return replace(
            self._self,
            place=self._place[0],
            seconds=self._seconds,
            count=self._count,
            told=self._found.is_set() or link.leader > 0,
            frames=frames_of(self._main) if asked else (),
        )

    def _watch(self) -> None:
        place, before = self._place, time.monotonic()
        while not self._over.wait(_TICK_S):
            now = time.monotonic()
            # the whole machine or process group may have been suspended: no tick counts for more than two
            passed, before = min(now - before, 2 * _TICK_S), now
            stays = self._place is place and not place[1]
            self._seconds = self._seconds + passed if stays else 0.0
            place = self._place
            self._listen(passed)
            if self._self.state != RUNNING:
                continue  # this process ends by itself; the others are told by its beat
            verdict = self._dead() or self._hang()
            if verdict is not None:
                return self._end(verdict)

    def _listen(self, passed: float) -> None:
        """Count for how long each of the others has been silent, and the store."""
        link = self._link
        if link is None:
            return
        self._unanswered += passed
        if link.rounds == self._rounds:
            return
        for rank, beat in link.beats.items():
            moved = self._counts.get(rank) != beat.count
            self._silent[rank] = 0.0 if moved else self._silent[rank] + self._unanswered
            self._counts[rank] = beat.count
        self._rounds, self._unanswered = link.rounds, 0.0

    def _dead(self) -> Verdict | None:
        """The end of the run if another process has ended, if the leader says that it does, or nobody answers."""
        link = self._link
        if link is None:
            return None
        if link.verdict is not None and link.verdict.sentence:
            return link.verdict
        beats = [beat for beat in link.beats.values() if beat.state != LEFT]
        for beat in beats:
            if beat.state == FAILED:
                return self._tell(Verdict(f"stopped, because rank {beat.rank} failed: {beat.sentence}", beat.code))
        if ended := [beat for beat in beats if beat.rank in link.gone]:
            return self._tell(self._death(link, ended, "died"))
        if silent := [beat for beat in beats if self._silent.get(beat.rank, 0.0) > self._lost]:
            return self._tell(self._death(link, silent, f"has not answered for {self._lost:.0f} s"))
        return self._no_store(link)

    def _no_store(self, link: Link) -> Verdict | None:
        """The end of the run if the store that rank 0 or its launcher keeps is gone, and rank 0 had not left."""
        first = link.beats.get(0)
        if link.leader > 0:
            return None
        if first is not None and link.error is not None and vanished(first, self._self.machine):
            return self._death(link, [first], "died")
        if self._unanswered < self._lost:
            return None
        how = f"has not answered for {self._lost:.0f} s" if link.error is None else "cannot be reached any more"
        if first is not None and not link.agent:
            return self._death(link, [first], how)
        who = "the launcher (torchrun) on the machine of rank 0" if link.agent else "rank 0"
        return Verdict(f"stopped, because {who} {how}: {self._advice()}")

    def _death(self, link: Link, beats: list[Beat], how: str) -> Verdict:
        link.dead = tuple(beat.rank for beat in beats)
        who = " and ".join(map(str, beats))
        first = beats[0]
        seen = f"last seen {self._silent.get(first.rank, 0.0) + self._unanswered:.0f} s ago in {first.place}"
        return Verdict(f"stopped, because {who} {how}, {seen}: {self._advice()}")

    def _advice(self) -> str:
        return f"look at its output above, then continue with {self._resume}"

    def _hang(self) -> Verdict | None:
        """The end of the run if somebody's place lasts too long. The leader speaks for all."""
        link = self._reachable()
        if self._timeout <= 0 or (link is not None and link.leader != self._ranks.rank):
            return None
        if self._longest() <= self._timeout:
            return None
        if link is not None and not self._ask(link):
            return None
        where = table(self._everybody(), self._ranks.world)
        sentence = f"stopped, because nothing moved for {self._timeout:.0f} s (--parallel.hang_timeout)"
        self._tell(Verdict(f"{sentence}; rank {self._ranks.rank} says where everybody is", hang=True))
        return Verdict(f"{sentence}:\n{where}\n  continue with {self._resume}", hang=True)

    def _ask(self, link: Link) -> bool:
        """Learn the others' frames; False if it goes on after all."""
        self._asked = True
        link.post(Verdict())
        until = time.monotonic() + _ANSWER_S
        while not all(beat.frames or beat.state != RUNNING for beat in link.beats.values()):
            if self._over.wait(0.1) or time.monotonic() > until:
                break
        self._asked = False
        if self._longest() > self._timeout and not self._over.is_set():
            return True
        link.post(None)
        return False

    def _reachable(self) -> Link | None:
        """The connection to the others; None for a process alone, or if rank 0 has left and the store with it."""
        if self._link is None or self._link.error is not None or self._unanswered > self._lost:
            return None
        return self._link

    def _longest(self) -> float:
        """Seconds in its place of whoever has been there longest."""
        return max(beat.seconds for beat in self._everybody().values() if beat.state == RUNNING)

    def _everybody(self) -> dict[int, Beat]:
        mine = replace(self._self, place=self._place[0], seconds=self._seconds, frames=frames_of(self._main))
        return {**(self._link.beats if self._link is not None else {}), self._ranks.rank: mine}

    def _tell(self, verdict: Verdict) -> Verdict:
        """Tell it to the others, if this process leads."""
        if self._link is not None and self._link.leader == self._ranks.rank:
            self._link.post(verdict)
        return verdict

    def _line(self, verdict: Verdict) -> str:
        return f"rank {self._ranks.rank}: {verdict.sentence}" if self._ranks.world > 1 else verdict.sentence

    def _end(self, verdict: Verdict) -> None:
        """Give the main thread time to end by itself, then end the process."""
        self._verdict = verdict
        self._force_at = min(self._force_at, time.monotonic() + (0.0 if verdict.hang else self._grace))
        self._found.set()
        while time.monotonic() < self._force_at:
            if self._over.wait(0.1):
                return
        _end_in(_END_S, verdict.code)  # should somebody who writes hold the lock of an output
        self._report(self._line(verdict))
        self._self = replace(self._self, state=LEFT)
        if self._link is not None:
            self._link.leave(_ANSWER_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict.code)


def _end_in(seconds: float, code: int) -> None:
    """End the process after a while if it has not ended by then."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="watch: end", daemon=True).start()


def _of_connection(error: BaseException) -> bool:
    """Whether an error may come from the end of another process."""
    if isinstance(error, (dist.DistError, ConnectionError, TimeoutError)):
        return True
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it, as a traceback would show them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)  # type: ignore[assignment]
