"""The processes that read samples for the trainer: whether they live, how they died, and their end.

Any loader that reads in processes of its own can use it; what the trainer needs to know is `LoaderDied` alone.
"""

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

import torch

from ssr_fast.data.processes import follow_parent
from ssr_fast.errors import UserError

_Batch = TypeVar("_Batch")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop. A terminal and a cluster send them to the whole process group; only the parent answers."""
_PATIENCE_S = 2.0  # for workers that end by themselves
_LONGEST_S = 8.0  # for the loader's own shutdown, whose threads look every 5 s whether they are wanted
_TORCH = "torch.utils.data"

_CAUSES = {
    signal.SIGKILL: (", probably for want of memory", "free memory or lower --data.workers"),
    signal.SIGBUS: (
        ": a file was cut off while it was read, or /dev/shm is full",
        "repair the data set (`python -m ssr_fast.prepare check`) or make room",
    ),
}
_OTHER_CURE = "find out what ended it"


def begin_worker() -> None:
    """What a loader's process does first, in itself.

    It leaves stopping to the parent, since signals of a terminal or a cluster reach the whole process group, and ends
    with it: one that waits for its turn to write would not notice that nobody is left to read.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    follow_parent()
    torch.set_num_threads(1)
    random.seed(0)  # nothing may depend on a worker's own random state; a fixed one makes a violation reproducible


class LoaderDied(UserError):
    """A process that reads samples ended without being asked.

    It is raised between two steps only, so that the finished ones can be saved first.

    Args:
        what: which process, and how it ended.
        cure: what the user can do.
    """

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what, cure)
        self.what, self.cure = what, cure

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}"


class _ChildEnded(BaseException):
    """Leaves a wait through the loader's own handlers of Exception."""


class LoaderProcesses:
    """A loader's processes, none of which ends before `end`.

    Args:
        processes: started ones; empty for a loader that reads in the training process.
    """

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        self._processes = tuple(processes)

    def check(self, patience: float = 0.0) -> None:
        """Look at them, without waiting for any that lives.

        Args:
            patience: seconds to wait for an end. The connections of a dying process close a moment before it is dead,
                so who has met a broken one gives it a second.

        Raises:
            LoaderDied: one has ended.
        """
        if patience and self._processes:
            ends = wait([process.sentinel for process in self._processes], patience)
            for process in self._processes:
                if process.sentinel in ends:
                    process.join(patience)
        if dead := [process for process in self._processes if process.exitcode is not None]:
            raise death(dead)

    def wait_for(self, take: Callable[[], _Batch]) -> _Batch:
        """What `take` returns, unless a process has died before it or dies in it: that ends the wait at once.

        The wait is left at any line, so nothing of the loader may be used afterwards. To wait for the loader's own
        notice would not do: the DataLoader takes a lock then, which the dead process may hold for ever.

        Raises:
            LoaderDied: one has ended.
        """
        before = signal.getsignal(signal.SIGCHLD)

        def child_ended(number: int, frame: FrameType | None) -> None:
            if callable(before):
                before(number, frame)
            if any(process.exitcode is not None for process in self._processes):
                signal.signal(signal.SIGCHLD, before)  # here too: the `finally` below may be what is left
                raise _ChildEnded

        handles = threading.current_thread() is threading.main_thread()  # Python handles signals in no other
        try:
            try:
                if handles:
                    signal.signal(signal.SIGCHLD, child_ended)
                self.check()
                return take()
            finally:
                if handles:
                    signal.signal(signal.SIGCHLD, before)
        except (_ChildEnded, RuntimeError, OSError, EOFError):  # a connection to a dying process breaks in many ways
            self.check(patience=1.0)
            raise

    def end(self, close: Callable[[], None]) -> None:
        """None of them is left afterwards, whatever they were doing.

        Args:
            close: the loader's own shutdown. It may wait for ever, for a lock that a dead process holds, and is left
                behind then.
        """
        closing = threading.Thread(target=close, name="loader shutdown", daemon=True)
        closing.start()
        closing.join(_PATIENCE_S)
        for process in self._processes:
            if process.exitcode is None:
                process.kill()  # they ignore SIGTERM, and have nothing to lose
        for process in self._processes:
            process.join(_LONGEST_S)
        closing.join(_LONGEST_S)


def death(dead: Sequence[BaseProcess]) -> LoaderDied:
    """The error for processes that have ended; their exit codes are known."""
    ends = [(process.pid, *_ending(process.exitcode or 0)) for process in dead]
    (pid, how, cause, cure) = ends[0]
    if len(ends) == 1:
        return LoaderDied(f"a loader process (pid {pid}) {how}{cause}", cure)
    all_ends = ", ".join(f"pid {pid} {how}" for pid, how, _, _ in ends)
    return LoaderDied(f"{len(ends)} loader processes died ({all_ends}){cause}", cure)


def _ending(code: int) -> tuple[str, str, str]:
    """(how a process of this exit code ended, why perhaps, what to do); negative codes are signals."""
    if code >= 0:
        return f"ended by itself with exit code {code}", "", _OTHER_CURE
    try:
        number = signal.Signals(-code)
    except ValueError:  # one of the real-time signals, which have no names
        return f"was killed by signal {-code}", "", _OTHER_CURE
    return f"was killed by signal {-code} ({number.name})", *_CAUSES.get(number, ("", _OTHER_CURE))


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Around the making of a DataLoader's iterator, which starts processes.

    The processes begin with the signals that ask a run to stop blocked: PyTorch gives them a SIGTERM handler that ends
    them before a worker_init_fn can say otherwise. This process gets such a signal when the start is over.

    PyTorch also has this process raise as soon as a worker dies, wherever it is, so in the midst of an optimiser step.
    The handler that was there before comes back: a death is then found between steps, by `LoaderProcesses.wait_for`.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if before is None or getattr(before, "__module__", "").startswith(_TORCH):
        before = signal.SIG_DFL  # another DataLoader's, or one that Python cannot install again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGCHLD))
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # PyTorch and Python handle signals in no other
            signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
