"""Several jobs at once on a CPU, each in a process of its own with its share of the threads.

A small network leaves most of a second thread idle, so two processes of one thread get nearly twice as much done.
A stop is passed on to every process, and each saves; a process whose parent has died saves and stops by itself.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ssr_fast.engine import fork_server
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.trainer import Stopped
from ssr_fast.errors import UserError

_POLL_S = 0.2


def share(jobs: int) -> tuple[int, int]:
    """(processes at once, threads of each) for a number of jobs on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = max(1, min(jobs, cores))
    return at_once, max(1, cores // at_once)


def side_by_side(
    work: Callable[..., Any], jobs: Sequence[tuple[str, tuple[Any, ...]]], at_once: int, threads: int, stop: StopSignal
) -> Iterator[tuple[str, Any]]:
    """Run `work(*arguments)` for every job, `at_once` at a time in the given order; yields (name, result) as they end.

    Args:
        work: a module's function; its arguments and its result are pickled.
        jobs: (name, arguments) of each; the longest first ends soonest.
        at_once: processes at once.
        threads: PyTorch's threads in each process.
        stop: when it is requested the processes are stopped too.

    Raises:
        Stopped: a stop was requested; every process has saved and ended.
        UserError: the first job that reports one; the others have been stopped.
        RuntimeError: a process died or raised something else (its traceback is on the standard error).
    """
    fork_server.start(work.__module__)
    context = multiprocessing.get_context("forkserver")
    waiting = list(jobs)
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    stopped: dict[str, int] = {}
    failure: Exception | None = None
    asked: set[str] = set()
    try:
        while waiting or running:
            while waiting and len(running) < at_once and failure is None and not stop.requested:
                name, arguments = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_child, args=(theirs, threads, work, arguments), name=name
                )
                process.start()
                theirs.close()
                running[ours] = (name, process)
            if failure is not None or stop.requested:
                waiting.clear()
                for name, process in running.values():
                    if name not in asked:
                        process.terminate()
                        asked.add(name)
            for ready in wait(list(running), _POLL_S):
                assert isinstance(ready, Connection)
                name, process = running.pop(ready)
                kind, value = _outcome(ready, process)
                if kind == "done":
                    yield name, value
                elif kind == "stopped" or (kind == "died" and name in asked):
                    stopped[name] = value if kind == "stopped" else 0
                elif failure is None:
                    failure = UserError(value) if kind == "mistake" else RuntimeError(f"the process of {name} {value}")
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    if failure is not None:
        raise failure
    if stopped:
        after = ", ".join(f"{step} of {name}" for name, step in stopped.items())
        raise Stopped(stop.requested or "SIGTERM", after)


def _outcome(ready: Connection, process: BaseProcess) -> tuple[str, Any]:
    """What a process sent before it ended: done: result, stopped: step, mistake: sentence, died: how."""
    try:
        outcome: tuple[str, Any] = ready.recv()
    except EOFError:
        outcome = ("died", "")
    ready.close()
    process.join()
    return outcome if outcome[0] != "died" else ("died", f"died with exit code {process.exitcode}")


def _child(results: Connection, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The life of a process: signals that come before the work handles them end it; nothing is lost by then."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow_parent, args=(parent.sentinel,), daemon=True).start()
    try:
        results.send(("done", work(*arguments)))
    except Stopped as stopped:
        results.send(("stopped", stopped.args[1]))
    except UserError as error:
        results.send(("mistake", str(error)))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _follow_parent(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
