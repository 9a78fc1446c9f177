"""The watch of a run: what costs nothing, what is no death, a hang of a process alone, and the table of a hang."""

import gc
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssr_fast.engine import beats, stacks
from ssr_fast.engine.beats import LEFT, Beat
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.watch import Watch
from tests.engine.watched import block_for_ever, run_ranks

RESUME = "--resume runs/x"
WAITS = ("torch/distributed/distributed_c10d.py:3007 all_reduce", "engine/ranks.py:62 mean_")
WORKS = ("engine/store.py:9 read", "engine/trainer.py:200 _train")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_two_ranks_leave_in_good_order_one_much_earlier_and_begin_again_one_much_later(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)
        for turn in (0, 1):  # the second watch must not take the first one's farewell for its own
            time.sleep(2.0 * ranks.rank * turn)
            with Watch(ranks, timeout=1.5, resume=RESUME, lost=1.5) as watch:
                for step in range(8 if ranks.rank != turn else 1):
                    watch.at(f"step {step}")
                    time.sleep(0.3)
            assert threads() == []
            ranks.barrier()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)) == before

    ended = run_ranks(tmp_path, 2, work)
    assert [process.code for process in ended] == [0, 0]
    assert [process.said for process in ended] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_may_be_gone_long_before_the_other(tmp_path: Path, early: int) -> None:
    """Rank 0 takes the store with it."""

    def work(ranks: Ranks) -> None:
        with Watch(ranks, timeout=5.0, resume=RESUME, lost=3.0) as watch:
            for step in range(1 if ranks.rank == early else 20):
                watch.at(f"step {step}")
                time.sleep(1.0)

    ended = run_ranks(tmp_path, 2, work)
    assert [process.code for process in ended] == [0, 0]
    assert [process.said for process in ended] == [[], []]
    assert ended[1 - early].seconds > 19 > ended[early].seconds + 10


def test_a_rank_that_is_left_alone_still_notices_its_own_hang(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        with Watch(ranks, timeout=4.0, resume=RESUME, lost=3.0) as watch:
            ranks.barrier()
            if ranks.rank == 1:
                watch.at("saving step 2")
                block_for_ever()
            watch.at("the end")
            time.sleep(2.5)  # two beats, so that the other has heard of it

    ended = run_ranks(tmp_path, 2, work)
    assert [process.code for process in ended] == [0, 1]
    assert "block_for_ever" in ended[1].text and "saving step 2" in ended[1].text
    assert re.search(r"rank 0 \(.*\): has left in good order", ended[1].text)


def overslept() -> None:
    time.sleep(60)


def test_a_process_alone_that_hangs_ends_with_its_place_and_frames(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        with Watch(ranks, timeout=1.0, resume=RESUME) as watch:
            for _ in range(4):  # longer than the timeout, but it moves
                watch.at("step")
                time.sleep(0.4)
            watch.at("evaluation after step 12")
            overslept()

    ended = run_ranks(tmp_path, 1, work)[0]
    assert ended.code == 1
    lines = ended.text.splitlines()
    assert lines[0] == "stopped, because nothing moved for 1 s (--parallel.hang_timeout):"
    assert re.fullmatch(r"  rank 0 \(host \S+, process \d+\): evaluation after step 12, for [12] s", lines[1])
    assert re.match(r"    engine/test_watch.py:\d+ overslept < engine/test_watch.py:\d+ work < ", lines[2])
    assert lines[3:] == [f"  continue with {RESUME}"]


def test_a_process_alone_without_a_limit_has_no_thread_and_one_with_it_ends_it() -> None:
    before = threading.active_count()
    with Watch(Ranks(), timeout=0.0, resume=RESUME) as watch:
        watch.at("step 1")
        assert threading.active_count() == before
        watch.failed("nobody hears it")
        assert watch.explain(RuntimeError("Connection closed by peer")) is None
    with Watch(Ranks(), timeout=9.0, resume=RESUME):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_place_costs_neither_a_call_nor_a_lock() -> None:
    watch = Watch(Ranks(), timeout=1.0, resume=RESUME)
    calls: list[str] = []

    def trace(frame: object, event: str, value: object) -> None:
        calls.append(event)

    gc.disable()
    sys.setprofile(trace)
    try:
        watch.at("step 1")
    finally:
        sys.setprofile(None)
        gc.enable()
    assert calls == ["call", "return", "c_call"]  # of `at` itself, and of setprofile


def test_an_error_of_our_own_is_not_explained_and_not_waited_for(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        with Watch(ranks, timeout=0.0, resume=RESUME) as watch:
            started = time.monotonic()
            for error in (ValueError("connection"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
                assert watch.explain(error) is None
            assert watch.explain(torch.OutOfMemoryError("CUDA out of memory")) is None
            assert time.monotonic() - started < 5
            ranks.barrier()

    assert [process.code for process in run_ranks(tmp_path, 2, work)] == [0, 0]


@pytest.mark.slow
def test_a_broken_connection_without_a_death_is_not_explained(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        with Watch(ranks, timeout=0.0, resume=RESUME, lost=4.0) as watch:
            if ranks.rank == 0:
                wrapped = ValueError("not written")
                wrapped.__cause__ = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
                assert watch.explain(wrapped) is None  # both are well
            ranks.barrier()

    ended = run_ranks(tmp_path, 2, work)
    assert [process.code for process in ended] == [0, 0]
    assert ended[0].seconds > 4


def test_a_process_is_known_by_its_beginning_and_a_zombie_has_ended() -> None:
    ours = beats.introduce(0)
    assert not beats.vanished(ours, ours.machine)
    assert beats.vanished(replace(ours, began=ours.began - 1), ours.machine)  # its number was given to us
    assert not beats.vanished(replace(ours, began=0), "another machine")
    assert not beats.vanished(replace(ours, machine="", began=0), "")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    other = replace(ours, pid=child, began=beats._began(child) or 0)
    assert not beats.vanished(other, ours.machine)
    os.kill(child, signal.SIGKILL)
    until = time.monotonic() + 10
    while not beats.vanished(other, ours.machine) and time.monotonic() < until:
        time.sleep(0.01)
    assert beats.vanished(other, ours.machine)  # not waited for yet
    os.waitpid(child, 0)
    assert beats.vanished(other, ours.machine)


def beat(rank: int, place: str, frames: tuple[str, ...] = WORKS, seconds: float = 5.0, state: str = "running") -> Beat:
    return Beat(rank, "a", "m", 10 + rank, 1, place, seconds, frames=frames, state=state)


def holders(*known: Beat, world: int = 0) -> list[int]:
    return stacks.holders({one.rank: one for one in known}, world or len(known))


def test_who_holds_the_others_up() -> None:
    # those outside of a collective, if some are in one
    assert holders(beat(0, "step 2", WAITS), beat(1, "step 2"), beat(2, "step 2", WAITS)) == [1]
    assert holders(beat(0, "step 2"), beat(1, "step 2"), beat(2, "step 2", WAITS)) == [0, 1]
    assert holders(beat(0, "step 2", ()), beat(1, "step 2", WAITS)) == [0]  # it gave no answer
    backward = (
        "autograd/graph.py:869 _engine_run_backward",
        "autograd/__init__.py:347 backward",
        "torch/_tensor.py:1 f",
    )
    assert holders(beat(0, "step 2", backward), beat(1, "step 2")) == [1]
    # who has not begun or has left, if all others wait
    assert holders(beat(0, "step 2", WAITS), beat(2, "step 2", WAITS), world=3) == [1]
    assert holders(beat(0, "step 2", WAITS), beat(1, "step 9", (), state=LEFT)) == [1]
    # a GPU's collectives are waited for anywhere: by places
    assert holders(beat(0, "step 2"), beat(1, "step 2"), beat(2, "step 1")) == [2]
    assert holders(beat(0, "step 2", WAITS), beat(1, "saving step 2", WAITS), beat(2, "step 2", WAITS)) == [1]
    assert holders(beat(0, "step 2", seconds=7.0), beat(1, "step 1", seconds=9.0)) == [1]
    assert holders(beat(0, "step 2"), beat(1, "step 2")) == []
    # a collective far down the stack is no wait: FSDP's forward pass is such a frame
    deep = ("a.py:1 f", "b.py:1 g", "c.py:1 h", *WAITS)
    assert holders(beat(0, "step 2", deep), beat(1, "step 2", WAITS)) == [0]


def test_the_table_of_a_hang() -> None:
    known = {0: beat(0, "step 2", WAITS, 63.4), 1: beat(1, "step 1", ()), 3: beat(3, "step 2", state=LEFT)}
    assert stacks.table(known, 4).splitlines() == [
        "  rank 0 (host a, process 10): step 2, for 63 s",
        f"    {WAITS[0]} < {WAITS[1]}",
        "  rank 1 (host a, process 11): step 1, for 5 s",
        "    gave no answer",
        "  rank 2: has not begun to train",
        "  rank 3 (host a, process 13): has left in good order",
        "  rank 0 waits for ranks 1, 2",
    ]
    same = {rank: beat(rank, "step 2") for rank in (0, 1)}
    assert stacks.table(same, 2).splitlines()[-1].startswith("  no rank is behind the others")


def test_frames_are_the_innermost_of_the_thread_first() -> None:
    entered, leave = threading.Event(), threading.Event()

    def inner() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=inner)
    thread.start()
    entered.wait()
    assert thread.ident is not None
    found = stacks.frames_of(thread.ident)
    leave.set()
    thread.join()
    names = [frame.split()[-1] for frame in found]
    assert "inner" in names and names[-1] in ("run", "_bootstrap_inner", "_bootstrap") and len(found) <= 5
    assert re.fullmatch(r"engine/test_watch\.py:\d+ inner", found[names.index("inner")])
    assert stacks.frames_of(-1) == ()


def test_a_wait_of_gloo_counts_as_one(tmp_path: Path) -> None:
    """The frames that PyTorch really has: it may be re-arranged."""

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            time.sleep(1.0)
        found: list[tuple[str, ...]] = []
        main = threading.get_ident()
        timer = threading.Timer(0.5, lambda: found.append(stacks.frames_of(main)))
        timer.start()
        dist.all_reduce(torch.ones(1))
        timer.join()
        assert ranks.rank == 1 or stacks.in_collective(beat(0, "", found[0])), found

    assert [process.code for process in run_ranks(tmp_path, 2, work)] == [0, 0]
