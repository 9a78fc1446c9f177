"""The host's memory: what a CPU step frees is kept for the next one, and what stays is not searched for garbage."""

import ctypes
import gc
import importlib
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters in glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_NEVER_TRIM = 2**31 - 1


def freeze_what_stays() -> None:
    """Let Python search for garbage among what is made from now on alone; before a stage is built, which must not stay.

    A save makes so many objects that Python searches all others too, imports and data sets among them: 50 ms.
    """
    importlib.import_module("ssr_fast.engine.dcp_files")  # what the first save would import
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> bool:
    """Keep freed activations in the heap instead of giving them back to the system after each use.

    A training step on a CPU allocates and frees the same tensors again and again; by default glibc maps each large one
    afresh and the kernel clears its pages every time. Costs nothing but the peak staying allocated.

    Returns:
        whether the allocator took it; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
