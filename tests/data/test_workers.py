"""Loader processes that die, hang or are orphaned: found between batches, named in a sentence, and none left."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ssr_fast.data.torch_loader import load_steps
from ssr_fast.data.workers import LoaderDied, LoaderProcesses, quiet_start
from tests.methods.run_support import ROOT, children

LAST = 1000


class Numbers:
    """A dataset whose item is its number, and whose worker `worker` meets a fate at the item `at`."""

    def __init__(self, fate=None, worker=0, at=6):
        self.fate, self.worker, self.at = fate, worker, at

    def __getitem__(self, step):
        if self.fate is not None and step >= self.at and torch.utils.data.get_worker_info().id == self.worker:
            self.fate()
        return step


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(60)


def of_worker_loop(name):
    """A local variable of the DataLoader's loop, in which this worker is."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    return frame.f_locals[name]


def die_with_the_result_queue():
    of_worker_loop("data_queue")._wlock.acquire()
    die()


def die_with_the_end_event():
    of_worker_loop("done_event")._cond.acquire()
    die()


def drain(batches):
    """The LoaderDied that ends the batches, and its delay in seconds after the last one."""
    last = time.monotonic()
    with pytest.raises(LoaderDied) as caught:
        for _ in batches:
            last = time.monotonic()
    return caught.value, time.monotonic() - last


def workers_of_this_process():
    return [process for process in multiprocessing.active_children() if "Process-" in process.name]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert workers_of_this_process() == []
    assert (signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGXCPU])
def test_a_killed_worker_is_found_before_the_next_batch_and_named(number, capfd):
    batches = load_steps(Numbers(), 0, LAST, 2, pin=False)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    victim = random.choice(workers_of_this_process())
    os.kill(victim.pid, number)
    victim.join(10)
    started = time.monotonic()
    with pytest.raises(LoaderDied) as caught:
        next(batches)
    assert time.monotonic() - started < 20
    text = str(caught.value)
    assert f"a loader process (pid {victim.pid}) was killed by signal {int(number)} ({number.name})" in text
    assert ("want of memory" in text) == (number == signal.SIGKILL)
    assert ("/dev/shm" in text) == (number == signal.SIGBUS)
    assert "\n" not in text and capfd.readouterr().err == ""  # PyTorch's handlers would add a line of their own


def test_a_death_is_silent_until_the_next_batch():
    """PyTorch would raise at any line of what stands for an optimiser step here."""
    batches = load_steps(Numbers(), 0, LAST, 2, pin=False)
    next(batches)
    for process in workers_of_this_process():
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        pass
    with pytest.raises(LoaderDied, match=r"2 loader processes died \(pid \d+ was killed .*, pid \d+ was killed"):
        next(batches)


@pytest.mark.parametrize("fate", [die, die_with_the_result_queue, lambda: os._exit(7)])
def test_a_worker_that_dies_while_a_batch_is_waited_for(fate):
    death, delay = drain(load_steps(Numbers(fate), 0, LAST, 2, pin=False))
    assert delay < 25
    assert ("exit code 7" in str(death)) or ("SIGKILL" in str(death))


@pytest.mark.slow
@pytest.mark.parametrize("fate", [die, die_with_the_result_queue, die_with_the_end_event])
@pytest.mark.parametrize("at", [0, 1, 9])
def test_whatever_a_dying_worker_holds_the_end_comes(fate, at):
    _, delay = drain(load_steps(Numbers(fate, random.randrange(3), at), 0, LAST, 3, pin=False))
    assert delay < 29


@pytest.mark.slow
def test_a_worker_that_holds_the_end_event_does_not_stop_the_process_from_ending():
    code = (
        "from tests.data.test_workers import *\n"
        "try:\n    list(load_steps(Numbers(die_with_the_end_event), 0, LAST, 2, pin=False))\n"
        "except LoaderDied as death:\n    print(death)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "SIGKILL" in ended.stdout and ended.stderr == ""


def test_a_file_that_is_cut_off_while_it_is_mapped(tmp_path):
    path = tmp_path / "store.npy"
    np.save(path, np.ones(1 << 20, np.uint8))
    mapped = np.load(path, mmap_mode="r")
    path.open("r+b").truncate(4096)
    death, _ = drain(load_steps(Numbers(lambda: mapped.sum()), 0, LAST, 2, pin=False))
    assert "signal 7 (SIGBUS): a file was cut off while it was read" in str(death)
    assert "prepare check" in str(death)


def test_workers_that_hang_are_gone_after_a_death_and_after_a_close():
    hangs = Numbers(lambda: time.sleep(1000), worker=1, at=3)
    batches = load_steps(hangs, 0, LAST, 2, pin=False)
    next(batches)
    hung = workers_of_this_process()
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 8 and not any(process.is_alive() for process in hung)

    batches = load_steps(hangs, 0, LAST, 2, pin=False)
    next(batches)
    os.kill(workers_of_this_process()[0].pid, signal.SIGKILL)
    death, delay = drain(batches)
    assert delay < 25 and "SIGKILL" in str(death)


def test_workers_that_die_with_their_work_done_are_of_no_interest():
    batches = load_steps(Numbers(), 0, 5, 2, pin=False)
    assert [next(batches) for _ in range(5)] == list(range(5))
    for process in workers_of_this_process():
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    assert list(batches) == []


def test_a_mistake_of_the_dataset_is_still_itself_and_no_worker_none_to_check():
    def wrong():
        raise ZeroDivisionError("of the dataset")

    with pytest.raises(ZeroDivisionError, match="of the dataset"):
        list(load_steps(Numbers(wrong), 0, LAST, 2, pin=False))
    assert list(load_steps(Numbers(), 3, 6, 0, pin=False)) == [3, 4, 5]
    LoaderProcesses([]).check(patience=5.0)


def test_pinning_without_a_gpu_changes_nothing():
    batches = load_steps(Numbers(), 0, LAST, 2, pin=True)
    assert next(batches) == 0
    os.kill(workers_of_this_process()[0].pid, signal.SIGKILL)
    drain(batches)


def test_a_handler_of_the_users_own_stays_and_hears_of_the_death():
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    try:
        batches = load_steps(Numbers(), 0, LAST, 2, pin=False)
        next(batches)
        os.kill(workers_of_this_process()[0].pid, signal.SIGKILL)
        drain(batches)
        assert heard
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_anothers_dataloader_does_not_bring_the_exception_back():
    """Its handler, once installed, would raise for every worker of the process."""
    code = (
        "import torch.utils.data as d\n"
        "from tests.data.test_workers import *\n"
        "other = iter(d.DataLoader(list(range(9)), num_workers=1)); next(other)\n"
        "batches = load_steps(Numbers(), 0, LAST, 2, pin=False); next(batches)\n"
        "os.kill(batches.gi_frame.f_locals['processes']._processes[0].pid, 9)\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: pass\n"
        "try:\n    next(batches)\nexcept LoaderDied:\n    print('found')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "found\n" and ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_ignore_what_asks_the_run_to_stop(number):
    batches = load_steps(Numbers(), 0, LAST, 2, pin=False)
    next(batches)
    for process in workers_of_this_process():
        os.kill(process.pid, number)
    assert list(batches) == list(range(1, LAST))


def test_workers_are_started_with_the_stop_signals_blocked():
    """A SIGTERM to the whole group may come before a worker has said that it ignores it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with quiet_start():
        inside = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= inside
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


@pytest.mark.parametrize("size", [1, 30_000])
def test_no_worker_outlives_a_killed_parent(size, tmp_path: Path):
    """Also where the pipe to it is full: a worker that waits to write never looks whether its parent lives."""
    code = (
        "from tests.data.test_workers import *\n"
        f"class Long(Numbers):\n    def __getitem__(self, step): return 'x' * {size}\n"
        "batches = load_steps(Long(), 0, LAST, 2, pin=False); next(batches); print('on', flush=True); time.sleep(99)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "on\n"
    time.sleep(0.5)
    pids = children(parent.pid)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Resized:
    """A dataset whose items resize a large image, and tell how many threads OpenCV has for it."""

    def __getitem__(self, step):
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500))
        return cv2.getNumThreads()


def test_workers_resize_with_one_thread_though_this_process_has_more():
    """Threads are not forked: a worker that changes their number waits for the missing ones for ever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        Resized()[0]  # OpenCV's threads start
        for _ in range(5):
            assert list(load_steps(Resized(), 0, 4, 2, pin=False)) == [1] * 4
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
