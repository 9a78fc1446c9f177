"""sample_pairs in the compiled libraries: ctypes calls into ssr_cpu and ssr_cuda."""

import ctypes

import torch
from torch import Tensor

from .. import library

_SIZES = (ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int)  # images, pixels, segments, samples
_CPU_ERRORS = {1: "invalid argument", 2: "out of memory"}


def sample_cpp(ids: Tensor, key: Tensor, segments: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See sampling.sample_pairs; `ids` is int32 [B, N] and contiguous, on the CPU.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: it refused the call.
    """
    entry = _entry("ssr_cpu", 4)
    out = _outputs(ids, segments, samples)
    code = entry(ids.data_ptr(), key.data_ptr(), *ids.shape, segments, samples, *(part.data_ptr() for part in out))
    if code:
        raise RuntimeError(f"ssr_contrast_sample failed with code {code}: {_CPU_ERRORS.get(code, 'unknown error')}")
    return out


def sample_cuda(ids: Tensor, key: Tensor, segments: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See sampling.sample_pairs; `ids` is int32 [B, N] and contiguous, on a CUDA device.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: CUDA refused the call; the message is its own.
    """
    loaded = library.load("ssr_cuda")
    need = loaded.ssr_contrast_workspace
    need.argtypes, need.restype = _SIZES, ctypes.c_int64
    entry = _entry("ssr_cuda", 6)
    out = _outputs(ids, segments, samples)
    workspace = torch.empty(need(*ids.shape, segments, samples), dtype=torch.uint8, device=ids.device)
    pointers = (*(part.data_ptr() for part in out), workspace.data_ptr())
    arguments = (ids.data_ptr(), key.data_ptr(), *ids.shape, segments, samples, *pointers)
    if ids.is_cuda:
        with torch.cuda.device(ids.device):
            code = entry(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        code = entry(*arguments, None)  # the tests' library, which runs the kernels on the CPU
    if code:
        describe = loaded.ssr_cuda_error
        describe.argtypes, describe.restype = [ctypes.c_int], ctypes.c_char_p
        raise RuntimeError(f"ssr_contrast_sample failed with code {code}: {describe(code).decode()}")
    return out


def _entry(name: str, pointers: int) -> "ctypes._NamedFuncPointer":
    entry = library.load(name).ssr_contrast_sample
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *_SIZES, *[ctypes.c_void_p] * pointers]
    entry.restype = ctypes.c_int
    return entry


def _outputs(ids: Tensor, segments: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = ids.shape[0]
    index = ids.new_empty((batch, segments, samples), dtype=torch.int64)
    segment, taken = ids.new_empty((batch, segments)), ids.new_empty((batch, segments))
    return index, segment, taken, ids.new_empty(batch)
