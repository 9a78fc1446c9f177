"""BatchNorm and ReLU that keep their input alone: equal to the modules bit for bit, and what is held."""

import pytest
import torch
import torch.nn.functional as F

from ssr_fast.models.heads import SplitBatchNorm2d
from ssr_fast.models.norm_relu import norm_relu

SHAPE = (4, 8, 9, 7)


def make(dtype, splits, channels_last, mixed):
    x = torch.randn(SHAPE, dtype=dtype) * 2 + 1
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    norm = SplitBatchNorm2d(8).to(torch.float64 if dtype == torch.float64 else torch.float32)
    norm.splits = splits
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 2)
        norm.bias.normal_()
    mixer = torch.randn(5, 8, 1, 1, dtype=dtype).requires_grad_() if mixed else None
    return x.requires_grad_(), norm, mixer


def ours(x, norm, mixer):
    running = (norm.running_mean, norm.running_var)
    return norm_relu(x, norm.weight, norm.bias, running, norm.momentum, norm.eps, norm.splits, mixer)


def plain(x, norm, mixer):
    out = F.relu(norm(x))
    return out if mixer is None else F.conv2d(out, mixer)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_modules_bit_for_bit(dtype, splits, channels_last, mixed, seed):
    x, norm, mixer = make(dtype, splits, channels_last, mixed)
    results = []
    for function in (ours, plain):
        norm.reset_running_stats()
        out = function(x, norm, mixer)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        leaves = [x, norm.weight, norm.bias, *([mixer] if mixed else [])]
        grads = torch.autograd.grad(out, leaves, upstream)
        results.append([out, *grads, norm.running_mean.clone(), norm.running_var.clone()])
        assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for number, (mine, theirs) in enumerate(zip(*results, strict=True)):
        if number in (2, 3) and splits > 2:  # gradients of scale and shift: of more parts, the sum has another order
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
        else:
            assert torch.equal(mine, theirs), number


@pytest.mark.parametrize("mixed", [False, True])
def test_gradcheck(mixed, seed):
    x, norm, mixer = make(torch.float64, 2, True, mixed)
    leaves = [x, norm.weight, norm.bias, *([mixer] if mixed else [])]

    def function(x, weight, bias, mixer=None):
        running = (torch.zeros(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype))
        return norm_relu(x, weight, bias, running, 0.1, 1e-5, 2, mixer)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("mixed", [False, True])
def test_only_the_input_is_held(mixed, seed):
    x, norm, mixer = make(torch.float32, 2, True, mixed)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        ours(x * 1.0, norm, mixer)
    maps = {t.untyped_storage().data_ptr() for t in held if t.numel() == x.numel()}
    assert len(maps) == 1


def test_nothing_is_differentiated_for_what_needs_no_gradient(seed):
    x, norm, mixer = make(torch.float32, 1, True, True)
    with torch.no_grad():
        assert not ours(x, norm, mixer).requires_grad
    grad = torch.autograd.grad(ours(x, norm, mixer.detach()).sum(), x)[0]
    assert torch.isfinite(grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype, seed):
    x, norm, mixer = make(dtype, 2, True, True)
    x, mixer = (t.detach().cuda().requires_grad_() for t in (x, mixer))
    norm = norm.cuda()
    both = []
    for function in (ours, plain):
        norm.reset_running_stats()
        out = function(x, norm, mixer)
        grads = torch.autograd.grad(out, [x, norm.weight, norm.bias, mixer], torch.ones_like(out))
        both.append([out, *grads, norm.running_mean.clone(), norm.running_var.clone()])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(*both, strict=True):
        assert (mine - theirs).float().norm() <= bound * theirs.float().norm()
