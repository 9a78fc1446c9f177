"""Ranks for a test: forked processes that form a gloo group."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks


def run_ranks(meeting: Path, world: int, work: Callable[[Ranks], None]) -> None:
    """Do `work` on each of `world` ranks; whoever fails prints its traceback and fails the test.

    Args:
        meeting: a file that is not there yet, by which they find each other.
    """
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
                work(Ranks(rank, world, rank, dist.group.WORLD))
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world, codes
