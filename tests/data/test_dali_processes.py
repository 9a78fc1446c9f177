"""DALI's processes end when they must, and only then: killed ones are named, none is left or waited for forever."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssr_fast.data.dali_loader import not_supported_reasons
from ssr_fast.data.dali_processes import Processes
from ssr_fast.data.workers import LoaderDied
from ssr_fast.errors import UserError
from tests.data.dali_source import CPU, PIXELS, Fake, Slow, assert_steps, load

pytestmark = pytest.mark.skipif(
    bool(not_supported_reasons(CPU)), reason="; ".join(not_supported_reasons(CPU)) or "DALI can be used"
)


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


def left_beyond(before: set[int | None]) -> set[int | None]:
    """Processes that are still there; one counts as alive while DALI's thread has its exit code and stores it."""
    until = time.monotonic() + 1.0
    while (left := children() - before) and time.monotonic() < until:
        time.sleep(0.05)
    return left


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert children() <= before


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["idle", "busy"])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_process_is_one_sentence(seconds: float, killed: int) -> None:
    before = children()
    batches = load(Slow((PIXELS,), seconds=seconds), 0, 10**6, workers=2)
    next(batches)
    time.sleep(0.0 if seconds else 0.5)
    for pid in sorted(pid for pid in children() - before if pid)[:killed]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(
        LoaderDied,
        match=r"^(a loader process|\d loader processes) .*was killed by signal 9 \(SIGKILL\).*--data.workers",
    ):
        for _ in batches:
            assert time.monotonic() - began < 30
    assert time.monotonic() - began < 30
    assert not left_beyond(before)


def test_processes_ignore_signals_and_end_when_the_iterator_is_closed() -> None:
    before = children()
    source = Slow((PIXELS,))
    batches = load(source, 0, 10**6, workers=2)
    good = [next(batches)]
    for pid in children() - before:
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    good += [next(batches) for _ in range(8)]
    assert_steps(source, good, 0)
    assert len(children() - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert children() == before


def test_letting_go_of_the_iterator_ends_its_processes() -> None:
    before = children()
    batches = load(Slow((PIXELS,)), 0, 10**6, workers=1)
    next(batches)
    assert len(children() - before) == 1
    del batches
    assert children() == before


def test_a_process_that_hangs_in_a_read_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssr_fast.data.dali_processes._PATIENCE", 1.0)
    before = children()
    batches = load(Slow((PIXELS,), seconds=1000.0, slow_from=2), 0, 10**6, workers=1, queue=1)
    next(batches)
    began = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 30
    assert children() == before


def test_closing_ends_the_processes_though_dali_waits_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for a semaphore of a process that was killed; its own thread is then not waited for again at exit."""
    monkeypatch.setattr("ssr_fast.data.dali_processes._PATIENCE", 0.2)
    child, never = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,)), threading.Event()
    child.start()
    pool = SimpleNamespace(pids=lambda: [child.pid], close=never.wait, pool=SimpleNamespace(_observer="hangs"))
    processes = Processes(SimpleNamespace(_py_pool=pool))
    assert child.is_alive()
    processes.close()
    processes.close()
    assert not child.is_alive() and pool.pool._observer is None
    never.set()


class Unwelcome(Fake):
    """Cannot be unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise RuntimeError("not here")


def test_a_process_that_does_not_start_is_one_sentence() -> None:
    with pytest.raises(UserError, match="ended before it was ready"):
        next(load(Unwelcome((PIXELS,)), 0, 4, workers=1))


PROGRAM = """
import sys, time, multiprocessing, torch
sys.path[:0] = {path!r}
from tests.data.dali_source import PIXELS, Slow, load
if __name__ == "__main__":
    batches = load(Slow((PIXELS,)), 0, 10**6, workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {then}
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "then, code",
    [
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("sys.exit(3)", 3),
        ("import os, signal; [os.kill(c.pid, 9) for c in multiprocessing.active_children()]; sys.exit(4)", 4),
        ("from nvidia.dali._multiproc.pool import Observer; Observer.close = lambda self: time.sleep(1000)", 0),
    ],
    ids=[
        "the parent is killed",
        "the iterator is never closed",
        "its processes were killed unseen",
        "DALI waits for a semaphore at exit",  # which a killed process may have held
    ],
)
def test_no_process_outlives_its_parent(then: str, code: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(path=sys.path, then=then))
    done = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == code
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    limit = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
