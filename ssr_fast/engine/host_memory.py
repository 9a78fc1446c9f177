"""The C library's allocator, told to keep what a CPU step frees: the next step takes it again without page faults."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters in glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_NEVER_TRIM = 2**31 - 1


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
