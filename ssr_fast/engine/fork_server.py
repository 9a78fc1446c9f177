"""The process that the jobs of side_by_side are forked from.

It imports everything once, before it has any threads. Nothing here imports PyTorch: an entry point that starts it first
imports PyTorch at the same time as it.
"""

import importlib
import multiprocessing
import multiprocessing.forkserver
import sys

_FIRST = "ssr_fast.engine.frozen_imports"
_IMPORTS = ("ssr_fast.engine.dcp_files", "torch.utils.tensorboard")


def start(module: str) -> None:
    """Start it if need be; it imports `module`, which holds the jobs' function, and returns at once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([_FIRST, module, *_IMPORTS])
    multiprocessing.forkserver.ensure_running()


def import_all(modules: list[str]) -> None:
    """Import what a fork server would, and more: after an install, so that Python compiles it before the first run."""
    for name in (_FIRST, *_IMPORTS, *modules):
        importlib.import_module(name)


if __name__ == "__main__":
    import_all(sys.argv[1:])
