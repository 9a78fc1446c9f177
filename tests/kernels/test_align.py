"""Alignment loss: against F.cosine_similarity in float64, gradients, resampling, masks, refusals."""

import pytest
import torch
import torch.nn.functional as F

from ssr_kernels.align import align_loss, align_stages, reference
from tests.syncfree import NoHostSync

CASES = {
    "same grid": ((2, 4, 5, 3), (4, 5), 6),
    "larger target": ((2, 3, 2, 4), (7, 9), 5),
    "smaller target": ((1, 5, 4, 2), (3, 2), 3),
    "1x1 map": ((2, 1, 1, 3), (4, 4), 2),
    "1x1 target": ((2, 5, 3, 3), (1, 1), 2),
    "one channel": ((1, 2, 2, 1), (2, 2), 1),
    "wide": ((1, 2, 3, 320), (3, 2), 256),
    "finer than the target": ((2, 5, 7, 3), (2, 4), 6),
    "finer in one direction": ((1, 4, 3, 2), (2, 3), 5),
    "finer, of one token": ((1, 3, 4, 2), (1, 1), 4),
}


def make(case, dtype=torch.float64):
    shape, grid, width = CASES[case]
    x = torch.randn(shape, dtype=dtype)
    weight, bias = torch.randn(width, shape[3], dtype=dtype), torch.randn(width, dtype=dtype)
    return x, weight, bias, torch.randn(shape[0], *grid, width, dtype=dtype)


def expected_map(x, weight, bias, target):
    """1 - cosine of every pixel, [B, h, w], from F.* alone."""
    p = F.linear(x, weight, bias).permute(0, 3, 1, 2)
    t = F.interpolate(target.permute(0, 3, 1, 2).contiguous(), size=x.shape[1:3], mode="bilinear", align_corners=False)
    return 1 - F.cosine_similarity(p, t, dim=1, eps=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_cosine_similarity(case, with_bias, seed):
    x, weight, bias, target = make(case)
    bias = bias if with_bias else None
    expected = expected_map(x, weight, bias, target)
    torch.testing.assert_close(align_loss(x, weight, bias, target), expected.mean(), rtol=1e-12, atol=1e-12)
    valid = torch.rand(x.shape[:3], dtype=torch.float64)
    weighted = (expected * valid).sum() / valid.sum()
    torch.testing.assert_close(align_loss(x, weight, bias, target, valid), weighted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case != "wide"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(case, with_bias, seed):
    x, weight, bias, target = make(case)
    if case == "one channel":
        bias = None  # the cosine of one channel is +-1: a constant, whose gradient is 0 and must stay so
    valid = (torch.rand(x.shape[:3]) < 0.7).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias if with_bias else None) if t is not None]

    def loss(*leaves):
        return align_loss(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, target, valid)

    assert torch.autograd.gradcheck(loss, leaves)


def test_a_second_derivative_is_refused_with_the_way_out(seed):
    x, weight, bias, target = make("larger target")
    loss = align_loss(x.requires_grad_(), weight, bias, target)
    with pytest.raises(RuntimeError, match="no second derivative.*align.reference.align_stages"):
        torch.autograd.grad(loss, x, create_graph=True)
    valid = torch.ones(x.shape[:3], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: reference.align_stages([x], [weight], [bias], target, [valid], [1.0]), x, fast_mode=True
    )


def test_the_target_and_the_mask_get_no_gradient(seed):
    x, weight, bias, target = make("larger target")
    valid = torch.rand(x.shape[:3], dtype=torch.float64, requires_grad=True)
    target.requires_grad_(), x.requires_grad_()
    align_loss(x, weight, bias, target, valid).backward()
    assert target.grad is None and valid.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_nothing_valid_is_zero_with_zero_gradient(dtype, seed):
    x, weight, bias, target = make("smaller target")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = align_loss(x, weight, bias, target, torch.zeros(x.shape[:3], dtype=dtype))
    assert loss.detach() == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_invalid_pixels_have_no_say(seed):
    x, weight, bias, target = make("same grid")
    valid = torch.rand(x.shape[:3]) < 0.5
    changed = torch.where(valid[..., None], x, torch.randn_like(x) * 100)
    torch.testing.assert_close(
        align_loss(x, weight, bias, target, valid), align_loss(changed, weight, bias, target, valid), rtol=0, atol=1e-12
    )
    changed.requires_grad_()
    align_loss(changed, weight, bias, target, valid).backward()
    assert torch.equal(changed.grad.abs().sum(dim=3) > 0, valid)


def test_zero_vectors_are_at_distance_one_with_finite_gradients(seed):
    x, weight, _, target = make("same grid")
    dead_x, dead_target = torch.zeros_like(x).requires_grad_(), torch.zeros_like(target)
    loss = align_loss(dead_x, weight, None, target)
    assert loss.detach() == 1
    assert torch.autograd.grad(loss, dead_x)[0].isfinite().all()
    assert align_loss(x, weight, None, dead_target) == 1


def test_the_range(seed):
    x, _, _, _ = make("same grid")
    identity = torch.eye(3, dtype=torch.float64)
    assert abs(align_loss(x, identity, None, x * 7)) < 1e-12
    assert abs(align_loss(x, -identity, None, x * 7) - 2) < 1e-12


def test_non_contiguous_inputs(seed):
    x, weight, bias, target = make("larger target")
    expected = align_loss(x, weight, bias, target)
    maps = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    turned = target.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    actual = align_loss(maps, weight.t().contiguous().t(), bias, turned)
    assert not (maps.is_contiguous() or turned.is_contiguous())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_stages_are_the_weighted_sum(seed):
    _, _, _, target = make("larger target")
    features = [torch.randn(2, size, size + 1, channels, dtype=torch.float64) for size, channels in ((8, 2), (4, 3))]
    weights = [torch.randn(5, x.shape[3], dtype=torch.float64) for x in features]
    biases, shares = [torch.randn(5, dtype=torch.float64), None], [0.25, 3.0]
    valid = [torch.rand(x.shape[:3], dtype=torch.float64) for x in features]
    for masks in (None, valid):
        expected = sum(
            share * align_loss(x, weight, bias, target, None if masks is None else masks[index])
            for index, (x, weight, bias, share) in enumerate(zip(features, weights, biases, shares, strict=True))
        )
        actual = align_stages(features, weights, biases, target, masks, shares)
        assert actual.shape == ()
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_bf16_operands_are_reduced_in_float32(seed):
    x, weight, bias, target = make("wide", torch.bfloat16)
    loss = align_loss(x, weight, bias, target)
    assert loss.dtype == torch.float32
    exact = align_loss(x.double(), weight.double(), bias.double(), target.double())
    assert abs(loss.double() - exact) / exact < 1e-2
    mixed = align_loss(x.float(), weight.float(), bias.float(), target)
    assert abs(mixed.double() - exact) / exact < 1e-5


def test_no_host_sync_forward_or_backward(seed):
    x, weight, bias, target = make("larger target", torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    valid = torch.rand(x.shape[:3]) < 0.5
    with NoHostSync():
        torch.autograd.grad(align_stages([x], [weight], [bias], target, [valid], [0.5]), leaves)


def test_refusals_name_the_argument(seed):
    x, weight, bias, target = make("same grid")
    valid = torch.ones(x.shape[:3])
    refused = [
        (ValueError, "x must have the shape", (x[0], weight, bias, target)),
        (ValueError, r"x must have the shape \[B, h, w, C\] = \[2, any", (x[:1], weight, bias, target)),
        (TypeError, "x must be floating point", (x.long(), weight, bias, target)),
        (ValueError, r"weight must have the shape \[D, C\] = \[6, 3\]", (x, weight.t(), bias, target)),
        (TypeError, "weight must have the dtype of x", (x, weight.float(), bias, target)),
        (ValueError, "bias must have the shape", (x, weight, bias[:1], target)),
        (TypeError, "bias must have the dtype of x", (x, weight, bias.float(), target)),
        (TypeError, "target must be floating point", (x, weight, bias, target.int())),
        (ValueError, "target must be on the device of x", (x, weight, bias, target.to("meta"))),
        (ValueError, r"valid must have the shape \[B, h, w\]", (x, weight, bias, target, valid[:, 1:])),
    ]
    for kind, message, arguments in refused:
        with pytest.raises(kind, match=message):
            align_loss(*arguments)
    with pytest.raises(ValueError, match=r"weights\[1\] must have the shape"):
        align_stages([x, x], [weight, weight[1:]], [None, None], target, None, [1.0, 1.0])
    with pytest.raises(ValueError, match="stage_weights must have one entry a stage, 2"):
        align_stages([x, x], [weight, weight], [None, None], target, None, [1.0])
    with pytest.raises(ValueError, match="valid must have one entry a stage"):
        align_stages([x], [weight], [None], target, [], [1.0])
    with pytest.raises(ValueError, match="at least one stage"):
        align_stages([], [], [], target, None, [])
