"""Work on many files in processes of their own, which end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from ssr_fast.errors import UserError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_processes(job: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int, what: str) -> Iterator[_Result]:
    """The job's result for each task, in order.

    Args:
        job: picklable.
        workers: processes; 0 works in this one.
        what: a process makes, for the error.

    Raises:
        UserError: a process was killed.
    """
    if workers == 0 or len(tasks) < 2:
        yield from map(job, tasks)
        return
    pool = ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start)
    try:
        yield from pool.map(job, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that makes {what} was killed, probably for want of memory; run the command again with fewer "
            f"--workers, it keeps what is there"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """From here on this process ends with the one that started it, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "no process of multiprocessing"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _start() -> None:
    """Stopping is the parent's affair: Ctrl-C reaches the whole group, and a killed parent must leave no process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
