"""Depthwise convolutions: against F.conv2d in float64, gradients, odd shapes, layouts, refusals."""

import pytest
import torch
import torch.nn.functional as F

from ssr_kernels.dwconv import dwconv_dilated, dwconv_gelu, op, reference
from tests.syncfree import NoHostSync

SHAPES = [(2, 5, 7, 3), (1, 1, 1, 4), (3, 1, 6, 1), (1, 4, 1, 2), (2, 8, 8, 320)]


def make(shape, dtype=torch.float64, branches=1):
    channels = shape[3]
    weights = [torch.randn(channels, 1, 3, 3, dtype=dtype) for _ in range(branches)]
    return torch.randn(shape, dtype=dtype), weights, torch.randn(channels, dtype=dtype)


def by_hand(x, weight, dilation):
    """Sum of nine shifted products, written without any convolution."""
    b, height, width, _ = x.shape
    padded = F.pad(x, (0, 0, dilation, dilation, dilation, dilation))
    out = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            rows = slice(i * dilation, i * dilation + height)
            columns = slice(j * dilation, j * dilation + width)
            out = out + padded[:, rows, columns] * weight[:, 0, i, j]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_is_the_nine_products_and_the_erf_gelu(shape, seed):
    x, (weight,), bias = make(shape)
    z = by_hand(x, weight, 1) + bias
    expected = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    torch.testing.assert_close(dwconv_gelu(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_dilated_is_conv2d_also_where_the_dilation_exceeds_the_map(shape, seed):
    x, weights, _ = make(shape, branches=4)
    dilations = [1, 6, 12, 18]
    for out, weight, dilation in zip(dwconv_dilated(x, weights, dilations), weights, dilations, strict=True):
        nchw = x.permute(0, 3, 1, 2).contiguous()
        conv = F.conv2d(nchw, weight, padding=dilation, dilation=dilation, groups=shape[3]).permute(0, 2, 3, 1)
        torch.testing.assert_close(out, conv, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, by_hand(x, weight, dilation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (1, 1, 1, 3), (1, 4, 2, 2)])
def test_gradcheck(shape, seed):
    x, weights, bias = make(shape, branches=2)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]
    for module in (op, reference):
        assert torch.autograd.gradcheck(lambda x, w, v, b, m=module: m.dwconv_gelu(x, w, b), leaves)
        assert torch.autograd.gradcheck(lambda x, w, v, b, m=module: tuple(m.dwconv_dilated(x, [w, v], [1, 3])), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w, v, b: reference.dwconv_gelu(x, w, b), leaves, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_definition(shape, seed):
    x, weights, bias = make(shape, branches=3)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]
    found, expected = [], []
    for module, into in ((op, found), (reference, expected)):
        torch.manual_seed(seed)
        outs = [module.dwconv_gelu(x, weights[0], bias), *module.dwconv_dilated(x, weights, [1, 6, 18])]
        into += torch.autograd.grad(sum((out * torch.randn_like(out)).sum() for out in outs), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_with_the_way_to_get_it(seed):
    x, (weight,), bias = make((1, 3, 3, 2))
    x.requires_grad_()
    for name, out in (
        ("dwconv_gelu", dwconv_gelu(x, weight, bias)),
        ("dwconv_dilated", dwconv_dilated(x, [weight], [2])[0]),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} has no second derivative .*\.reference\.{name}"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def saved(call, inputs):
    """Storages that a forward keeps for the backward pass, those of the inputs excepted."""
    own, kept = {tensor.untyped_storage().data_ptr() for tensor in inputs}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


def test_keeps_its_inputs_alone(seed):
    x, weights, bias = make((2, 4, 5, 6), torch.float32, branches=2)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]
    assert saved(lambda: dwconv_gelu(x, weights[0], bias), leaves) == []
    assert saved(lambda: dwconv_dilated(x, weights, [1, 6]), leaves) == []
    assert saved(lambda: reference.dwconv_gelu(x, weights[0], bias), leaves) != []  # the hook does see


@pytest.mark.parametrize("dilation", [1, 6, 12, 18])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_half_precision_gradients_on_a_cpu(size, dilation, seed):
    """PyTorch's own are wrong for some of these: err 1.3 or NaN at 32 x 32 and dilation 6."""
    x, weights, _ = make((2, size, size, 32), torch.bfloat16)
    grad, results = torch.randn(x.shape).bfloat16(), []
    for dtype, module in ((torch.bfloat16, op), (torch.bfloat16, op), (torch.float64, reference)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, *weights)]
        (out,) = module.dwconv_dilated(leaves[0], leaves[1:], [dilation])
        results.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
        poison = [torch.full((1 << 20,), float("nan")) for _ in range(3)]  # what is handed out next
        del poison
    for first, second, exact in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.linalg.vector_norm(first.double() - exact) < 1e-2 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("strict", [False, True])
def test_two_runs_are_bitwise_equal(strict, seed):
    x, weights, bias = make((2, 9, 7, 5), torch.float32, branches=3)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]

    def once():
        outs = [dwconv_gelu(x, weights[0], bias), *dwconv_dilated(x, weights, [1, 6, 12])]
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]

    torch.use_deterministic_algorithms(strict)
    try:
        first, second = once(), once()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_casts_every_argument(seed):
    x, weights, bias = make((2, 4, 5, 6), torch.float32, branches=2)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outs = [dwconv_gelu(x.bfloat16(), weights[0], bias), *dwconv_dilated(x, weights, [1, 2])]
    assert all(out.dtype == torch.bfloat16 for out in outs)
    sum(out.float().sum() for out in outs).backward()
    assert x.grad.dtype == torch.float32


def test_opcheck(seed):
    x, weights, bias = make((1, 3, 4, 2), torch.float32, branches=2)
    ops = torch.ops.ssr_kernels
    torch.library.opcheck(ops.dwconv_gelu_forward, (x, weights[0], bias, "reference"))
    torch.library.opcheck(ops.dwconv_dilated_forward, (x, weights, [1, 2], "reference"))
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        torch.library.opcheck(ops.dwconv_gelu_backward, (x, x, weights[0], bias, wanted, "reference"))
        arguments = ([x, x], x, weights, [1, 2], wanted, "reference")
        torch.library.opcheck(ops.dwconv_dilated_backward, arguments)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_dilated_gradients_that_are_wanted(wanted, seed):
    x, weights, _ = make((1, 3, 3, 2), branches=2)
    leaves = [x, *weights]
    leaves[wanted].requires_grad_()
    first, _ = dwconv_dilated(*leaves[:1], leaves[1:], [1, 2])  # the second branch's result is not used
    (first if wanted < 2 else dwconv_dilated(x, weights, [1, 2])[1]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(3)]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_that_are_wanted(wanted, seed):
    x, (weight,), bias = make((1, 3, 3, 2))
    leaves = [x, weight, bias]
    leaves[wanted].requires_grad_()
    dwconv_gelu(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(3)]
    with torch.no_grad():
        assert not dwconv_gelu(*leaves).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_keeps_dtype_and_rows_and_aliases_nothing(dtype, seed):
    x, (weight,), bias = make((2, 4, 5, 6), dtype)
    for out in (dwconv_gelu(x, weight, bias), *dwconv_dilated(x, [weight], [2])):
        assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
        assert out.data_ptr() != x.data_ptr()


def test_non_contiguous_inputs(seed):
    x, (weight,), bias = make((2, 6, 8, 4))
    expected = dwconv_gelu(x[:, ::2, 1::3], weight.clone(), bias)
    nchw = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not nchw.is_contiguous()
    torch.testing.assert_close(dwconv_gelu(nchw, weight, bias), dwconv_gelu(x, weight, bias), rtol=1e-12, atol=1e-12)
    assert dwconv_gelu(nchw, weight, bias).is_contiguous()
    spread = torch.zeros(4, 1, 3, 6, dtype=torch.float64)
    spread[..., ::2] = weight
    strided = dwconv_gelu(x[:, ::2, 1::3], spread[..., ::2], bias)
    torch.testing.assert_close(strided, expected, rtol=1e-12, atol=1e-12)


def test_an_empty_batch(seed):
    x, (weight,), bias = make((0, 4, 4, 3))
    assert dwconv_gelu(x, weight, bias).shape == (0, 4, 4, 3)
    assert dwconv_dilated(x, [weight], [6])[0].shape == (0, 4, 4, 3)


def test_no_host_sync_forward_or_backward(seed):
    x, weights, bias = make((2, 4, 4, 3), torch.float32, branches=2)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]
    with NoHostSync():
        outs = [dwconv_gelu(x, weights[0], bias), *dwconv_dilated(x, weights, [1, 12])]
        torch.autograd.grad(sum(out.sum() for out in outs), leaves)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_in_one_graph_forward_and_backward(compiler, seed):
    x, weights, bias = make((2, 4, 4, 3), torch.float32, branches=2)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]

    def call(x, first, second, bias):
        return [dwconv_gelu(x, first, bias), *dwconv_dilated(x, [first, second], [1, 6])]

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        outs = function(*leaves)
        results.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_refusals_name_the_argument(seed):
    x, (weight,), bias = make((2, 4, 4, 3), torch.float32)
    with pytest.raises(ValueError, match=r"x must have the shape \[B, H, W, C\]"):
        dwconv_gelu(x[0], weight, bias)
    with pytest.raises(TypeError, match="x must be floating point"):
        dwconv_gelu(x.long(), weight, bias)
    with pytest.raises(TypeError, match="x must be a tensor"):
        dwconv_gelu(x.numpy(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must have the shape .* = \[3, 1, 3, 3\] \(it has \[3, 1, 5, 5\]"):
        dwconv_gelu(x, torch.randn(3, 1, 5, 5), bias)
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        dwconv_gelu(x, weight.double(), bias)
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        dwconv_gelu(x, weight.to("meta"), bias)
    with pytest.raises(ValueError, match="bias must have the shape"):
        dwconv_gelu(x, weight, bias[:2])
    with pytest.raises(ValueError, match=r"weights\[1\] must have the shape"):
        dwconv_dilated(x, [weight, weight[:2]], [1, 2])
    with pytest.raises(ValueError, match=r"dilations\[0\] must be >= 1"):
        dwconv_dilated(x, [weight], [0])
    with pytest.raises(ValueError, match="weights and dilations"):
        dwconv_dilated(x, [weight], [1, 2])
