"""The process that the jobs of side_by_side are forked from.

It imports everything once, before it has any threads. Nothing here imports PyTorch: an entry point that starts it first
imports PyTorch at the same time as it.
"""

import multiprocessing
import multiprocessing.forkserver

_FIRST = "ssr_fast.engine.frozen_imports"
_IMPORTS = ("ssr_fast.engine.dcp_files", "ssr_fast.models.sam_attention", "torch.utils.tensorboard")


def start(module: str) -> None:
    """Start it if need be; it imports `module`, which holds the jobs' function, and returns at once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([_FIRST, module, *_IMPORTS])
    multiprocessing.forkserver.ensure_running()
