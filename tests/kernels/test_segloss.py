"""Segmentation loss and pseudo-labels: against F.* in float64, gradients, ignored pixels, refusals."""

import pytest
import torch
import torch.nn.functional as F

from ssr_kernels.segloss import check_labels, pseudo_label, reference, segloss
from tests.syncfree import NoHostSync

CASES = {  # logits [B, h, w, K], labels (H, W)
    "4x": ((2, 3, 4, 5), (12, 16)),
    "odd": ((1, 5, 3, 7), (17, 13)),
    "same size": ((2, 4, 4, 3), (4, 4)),
    "1x1 logits": ((2, 1, 1, 3), (4, 5)),
    "1x1 labels": ((2, 4, 4, 3), (1, 1)),
    "smaller labels": ((1, 6, 7, 3), (3, 5)),
}


def make(case, dtype=torch.float64, labels_dtype=torch.uint8):
    shape, size = CASES[case]
    labels = torch.randint(0, shape[3], (shape[0], *size))
    labels = torch.where(torch.rand(labels.shape) < 0.2, torch.tensor(255), labels).to(labels_dtype)
    return torch.randn(shape, dtype=dtype) * 3, labels, torch.rand(labels.shape, dtype=dtype)


def upsampled(logits, size):
    maps = logits.permute(0, 3, 1, 2).contiguous()
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_equals_cross_entropy_over_all_pixels(case, labels_dtype, seed):
    logits, labels, weights = make(case, labels_dtype=labels_dtype)
    losses = F.cross_entropy(upsampled(logits, labels.shape[1:]), labels.long(), ignore_index=255, reduction="none")
    expected = (losses * weights).mean()
    for loss in (segloss, reference.segloss):
        torch.testing.assert_close(loss(logits, labels, None, 255), losses.mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss(logits, labels, weights, 255), expected, rtol=1e-12, atol=1e-12)


def test_the_denominator_counts_ignored_pixels():
    logits = torch.zeros(1, 2, 2, 4, dtype=torch.float64)
    labels = torch.full((1, 4, 4), 255)
    labels[0, 0, :2] = 1
    torch.testing.assert_close(segloss(logits, labels), torch.tensor(4.0).double().log() * 2 / 16, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, seed):
    logits, labels, weights = make(case)
    logits.requires_grad_()
    for loss, fast in ((segloss, False), (reference.segloss, True)):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, labels, weights, 255), logits, fast_mode=fast)


def test_a_second_derivative_is_refused_with_the_way_out(seed):
    logits, labels, weights = make("odd")
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative.*segloss.reference.segloss"):
        torch.autograd.grad(segloss(logits, labels, weights), logits, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda z: reference.segloss(z, labels, weights, 255), logits, fast_mode=True)


def test_all_ignored_or_weightless_is_zero_with_zero_gradient(seed):
    logits, labels, weights = make("4x", torch.float32)
    logits.requires_grad_()
    for loss in (
        segloss(logits, torch.full_like(labels, 255)),
        segloss(logits, labels, torch.zeros_like(weights)),
        segloss(logits, torch.full_like(labels, 2), ignore_index=2),
    ):
        assert loss.detach() == 0
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_weights_get_no_gradient(seed):
    logits, labels, weights = make("4x")
    weights.requires_grad_(), logits.requires_grad_()
    segloss(logits, labels, weights).backward()
    assert weights.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("ignore_index", [255, -100])
def test_a_label_that_is_no_class_counts_as_ignored(ignore_index, seed):
    logits, labels, weights = make("4x", labels_dtype=torch.int64)
    labels = torch.where(labels == 255, ignore_index, labels)
    wild = labels.clone()
    wild[:, ::3] = torch.tensor([-1, 5, 254, 2**40]).repeat(4)
    tame = labels.clone()
    tame[:, ::3] = ignore_index
    actual = segloss(logits, wild, weights, ignore_index)
    assert torch.equal(actual, segloss(logits, tame, weights, ignore_index))


def test_check_labels_names_what_it_finds():
    check_labels(torch.tensor([[0, 18], [255, 3]], dtype=torch.uint8), 19)
    check_labels(torch.tensor([], dtype=torch.uint8), 19)
    check_labels(torch.tensor([-1, 2]), 3, ignore_index=-1)
    with pytest.raises(ValueError, match=r"0 .. 18 or 255: 3 pixels have another \(19, 33\)"):
        check_labels(torch.tensor([[33, 19], [33, 0]], dtype=torch.uint8), 19)
    with pytest.raises(ValueError, match=r"\(-1\)"):
        check_labels(torch.tensor([-1, 2]), 3)
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        check_labels(torch.zeros(2), 3)


@pytest.mark.parametrize("case", CASES)
def test_pseudo_labels_are_argmax_and_softmax(case, seed):
    logits, labels, _ = make(case)
    size = tuple(labels.shape[1:])
    probability, expected = upsampled(logits, size).softmax(dim=1).max(dim=1)
    classes, confidence, count = pseudo_label(logits, size, 0.6)
    assert classes.dtype == torch.uint8 and torch.equal(classes.long(), expected)
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, probability.float(), rtol=1e-6, atol=0)
    assert count.dtype == torch.int64 and count.shape == ()
    assert count == (confidence >= 0.6).sum()


def test_the_threshold_is_inclusive_and_ties_take_the_lowest_class():
    classes, confidence, count = pseudo_label(torch.zeros(1, 2, 2, 2), (4, 4), 0.5)
    assert (classes == 0).all() and (confidence == 0.5).all() and count == 16
    assert pseudo_label(torch.zeros(1, 2, 2, 2), (4, 4), 0.51)[2] == 0
    assert pseudo_label(torch.zeros(1, 2, 2, 1), (4, 4), 1.0)[2] == 16


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 3e4, 3e4 - 1]]).reshape(1, 1, 2, 3).requires_grad_()
    loss = segloss(logits, torch.tensor([[[1, 0]]]))
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert pseudo_label(logits, (1, 2), 0.5)[1].isfinite().all()


def test_pseudo_labels_carry_no_graph(seed):
    logits, _, _ = make("4x", torch.float32)
    assert not any(out.requires_grad for out in pseudo_label(logits.requires_grad_(), (12, 16), 0.5))


def test_bf16_logits_are_computed_in_float32(seed):
    logits, labels, weights = make("4x", torch.bfloat16)
    loss = segloss(logits, labels, weights.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segloss(logits.float(), labels, weights.float()), rtol=0, atol=0)


def test_non_contiguous_inputs(seed):
    logits, labels, weights = make("4x")
    maps = logits.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    actual = segloss(maps, turned, weights.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(actual, segloss(logits, labels, weights), rtol=1e-12, atol=1e-12)


def test_an_empty_batch():
    assert segloss(torch.zeros(0, 2, 2, 3), torch.zeros(0, 4, 4, dtype=torch.uint8)) == 0
    assert pseudo_label(torch.zeros(0, 2, 2, 3), (4, 4), 0.5)[2] == 0


def test_no_host_sync_forward_or_backward(seed):
    logits, labels, weights = make("4x", torch.float32)
    logits.requires_grad_()
    with NoHostSync():
        torch.autograd.grad(segloss(logits, labels, weights), logits)
        pseudo_label(logits, (12, 16), 0.968)


def test_compiles_in_one_graph(seed):
    logits, labels, weights = make("4x", torch.float32)
    compiled = torch.compile(segloss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels, weights), segloss(logits, labels, weights))


def test_refusals_name_the_argument(seed):
    logits, labels, weights = make("4x", torch.float32)
    refused = [
        (ValueError, r"logits must have the shape \[B, h, w, K\]", (logits[0], labels)),
        (TypeError, "logits must be floating point", (logits.int(), labels)),
        (ValueError, r"labels must have the shape \[B, H, W\] = \[2, any, any\]", (logits, labels[:1])),
        (ValueError, "labels must have the shape", (logits, labels[..., None])),
        (TypeError, "labels must be an integer tensor", (logits, labels.float())),
        (TypeError, "labels must be an integer tensor", (logits, labels > 3)),
        (ValueError, "labels must be on the device of logits", (logits, labels.to("meta"))),
        (ValueError, r"weights must have the shape \[B, H, W\] = \[2, 12, 16\]", (logits, labels, weights[:, 1:])),
        (TypeError, "weights must be floating point", (logits, labels, weights > 0.5)),
    ]
    for kind, message, arguments in refused:
        with pytest.raises(kind, match=message):
            segloss(*arguments)
    for shape in ((1, 0, 2, 3), (1, 2, 0, 3), (1, 2, 2, 0)):
        with pytest.raises(ValueError, match="logits must have at least one pixel and one class"):
            segloss(torch.zeros(shape), labels[:1])
    with pytest.raises(ValueError, match="labels must have at least one row and one column"):
        segloss(logits, labels[:, :0])
    with pytest.raises(ValueError, match="1 to 255 classes .* 256"):
        pseudo_label(torch.zeros(1, 1, 1, 256), (2, 2), 0.5)
    with pytest.raises(ValueError, match="size must be"):
        pseudo_label(logits, (0, 2), 0.5)
