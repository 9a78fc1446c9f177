"""What the processes of a run tell each other about themselves while they train: one small message a second each."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks

BEAT_S = 1.0
RUNNING, LEFT, FAILED = "running", "left", "failed"


@dataclass(frozen=True)
class Beat:
    """What one process says of itself.

    Attributes:
        machine: names the machine and its table of processes; empty where the system does not tell.
        began: when the process began, by its machine's clock, because process ids are used again.
        place: what its main thread is in, for `seconds`.
        count: grows with each beat.
        state: "running", "left" (in good order) or "failed", with the reason and the exit code.
        told: it knows why the run ends, or that rank 0 has left: nobody need stay for it.
        frames: its main thread's innermost frames, innermost first; empty unless asked for.
    """

    rank: int
    host: str
    machine: str
    pid: int
    began: int
    place: str = ""
    seconds: float = 0.0
    count: int = 0
    state: str = RUNNING
    sentence: str = ""
    code: int = 1
    told: bool = False
    frames: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, as told to the others; with an empty sentence, the wish to know where everybody is."""

    sentence: str = ""
    code: int = 1
    hang: bool = False


def introduce(rank: int) -> Beat:
    """The first beat of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    return Beat(rank, socket.gethostname(), machine, os.getpid(), _began(os.getpid()) or 0)


def vanished(beat: Beat, machine: str) -> bool:
    """Whether the process is known to have ended; False if it lives or runs where we cannot look.

    Args:
        machine: ours.
    """
    return bool(machine) and beat.machine == machine and _began(beat.pid) != beat.began


def _began(pid: int) -> int | None:
    """Clock ticks between the machine's start and the process's; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Link:
    """A connection of our own to the store of the process group, and the thread that talks over it.

    A client of the store answers one caller at a time, and may wait for ever for a machine that is gone: hence neither
    the main thread's connection nor the thread that judges. Every process writes its own beat and reads that of the
    leader, which alone reads all: the lowest rank that has not left.

    Args:
        beat: this process's next beat; called in the thread.
    """

    def __init__(self, ranks: Ranks, beat: Callable[[], Beat]) -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self.agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        """Whether the store lives in the launcher (torchrun) of rank 0's machine; else in rank 0."""
        self.leader = 0
        self.beats: dict[int, Beat] = {}
        """The newest beats: of all others for the leader, of those that lead or have led for the rest."""
        self.gone: tuple[int, ...] = ()
        """Ranks on this machine whose process has ended without having left."""
        self.dead: tuple[int, ...] = ()
        """Ranks that will not answer any more."""
        self.verdict: Verdict | None = None
        """What the leader has told."""
        self.rounds = 0
        """How often the store has answered to all that was asked."""
        self.error: str | None = None
        """Why the store cannot be reached any more."""
        self._beat = beat
        self._posted, self._failed = "", False
        self._leave_by: float | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="watch: beats", daemon=True)
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        # all processes enter their watches in the same order, so the n-th of one belongs to the n-th of another
        turn = store.add(f"watch/{self.rank}", 1)
        self._store = dist.PrefixStore(f"watch/{turn}", store)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def post(self, verdict: Verdict | None) -> None:
        """Tell the others, as their leader; None takes it back."""
        self._posted = json.dumps(asdict(verdict)) if verdict else ""
        self._wake.set()

    def leave(self, patience: float) -> None:
        """Send the last beat and end the thread.

        A process that the others need stays until they know why it goes, for `patience` seconds at most.
        """
        self._leave_by = time.monotonic() + patience
        self._wake.set()
        self._thread.join(patience + 1.0)  # it may wait for a machine that is gone: then it ends with the process

    def _talk(self) -> None:
        try:
            while True:
                leave_by = self._leave_by  # looked at before the round, so that the last one sends the last beat
                beat = self._round()
                self.rounds += 1
                if beat.told and self.verdict is not None and self.verdict.sentence:
                    return  # the leader knows that we know: all is said, and the store may end at any time
                if leave_by is not None and (time.monotonic() > leave_by or self._may_leave()):
                    return
                # at first often: who dies before it was heard of cannot be told from a store that fails
                self._wake.wait(BEAT_S if leave_by is None and self.beats else 0.1)
                self._wake.clear()
        except RuntimeError as error:  # all that the store raises
            self.error = str(error)

    def _round(self) -> Beat:
        beat = self._beat()
        self._failed = beat.state == FAILED
        if 0 in self.beats and not self.agent and vanished(self.beats[0], beat.machine):
            raise RuntimeError("the process that held the store has ended")  # PyTorch would print a stack of its own
        if self.leader == self.rank:
            self._store.set("verdict", self._posted)
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))
        # before their beats are read: one that ends in good order says so first
        ended = [rank for rank, known in self.beats.items() if vanished(known, beat.machine)]
        if self.leader == self.rank:
            self._read([rank for rank in range(self.world) if rank != self.rank and not self._left(rank)])
        else:
            self._read([self.leader])
            if self.leader in self.beats:
                text = self._store.get("verdict").decode()  # every leader writes it before its first beat
                self.verdict = Verdict(**json.loads(text)) if text else None
                self._posted = text
        self.gone = tuple(rank for rank in ended if self.beats[rank].state == RUNNING)
        while self.leader != self.rank and self._left(self.leader):
            self.leader += 1
        return beat

    def _read(self, ranks: list[int]) -> None:
        ranks = [rank for rank in ranks if rank in self.beats or self._store.check([f"beat/{rank}"])]
        if ranks:
            for rank, text in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
                values = json.loads(text)
                self.beats = {**self.beats, rank: Beat(**{**values, "frames": tuple(values["frames"])})}

    def _left(self, rank: int) -> bool:
        return rank in self.beats and self.beats[rank].state == LEFT

    def _may_leave(self) -> bool:
        """Whether nobody needs this process any more, or the store, which may end with it or soon after."""
        holds = self.rank == 0 and not self.agent
        tells = self._failed or (self.leader == self.rank and self._posted)
        if not holds and not tells:
            return True
        return all(beat.told or beat.state != RUNNING or rank in self.dead for rank, beat in self.beats.items())
