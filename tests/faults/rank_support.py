"""Forked processes that train together, for the tests of checkpoints."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks


def run_ranks(folder: Path, work: Callable[[Ranks], None], world: int = 2, patience: float = 60) -> list[int]:
    """Exit codes (negative: a signal) of forked processes that form a gloo group; one that hangs is killed.

    Args:
        folder: a file beside it is where they meet; each call needs another.
        work: gets the rank's own Ranks.
        world: number of processes.
        patience: seconds until all are killed.
    """
    meeting = folder.with_name(f"{folder.name}-meeting-{time.monotonic_ns()}")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
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
        children.append(child)
    end, codes = time.monotonic() + patience, {}
    while len(codes) < world:
        for rank, child in enumerate(children):
            if rank not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[rank] for rank in range(world)]
