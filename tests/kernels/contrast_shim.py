"""csrc/contrast.cu run on the CPU: compiled with g++ against the headers in cuda_shim (see test_align_cuda_shim.py)."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

from ssr_kernels import library
from ssr_kernels.contrast import sample_native, sampling

SHIM = Path(__file__).parent / "cuda_shim"
SOURCE = Path(__file__).parents[2] / "csrc" / "contrast.cu"
COMMAND = ("g++", "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing")
UNDEFINED = ("-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error")


def shim_reasons() -> list[str]:
    """Why the kernels cannot run on this CPU; empty if they can."""
    return [] if shutil.which("g++") else ["needs g++"]


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "libshim.so")
        words = [*COMMAND, *UNDEFINED, '-DSSR_SOURCES="shim"', f"-I{SHIM}", str(SOURCE), "-o", path]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(path)


def sample_on_shim(segments, key, count, pixels):
    """sample_pairs by the CUDA kernels."""
    shim = _library()
    shim.shim_configure(2, 232448, int(key) % 1000)
    ids = sampling._int32(segments).flatten(1).contiguous()
    with patch.object(library, "load", lambda name: shim):
        return sampling.Samples(*sample_native.sample_cuda(ids, key, count, pixels))
