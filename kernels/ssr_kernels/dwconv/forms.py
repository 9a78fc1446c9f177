"""The convolutions and their gradients in PyTorch: what the backend "reference" runs.

The forward pass keeps its input alone; what lies before the GELU is computed again for the gradient.
B batch, H W pixels, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

gelu_forward, dilated_forward = reference.dwconv_gelu, reference.dwconv_dilated


def gelu_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of x, weight and bias, those that are wanted.

    Args:
        grad: [B, H, W, C], of the result.
        x, weight, bias: as in op.dwconv_gelu.
        wanted: for each of the three.
    """
    z = reference.depthwise(x, weight, bias, dilation=1)
    dz = torch.ops.aten.gelu_backward(grad, z)
    return _convolution_backward(dz, x, weight, 1, wanted)


def dilated_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x and of each branch's weight, those that are wanted.

    Args:
        grads: [B, H, W, C] for each branch, of its result.
        x, weights, dilations: as in op.dwconv_dilated.
        wanted: for x, and for each weight.
    """
    dx: Tensor | None = None
    dws: list[Tensor] = []
    for grad, weight, dilation, wants_weight in zip(grads, weights, dilations, wanted[1:], strict=True):
        found = iter(_convolution_backward(grad, x, weight, dilation, (wanted[0], wants_weight, False)))
        if wanted[0]:
            part = next(found)
            dx = part if dx is None else dx.add_(part)
        dws += found
    return [*([] if dx is None else [dx]), *dws]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x [B, H, W, C], weight [C, 1, 3, 3] and bias [C], those that are wanted."""
    if dilation > 1 and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # PyTorch 2.11 on a CPU: the weight's gradient of a dilated depthwise convolution holds uninitialised memory
        found = _convolution_backward(grad.float(), x.float(), weight.float(), dilation, wanted)
        return [gradient.to(x.dtype) for gradient in found]
    channels, both = x.shape[3], (dilation, dilation)
    found = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [channels], (1, 1), both, both, False, (0, 0),
        channels, list(wanted),
    )  # fmt: skip
    dx, *rest = found
    results = [dx.permute(0, 2, 3, 1).contiguous()] if wanted[0] else []
    return results + [t.contiguous() for t, flag in zip(rest, wanted[1:], strict=True) if flag]
