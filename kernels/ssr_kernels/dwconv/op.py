"""Depthwise 3x3 convolutions of channels-last maps: MiT's Mix-FFN (bias and GELU) and the head's dilated branches.

B batch, H W pixels, C channels.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..registry import Op
from .backends import DILATED_BACKENDS, GELU_BACKENDS

GELU = Op("dwconv_gelu", GELU_BACKENDS)
DILATED = Op("dwconv_dilated", DILATED_BACKENDS)


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Depthwise 3x3 convolution (zero padding 1) + bias + exact GELU.

    Nothing but the arguments is kept for the backward pass, which is not differentiable itself. Under torch.autocast
    all arguments are cast to its dtype; sums are float32.

    Args:
        x: [B, H, W, C], floating point, any strides (contiguous is the fast case).
        weight: [C, 1, 3, 3], x's dtype.
        bias: [C], x's dtype.
        backend: see registry.Op.choose.

    Returns:
        [B, H, W, C], contiguous, x's dtype.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    _check_map(x)
    x, weight, bias = _autocast(x, weight, bias)
    _check_weight("weight", weight, x)
    checks.shape("bias", bias, "[C]", (x.shape[3],))
    checks.same_dtype("bias", bias, "x", x)
    checks.same_device("bias", bias, "x", x)
    out: Tensor = GELU.choose(backend, (x, weight, bias)).run(x, weight, bias)
    return out


def dwconv_dilated(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], *, backend: str | None = None
) -> list[Tensor]:
    """Several dilated depthwise 3x3 convolutions of one input, without bias; zero padding = dilation keeps the size.

    For the backward pass and torch.autocast see dwconv_gelu.

    Args:
        x: [B, H, W, C], floating point, any strides (contiguous is the fast case).
        weights: one [C, 1, 3, 3] a branch, x's dtype.
        dilations: one number >= 1 a branch.
        backend: see registry.Op.choose.

    Returns:
        one [B, H, W, C] a branch, contiguous, x's dtype.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    _check_map(x)
    x, *weights = _autocast(x, *weights)
    if len(weights) != len(dilations):
        raise ValueError(f"weights and dilations must be as many (they are {len(weights)} and {len(dilations)})")
    for index, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        _check_weight(f"weights[{index}]", weight, x)
        if dilation < 1:
            raise ValueError(f"dilations[{index}] must be >= 1 (it is {dilation})")
    outs: list[Tensor] = DILATED.choose(backend, (x, *weights)).run(x, weights, dilations)
    return outs


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where it is on."""
    dtype = checks.autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _check_map(x: Tensor) -> None:
    checks.shape("x", x, "[B, H, W, C]", (None, None, None, None))
    checks.floating("x", x)


def _check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    checks.shape(name, weight, "[C, 1, 3, 3]", (x.shape[3], 1, 3, 3))
    checks.same_dtype(name, weight, "x", x)
    checks.same_device(name, weight, "x", x)
