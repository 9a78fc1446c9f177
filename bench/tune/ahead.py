"""Compiles what the tuner will try in several processes, into Triton's own disk cache, before the GPU needs it.

Each process runs the ops on meta tensors through Triton's own launcher, whose launches only compile: keys and code are
those of the real launches. The processes are spawned and see no GPU.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from .device import using
from .ops import meta_inputs, tunables
from .search import Table

MOST_PROCESSES = 16


@dataclass(frozen=True)
class Job:
    """A table, and the cases of an op with which it is run: see ops.shapes_of."""

    op: str
    shapes: list[Any]
    table: Table


class _Driver:
    """A GPU that is not there: all that Triton's launcher asks before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(jobs: Sequence[Job], capability: int, seconds: float | None) -> str:
    """Compile as many jobs as the time allows (None: all); says what was done, one line."""
    started = time.monotonic()
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs) or 1)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (capability,))
    futures = [pool.submit(_compile, job) for job in jobs]
    kernels, note = 0, ""
    try:
        for future in as_completed(futures, timeout=seconds):
            kernels += future.result()
    except Exception as error:  # what is missing then compiles when it first runs
        note = f"; then {type(error).__name__}, the rest compiles when it runs"
    pool.shutdown(wait=False, cancel_futures=True)
    return f"{kernels} kernels compiled ahead by {processes} processes in {time.monotonic() - started:.0f} s{note}"


def _start(capability: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
    run = JITFunction.run

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **named)

    JITFunction.run = only_compile


def _compile(job: Job) -> int:
    """How many kernels this process newly compiled."""
    from triton import knobs

    compiled: list[bool] = []
    knobs.compilation.listener = lambda **facts: compiled.append(not facts["cache_hit"])
    op = tunables()[job.op]
    for shapes in job.shapes:
        try:
            with using(job.table), torch.no_grad():
                op.run(meta_inputs(shapes))
        except Exception:  # it fails again when it runs, and is then left out with the reason
            continue
    return sum(compiled)
