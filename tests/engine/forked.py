"""Ranks for a test: forked processes that form a gloo group."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks

PATIENCE_S = 120.0
"""Until ranks that hang are killed; far more than any test needs on a busy machine."""


def run_ranks(beside: Path, world: int, work: Callable[[Ranks], None], patience: float = PATIENCE_S) -> None:
    """Do `work` on each of `world` ranks; whoever fails or hangs prints its traceback, if any, and fails the test.

    Args:
        beside: they meet in a new file beside this path.
        work: gets the rank's own Ranks, with a control group of its own.
        patience: seconds until all are killed.
    """
    codes = exit_codes(beside, world, work, patience)
    assert codes == [0] * world, codes


def exit_codes(beside: Path, world: int, work: Callable[[Ranks], None], patience: float = PATIENCE_S) -> list[int]:
    """The same for a test that expects a rank to fail: 0, 99 (an error) or negative (a signal), by rank."""
    meeting = beside.with_name(f"{beside.name}-meeting-{time.monotonic_ns()}")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _member(meeting, rank, world, work)
        children.append(child)
    end, codes = time.monotonic() + patience, dict[int, int]()
    while len(codes) < world:
        for rank, child in enumerate(children):
            if rank in codes:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[rank] for rank in range(world)]


def _member(meeting: Path, rank: int, world: int, work: Callable[[Ranks], None]) -> None:
    """A forked process from here to its end."""
    code = 99
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        work(Ranks(rank, world, rank, dist.new_group(backend="gloo")))
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
