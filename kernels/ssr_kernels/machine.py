"""Why a backend cannot run on this machine, whatever the call: what the ops' own reasons begin with."""

import os
from functools import cache
from importlib.util import find_spec

import torch

from . import library


@torch.compiler.assume_constant_result
def machine_reasons(name: str) -> list[str]:
    """Why a backend cannot run on this machine, whatever the call; a constant to torch.compile."""
    if name == "cpp":
        return list(library.reasons("ssr_cpu"))
    if name == "cuda":
        return list(library.reasons("ssr_cuda"))
    if not _has_triton():
        return ["the package triton is not installed"]
    if interpreted():
        return []
    if not torch.cuda.is_available():
        return ["there is no CUDA device"]
    return [] if torch.cuda.get_device_capability() >= (8, 0) else ["the GPU has less than compute capability 8.0"]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None  # searches the disk where triton is not imported yet


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
