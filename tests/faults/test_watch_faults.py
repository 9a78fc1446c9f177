"""Killed, stopped, failed and hanging processes of a run: all others end, and say which one and where it was."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssr_fast.engine import beats, watch
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.watch import Watch
from tests.engine.watched import Ended, block_for_ever, guarded, run_ranks

RESUME = "--resume runs/x"
LOOPS: dict[str, Callable[[], None]] = {
    "collective": lambda: dist.all_reduce(torch.ones(2)),
    "python": lambda: time.sleep(0.01),
    "stuck": block_for_ever,
    "store": lambda: dist.distributed_c10d._get_default_store().wait(["never"]),  # over the main thread's connection
}
STILL = "nothing moved for 2 s (--parallel.hang_timeout)"


def watching(ranks: Ranks, timeout: float = 0.0) -> Watch:
    return Watch(ranks, timeout=timeout, resume=RESUME, lost=4.0, grace=1.0)


def killed_in(loop: str, dead: int) -> Callable[[Ranks], None]:
    """Work in which rank `dead` kills itself in step 3, after everybody has been seen."""

    def work(ranks: Ranks) -> None:
        own = watching(ranks)

        def train() -> None:
            for step in (1, 2, 3):
                own.at(f"step {step}")
                dist.all_reduce(torch.ones(2))
                time.sleep(0.3)
            while True:
                if ranks.rank == dead:
                    time.sleep(1.2)  # the others enter what they will be stuck in
                    os.kill(os.getpid(), signal.SIGKILL)
                LOOPS[loop]()

        guarded(own, train)

    return work


def check_death(ended: list[Ended], dead: int, how: str = "died") -> None:
    for rank, process in enumerate(ended):
        if rank == dead:
            continue
        assert process.code in (1, 2), f"rank {rank}: {process.code}"
        assert process.seconds < 30
        who = rf"rank {dead} \(host \S+, process {ended[dead].pid}\)"
        line = (
            rf"(error: )?rank {rank}: stopped, because {who} {how}, last seen \d+ s ago in step 3: look at its output"
        )
        assert len(process.said) == 1 and re.match(line, process.said[0]), process.said
        assert process.said[0].endswith(f"then continue with {RESUME}")


@pytest.mark.parametrize(("loop", "dead"), [("collective", 0), ("stuck", 1)])
def test_a_killed_rank_ends_the_other(tmp_path: Path, loop: str, dead: int) -> None:
    ended = run_ranks(tmp_path, 2, killed_in(loop, dead))
    assert ended[dead].code == -signal.SIGKILL
    check_death(ended, dead)
    # the main thread ends with the sentence if it can; the watch speaks for the one that is stuck
    assert ended[1 - dead].code == (2 if loop == "collective" else 1)
    assert "frame #" not in ended[1 - dead].text  # the sentence is not buried under PyTorch's


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_rank_ends_three_others(tmp_path: Path, loop: str, dead: int) -> None:
    ended = run_ranks(tmp_path, 4, killed_in(loop, dead))
    assert ended[dead].code == -signal.SIGKILL
    check_death(ended, dead)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_counts_as_lost(tmp_path: Path, stopped: int) -> None:
    def work(ranks: Ranks) -> None:
        own = watching(ranks)

        def train() -> None:
            own.at("step 3")
            dist.all_reduce(torch.ones(2))
            time.sleep(3.0)  # the others hear of the place, on a busy machine too
            if ranks.rank == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.ones(2))

        guarded(own, train)

    ended = run_ranks(tmp_path, 2, work, leave=(stopped,))
    check_death(ended, stopped, how="has not answered for 4 s")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_killed_on_another_machine_is_missed(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = beats.introduce
    monkeypatch.setattr(watch, "introduce", lambda rank: replace(real(rank), machine=f"machine {rank}"))
    ended = run_ranks(tmp_path, 2, killed_in("stuck", dead))
    # the store is in rank 0
    check_death(ended, dead, how="has not answered for 4 s" if dead else "cannot be reached any more")


def overslept() -> None:
    time.sleep(100)


def hang(world: int, folder: Path, asleep: int) -> list[Ended]:
    def work(ranks: Ranks) -> None:
        own = watching(ranks, timeout=1.5)

        def train() -> None:
            own.at("evaluation after step 7" if ranks.rank == asleep else "step 8")
            if ranks.rank == asleep:
                overslept()
            dist.all_reduce(torch.ones(2))

        guarded(own, train)

    return run_ranks(folder, world, work)


@pytest.mark.parametrize(
    ("world", "asleep"), [(2, 1), *(pytest.param(4, rank, marks=pytest.mark.slow) for rank in (0, 3))]
)
def test_a_hang_is_one_table_that_names_who_is_behind(tmp_path: Path, world: int, asleep: int) -> None:
    ended = hang(world, tmp_path, asleep)
    assert [process.code for process in ended] == [1] * world
    table = ended[0].text[ended[0].text.index(f"rank 0: stopped, because {STILL}") :].splitlines()
    for rank in range(world):
        at = next(i for i, line in enumerate(table) if line.startswith(f"  rank {rank} (host "))
        assert f"process {ended[rank].pid})" in table[at]
        assert ("evaluation after step 7" if rank == asleep else "step 8") in table[at]
        name = "overslept" if rank == asleep else "all_reduce"
        assert re.search(rf"\.py:\d+ {name}( <|$)", table[at + 1]), table[at + 1]
    others = ", ".join(str(rank) for rank in range(world) if rank != asleep)
    wait = "rank 0 waits" if world == 2 else f"ranks {others} wait"
    assert f"  {wait} for rank {asleep}" in table
    assert table[-1] == f"  continue with {RESUME}"
    for rank, process in enumerate(ended[1:], 1):  # a table is shown once
        lines = [line for line in process.said if not line.startswith("error: ")]
        assert lines == [f"rank {rank}: stopped, because {STILL}; rank 0 says where everybody is"]


@pytest.mark.parametrize(("world", "bad"), [(2, 0), *(pytest.param(4, r, marks=pytest.mark.slow) for r in (0, 2))])
def test_the_others_are_told_why_a_rank_failed(tmp_path: Path, world: int, bad: int) -> None:
    def work(ranks: Ranks) -> None:
        with watching(ranks):  # an earlier stage: its farewells must not be taken for those of this one
            ranks.barrier()
        time.sleep(0.5 if ranks.rank == bad else 0.0)
        with watching(ranks) as own:
            own.at("step 1")
            dist.all_reduce(torch.ones(2))
            try:
                if ranks.rank == bad:
                    own.failed("street.png cannot be read\nrepair it", code=7)
                    raise ValueError("street.png")
                (block_for_ever if ranks.rank == world - 1 else lambda: dist.all_reduce(torch.ones(2)))()
            except RuntimeError as error:
                raise own.explain(error) or error from error

    ended = run_ranks(tmp_path, world, work)
    assert ended[bad].code == 1 and "ValueError: street.png" in ended[bad].text
    for rank, process in enumerate(ended):
        if rank != bad:
            sentence = f"rank {rank}: stopped, because rank {bad} failed: street.png cannot be read; repair it"
            assert [line.removeprefix("error: ") for line in process.said] == [sentence]
            assert process.code in (2, 7) and (process.code == 2) == process.said[0].startswith("error: ")
            assert process.seconds < 30


@pytest.mark.slow
def test_a_suspended_group_goes_on_when_it_wakes(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()

    def work(ranks: Ranks) -> None:
        with watching(ranks, timeout=3.0) as own:
            for step in range(16):
                own.at(f"step {step}")
                dist.all_reduce(torch.ones(2))
                (pids / f"{os.getpid()}").touch()
                time.sleep(0.5)

    stopper = os.fork()
    if stopper == 0:
        try:
            while len(os.listdir(pids)) < 2:
                time.sleep(0.1)
            time.sleep(2.5)
            for number, pause in ((signal.SIGSTOP, 9.0), (signal.SIGCONT, 0.0)):
                for name in os.listdir(pids):
                    os.kill(int(name), number)
                time.sleep(pause)
        finally:
            os._exit(0)
    ended = run_ranks(tmp_path, 2, work)
    os.waitpid(stopper, 0)
    assert [process.code for process in ended] == [0, 0]
    assert [process.said for process in ended] == [[], []]
    assert min(process.seconds for process in ended) > 15
