"""csrc/align.cu, every line of its kernels, run on the CPU: compiled with g++ against the headers in cuda_shim.

The shim runs a block's threads in random order between barriers, poisons shared memory, checks its bounds, the
alignment of vectors and that all lanes take part in what needs them all. It knows nothing of the real GPU's timing.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ssr_kernels import library
from ssr_kernels.align import native
from tests.kernels.align_gram import bytes_mask, check, empty_mask, float_mask, make, run

SHIM = Path(__file__).parent / "cuda_shim"
SOURCE = Path(__file__).parents[2] / "csrc" / "align.cu"
COMMAND = ("g++", "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off")
UNDEFINED = ("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

H100, A100 = 232448, 166912
"""Bytes of shared memory that a block can have."""

# A in two parts of 8 bits (bfloat16) or of 11 bits (float16); dx is rounded to the operands' type
TOLERANCES = {
    torch.bfloat16: {"": 1e-5, "dx": 4e-3, "1/|t|": 1e-6},
    torch.float16: {"": 1.5e-6, "dx": 5e-4, "y": 1e-5, "mass of y": 1e-5},  # y: one float sum over all fine pixels
}

# batch, target grid, D, (h, w, C) of each stage; multiprocessors, bytes of shared memory
CASES = {
    "4x": ((2, (3, 5), 48, [(12, 20, 64)]), 2, H100),
    "2x": ((1, (5, 9), 48, [(10, 18, 128)]), 3, A100),
    "1x2": ((1, (9, 4), 48, [(9, 8, 32)]), 1, H100),
    "non-integer": ((2, (5, 7), 48, [(13, 17, 48)]), 2, H100),
    "large ratio": ((1, (2, 1), 48, [(37, 19, 16)]), 4, H100),
    "two strips of the adjoint": ((1, (1, 1), 16, [(70, 66, 16)]), 2, H100),
    "the widest": ((1, (9, 10), 32, [(9, 11, 240)]), 1, A100),
    "panels": ((1, (3, 4), 32, [(9, 11, 160), (9, 9, 32)]), 1, 64 * 1024),
    "a narrow last panel": ((1, (2, 3), 32, [(5, 9, 80)]), 1, 45 * 1024),
    "three panels": ((1, (2, 3), 32, [(5, 9, 80)]), 1, 40 * 1024),
    "four stages": ((2, (3, 4), 48, [(12, 16, 32), (6, 8, 64), (7, 9, 128), (3, 5, 160)]), 1, H100),
    "second buffers": ((1, (5, 5), 48, [(20, 20, 32), (5, 6, 128), (18, 20, 64)]), 1, H100),
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The compiled library."""
    path = tmp_path_factory.mktemp("shim") / "libshim.so"
    words = [*COMMAND, *UNDEFINED, '-DSSR_SOURCES="shim"', f"-I{SHIM}", str(SOURCE), "-o", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture
def device(shim, monkeypatch, seed):
    """Lets native.py call the shim with CPU tensors; sets its multiprocessors and shared memory."""
    monkeypatch.setattr(native, "_library_name", lambda stages: "ssr_cuda")
    monkeypatch.setattr(native, "_DEVICES", {"ssr_cuda": "cpu"})
    monkeypatch.setattr(library, "reasons", lambda name: [])
    monkeypatch.setattr(library, "load", lambda name: shim)
    return lambda processors, shared: shim.shim_configure(processors, shared, seed)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, dtype, device):
    sizes, *machine = CASES[case]
    device(*machine)
    call, target = make(sizes, dtype)
    run(*call)
    check(call, target, TOLERANCES[dtype], torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mask", [bytes_mask, float_mask, empty_mask])
def test_masks(mask, dtype, device):
    device(2, H100)
    call, target = make((2, (3, 3), 48, [(9, 10, 32), (6, 7, 64)]), dtype, mask)
    for stage in call[0]:
        stage.x[stage.valid == 0] = torch.finfo(dtype).max  # any finite value
    run(*call)
    if mask is empty_mask:
        assert torch.equal(call[4][1:-1], torch.zeros_like(call[4][1:-1]))
    for stage in call[0]:
        assert (stage.dx[stage.valid == 0] == 0).all()
        stage.x[stage.valid == 0] = 0  # the rows of what is not valid are of no interest
    if mask is not empty_mask:
        again = make((2, (3, 3), 48, [(9, 10, 32), (6, 7, 64)]), dtype, mask)[0]
        check_valid(call, target, again, dtype)


def check_valid(call, target, again, dtype):
    """The outputs of `call` but for rows that are not valid, which are written anew for x = 0."""
    stages, hs, ws, rows, partial, grad, scale = call
    fresh, sums = torch.full_like(rows, float("nan")), torch.full_like(partial, float("nan"))
    native.gram_rows(stages, hs, ws, fresh, sums)
    assert torch.equal(sums.nan_to_num(), partial.nan_to_num())
    for stage in stages:
        valid = stage.valid.flatten() != 0
        span = slice(stage.row0, stage.row0 + valid.numel())
        assert torch.equal(rows[:, span][:, valid], fresh[:, span][:, valid])
    check((stages, hs, ws, fresh, partial, grad, scale), target, TOLERANCES[dtype], torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_weights_of_any_size(size, dtype, device):
    """W^T W of 1e-6 or of 1e6 is beyond float16's normal range."""
    device(1, H100)
    call, target = make((1, (3, 4), 48, [(6, 9, 32)]), dtype, bias=False, size=size)
    run(*call)
    tolerances = TOLERANCES[dtype]
    if dtype == torch.float16:  # dx itself leaves the range
        tolerances = {**tolerances, "dx": 1e-2 if size > 1 else tolerances["dx"]}
    check(call, target, tolerances, torch.float32)


def test_rows_of_norm_zero(device):
    device(1, H100)
    call, target = make((2, (4, 3), 48, [(8, 6, 64)]), torch.bfloat16, bias=False, empty_image=1)
    call[0][0].x[0, 1] = 0
    call[0][0].x[0, 2] *= 1e-10  # its |p| is below eps
    run(*call)
    check(call, target, {**TOLERANCES[torch.bfloat16], "dx": 1e-2}, torch.float32)
    rows = call[3]
    assert (rows[0, 9:15] == 0).all() and (rows[1, 9:15] == 1e8).all() and (rows[2, 51:99] == 1e8).all()


def test_runs_are_equal_on_any_number_of_multiprocessors(device):
    call, _ = make(CASES["four stages"][0], torch.bfloat16, float_mask)
    outputs = [call[3], call[4], *(t for stage in call[0] for t in (stage.dx, stage.y))]
    copies = []
    for processors in (1, 3):
        device(processors, H100)
        for out in outputs:
            out.fill_(float("nan"))
        run(*call)
        copies.append([out.nan_to_num() for out in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))


def test_what_a_block_cannot_hold_is_refused(device):
    device(1, 16 * 1024)
    (stages, hs, ws, rows, partial, _, _), _ = make((1, (2, 2), 16, [(4, 4, 240)]), torch.float16)
    with pytest.raises(RuntimeError, match="ssr_align_gram_rows failed with code 1: invalid argument"):
        native.gram_rows(stages, hs, ws, rows, partial)
    with pytest.raises(ValueError, match="stage 0 has the grid 4x4, coarser than the target's 5x2"):
        native.gram_rows(stages, 5, 2, rows, partial)


def test_no_rows(device):
    device(1, H100)
    call, _ = make((0, (2, 2), 16, [(4, 4, 16)]), torch.bfloat16)
    run(*call)
    assert call[3].isnan().all()
