"""DALI's worker processes: how they start, and how they end when one was killed, the parent died or nobody reads on."""

import atexit
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import cv2

from ssr_fast.data.workers import begin_worker, death
from ssr_fast.errors import UserError

_POLL = 0.5  # seconds between two looks at the processes while DALI lets one wait
_PATIENCE = 10.0  # seconds that a process has to end its sample when the loader is closed


def start_worker() -> None:
    """In a process of DALI's, before its first sample."""
    begin_worker()
    cv2.setNumThreads(1)  # not in begin_worker: in a forked process it hangs


class Processes:
    """DALI's worker processes, if it has any, and calls of DALI that wait for them.

    When one was killed, DALI mostly says so, but it may also wait forever for a semaphore that the dead process was to
    release: in a step, in its own close(), and so when Python exits. So it is called in threads that may be left.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pool = pipeline._py_pool  # DALI names its processes nowhere else
        pids = self._pool.pids() if self._pool is not None else []
        self._children = [child for child in multiprocessing.active_children() if child.pid in pids]
        if self._children:  # registered after DALI's own end of the pool, and so called before it
            atexit.register(self._kill)

    def call(self, function: Callable[[], Any]) -> None:
        """function().

        Raises:
            LoaderDied: a process has died, before or meanwhile.
        """
        if not self._children:
            function()
            return
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(target=_call, args=(function, done), daemon=True).start()
        while True:
            try:
                error = done.get(timeout=_POLL)
            except queue.Empty:
                self._check()
                continue
            if error is not None:
                self._check()
                raise error
            return

    def close(self) -> None:
        """End the processes: at once, after the samples that they are at, or by force. May be called again."""
        if not self._children:
            return
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        if not self._ended():
            threading.Thread(target=_call, args=(self._pool.close, done), daemon=True).start()
            try:
                done.get(timeout=_PATIENCE)
            except queue.Empty:
                pass  # a process hangs in a read, or died just now
        atexit.unregister(self._kill)
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()
            child.join()
        self._pool.pool._observer = None  # DALI's thread that ends processes: nobody is to wait for it any more
        self._children = []

    def _ended(self) -> list[Any]:
        """The processes that are no more. Sentinels tell: DALI's own thread may have taken an exit code first."""
        ended = connection.wait([child.sentinel for child in self._children], timeout=0)
        return [child for child in self._children if child.sentinel in ended]

    def _check(self) -> None:
        ended = self._ended()
        for child in ended:
            until = time.monotonic() + 1.0
            while child.exitcode is None and time.monotonic() < until:
                time.sleep(0.05)  # another thread has the code, and is about to store it
        if ended:
            raise death(ended)


def _call(function: Callable[[], Any], done: "queue.SimpleQueue[Exception | None]") -> None:
    """function(), and what it raised, or None, into `done`."""
    try:
        function()
    except Exception as error:  # handed to the thread that waits
        done.put(error)
    else:
        done.put(None)


def start(pipeline: Any) -> Processes:
    """Build the pipeline, which starts its processes.

    Raises:
        UserError: a process ended before it was ready.
    """
    try:
        pipeline.build()
    except RuntimeError as error:
        if "Workers initialization failed" not in str(error):
            raise
        raise UserError(
            "a worker process of the DALI loader ended before it was ready: see above what it wrote, or give "
            "--data.workers 0 to read in the training process"
        ) from None
    return Processes(pipeline)
