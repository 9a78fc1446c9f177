"""The compiled passes of align's Gram form on the CPU against the definition in float64; what native.py refuses."""

import dataclasses

import pytest
import torch

from ssr_kernels import library
from ssr_kernels.align import native
from tests.kernels import align_gram
from tests.kernels.align_gram import bytes_mask, check, empty_mask, float_mask, make, run

needs_library = pytest.mark.skipif(bool(library.reasons("ssr_cpu")), reason="; ".join(library.reasons("ssr_cpu")))

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

# batch, target grid, D, and (h, w, C) of each stage
CASES = {
    "4x": (2, (3, 5), 256, [(12, 20, 64)]),
    "2x": (2, (4, 3), 256, [(8, 6, 128)]),
    "1x2": (1, (5, 4), 256, [(5, 8, 160)]),
    "2x1": (1, (3, 9), 256, [(6, 9, 32)]),
    "non-integer": (2, (5, 7), 256, [(13, 17, 32)]),
    "large ratio": (1, (2, 3), 256, [(37, 41, 32)]),
    "one token": (2, (1, 1), 256, [(9, 3, 64)]),
    "one pixel": (1, (1, 1), 256, [(1, 2, 32)]),
    "odd channels": (2, (2, 3), 64, [(5, 7, 19)]),
    "wide target": (1, (3, 3), 1280, [(7, 9, 160)]),
    "four stages": (2, (3, 4), 256, [(12, 16, 32), (6, 8, 64), (7, 9, 128), (3, 5, 160)]),
}


def test_the_tables_of_the_tests_define_the_op(seed):
    """cos of the tables = the cosine of p and ATen's resampled target; dx = its autograd."""
    weight, bias = torch.randn(24, 6, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    target, x = torch.randn(2, 3, 5, 24, dtype=torch.float64), torch.randn(2, 8, 9, 6, dtype=torch.float64)
    x.requires_grad_()
    t = torch.nn.functional.interpolate(target.permute(0, 3, 1, 2), size=(8, 9), mode="bilinear").permute(0, 2, 3, 1)
    cos = torch.nn.functional.cosine_similarity(x @ weight.T + bias, t, dim=3)
    valid = torch.rand(2, 8, 9, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((valid * (1 - cos)).sum(), x)
    tokens, gram = align_gram.tables(weight, bias, target, torch.float64)
    stage = native.Stage(x.detach(), valid, tokens, gram, 0, 0, 0)
    want = align_gram.expected(stage, target, -1.0, torch.float64)
    torch.testing.assert_close(want.rows[0], cos.detach().flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(want.dx, gradient, rtol=1e-11, atol=1e-12)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, dtype, seed):
    call, target = make(CASES[case], dtype)
    run(*call)
    check(call, target, {"": TOLERANCE[dtype]}, dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [bytes_mask, float_mask, empty_mask])
def test_masks(mask, dtype, seed):
    call, target = make(CASES["four stages"], dtype, mask)
    run(*call)
    if mask is not empty_mask:
        check(call, target, {"": TOLERANCE[dtype]}, dtype)
        return
    stages, partial = call[0], call[4]
    assert torch.equal(partial[1:-1], torch.zeros_like(partial[1:-1]))
    for stage in stages:
        channels = stage.x.shape[3]
        assert torch.equal(stage.dx, torch.zeros_like(stage.dx))
        assert torch.equal(stage.y[:, : channels + 1], torch.zeros_like(stage.y[:, : channels + 1]))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_bias_and_rows_of_norm_zero(dtype, seed):
    """x = 0 without bias: the norm is clamped, cos is 0 and only the target pulls; a target of 0 likewise."""
    call, target = make(CASES["2x"], dtype, bias=False, empty_image=1)
    call[0][0].x[0, 1] = 0
    call[0][0].x[0, 2] *= 1e-10  # its |p| is below eps, its cos is not 0: the clamped norm has no gradient
    run(*call)
    check(call, target, {"": TOLERANCE[dtype]}, dtype)
    rows, count = call[3], 48
    assert (rows[0, 3 + 6 : 3 + 12] == 0).all() and (rows[1, 3 + 6 : 3 + 18] == 1e8).all()
    assert (rows[2, 3 + count : 3 + 2 * count] == 1e8).all()


@needs_library
def test_invalid_rows_may_hold_anything_finite(seed):
    call, _ = make(CASES["4x"], torch.float32, bytes_mask)
    stages = call[0]
    stages[0].x[stages[0].valid == 0] = 3e38
    run(*call)
    assert not stages[0].dx.isnan().any() and (stages[0].dx[stages[0].valid == 0] == 0).all()
    assert not call[4][1:-1].isnan().any() and not stages[0].y[:, :65].isnan().any()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_runs_are_equal(dtype, seed):
    call, _ = make(CASES["four stages"], dtype, float_mask)
    outputs = [call[3], call[4], *(t for stage in call[0] for t in (stage.dx, stage.y))]
    run(*call)
    first = [out.clone() for out in outputs]
    for out in outputs:
        out.fill_(float("nan"))
    run(*call)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, outputs, strict=True))


@needs_library
@pytest.mark.parametrize("case", ["4x", "1x2", "non-integer", "large ratio"])
def test_the_adjoint_is_the_transpose_of_the_resampling(case, seed):
    """<resample(T W), r x> read from the rows = <T W, y>, for the C columns and for the constant one.

    With A = 0 and u = 0 the norms are clamped, so that cos = 1e8 it p.t and r = -1e8 it.
    """
    (stages, hs, ws, rows, partial, _, _), _ = make(CASES[case], torch.float64)
    stage = stages[0]
    channels = stage.x.shape[3]
    stage.gram.zero_()
    grad, scale = torch.tensor(-1.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    run(stages, hs, ws, rows, partial, grad, scale)
    columns = stage.tokens[:, : channels + 1]
    forward = rows[0, 3 : 3 + stage.x[..., 0].numel()].sum()
    torch.testing.assert_close(forward, (columns * stage.y[:, : channels + 1]).sum(), rtol=1e-11, atol=1e-3)


# ---- refusals


def changed(call, **changes):
    stages = list(call[0])
    stages[0] = dataclasses.replace(stages[0], **changes)
    return (stages, *call[1:])


@needs_library
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": torch.zeros(15, 71)}, r"stages\[0\].tokens has the shape \[15, 71\], not \[30, 72\]"),
        ({"gram": torch.zeros(65, 72, dtype=torch.float64)}, r"stages\[0\].gram is torch.float64 on cpu"),
        ({"gram": torch.zeros(72, 65).T}, r"stages\[0\].gram is not contiguous"),
        ({"valid": torch.zeros(2, 12, 20, dtype=torch.int64)}, "valid must be uint8 or torch.float32"),
        ({"valid": torch.zeros(2, 20, 12)}, r"valid must be contiguous, on cpu, with the shape \[2, 12, 20\]"),
        ({"dx": None}, r"stages\[0\].dx is missing"),
        ({"row0": 1000}, r"rows must have the shape \[3, total\] with a total of at least 1480"),
        ({"index": 1}, "scale must have one dimension with at least 2 entries"),
        ({"x": torch.zeros(2, 12, 64, 20).transpose(2, 3)}, "stage 0 is not contiguous"),
        ({"x": torch.zeros(2, 12, 20, 64, dtype=torch.int32)}, "stage 0 has the dtype torch.int32, not torch.float32"),
    ],
)
def test_a_wrong_argument_is_named(changes, message, seed):
    stages, hs, ws, rows, _, grad, scale = changed(make(CASES["4x"], torch.float32)[0], **changes)
    with pytest.raises(ValueError, match=message):
        native.gram_dx(stages, hs, ws, grad, scale, rows)


@needs_library
def test_more_refusals(seed):
    (stages, hs, ws, rows, partial, grad, scale), _ = make(CASES["4x"], torch.float32)
    with pytest.raises(ValueError, match=r"partial must have the shape \[tiles, 2\] with at least 13 tiles"):
        native.gram_rows(stages, hs, ws, rows, partial[:12])
    with pytest.raises(ValueError, match="at least one stage"):
        native.gram_rows([], hs, ws, rows, partial)
    with pytest.raises(ValueError, match="grad must be a scalar"):
        native.gram_dx(stages, hs, ws, scale.repeat(2), scale, rows)
    with pytest.raises(ValueError, match="more than 8 stages"):
        native.gram_rows(stages * 9, hs, ws, rows, partial)
    with pytest.raises(RuntimeError, match="ssr_align_gram_adjoint failed with code 1: invalid argument"):
        native._call("ssr_cpu", "ssr_align_gram_adjoint", stages, 0, 0, (0, 0, 0, 0))


def test_every_reason_against_cuda_is_given():
    unaligned = torch.zeros(1 * 2 * 2 * 32 + 1, dtype=torch.bfloat16)[1:].view(1, 2, 2, 32)
    features = [torch.zeros(1, 2, 2, 24), torch.zeros(1, 2, 2, 256, dtype=torch.bfloat16), unaligned]
    reasons = native.not_supported_reasons("ssr_cuda", features, 3, 2)
    text = "; ".join(reasons)
    assert "stage 0 has the dtype torch.float32, not torch.bfloat16 or torch.float16" in text
    assert "stage 0 has 24 channels, not a multiple of 16 up to 240" in text and "stage 1 has 256 channels" in text
    assert "stage 2 does not start at a multiple of 16 bytes" in text and "stage 0 is on cpu, not on cuda" in text
    assert "stage 0 has the grid 2x2, coarser than the target's 3x2" in text
    assert native.not_supported_reasons("ssr_cpu", [], 1, 1) == library.reasons("ssr_cpu")
