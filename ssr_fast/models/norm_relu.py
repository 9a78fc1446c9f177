"""BatchNorm and ReLU in training, of which only the input is kept for the backward pass.

What comes out is computed again there, bit-equal: two reads and a write of a map, and a read and a write for the ReLU
where a pointwise convolution follows, for a map less that is held. That convolution is taken in, as it would keep the
map for itself.

B batch, C channels, E channels of the convolution, h w feature pixels.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    momentum: float,
    eps: float,
    splits: int = 1,
    mixer: Tensor | None = None,
) -> Tensor:
    """relu(batch_norm(x)) in training, or the 1x1 convolution of it; it cannot be differentiated twice.

    Args:
        x: [B, C, h, w], dense in channels-last or contiguous memory.
        weight, bias: [C].
        running: mean and variance [C], moved in place by each part in turn.
        momentum: by how much.
        eps: added to the variance.
        splits: equal parts of the batch, each with statistics of its own.
        mixer: [E, C, 1, 1], the convolution's weight.

    Returns:
        [B, C, h, w], or [B, E, h, w].
    """
    out: Tensor = _NormRelu.apply(x, weight, bias, *running, momentum, eps, splits, mixer)
    return out


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        momentum: float,
        eps: float,
        splits: int,
        mixer: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mixer)
        ctx.eps, ctx.splits = eps, splits
        y, _ = _normalised(x, weight, bias, (mean, variance), momentum, eps, splits)
        y.relu_()
        return y if mixer is None else torch.conv2d(y, mixer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mixer = ctx.saved_tensors
        y, statistics = _normalised(x, weight, bias, (None, None), 0.0, ctx.eps, ctx.splits)
        grad, mixer_grad = grads[0], None
        if mixer is not None:
            y.relu_()
            wanted = [True, ctx.needs_input_grad[8], False]
            stride, padding, dilation, transposed, groups = [1, 1], [0, 0], [1, 1], False, 1
            how = (stride, padding, dilation, transposed, padding, groups)
            grad, mixer_grad, _ = aten.convolution_backward(grad, y, mixer, None, *how, wanted)
        grad = aten.threshold_backward(grad, y, 0)
        parts = [
            aten.native_batch_norm_backward(g, part, weight, None, None, *moments, True, ctx.eps, [True, True, True])
            for g, part, moments in zip(grad.chunk(ctx.splits), x.chunk(ctx.splits), statistics, strict=True)
        ]
        inputs, weights, biases = zip(*parts, strict=True)
        total = inputs[0] if ctx.splits == 1 else torch.cat(inputs)
        return (total, sum(weights[1:], weights[0]), sum(biases[1:], biases[0]), *[None] * 5, mixer_grad)


def _normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    splits: int,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """batch_norm(x) in new memory, and mean and inverse deviation of each part."""
    y = torch.empty_like(x)
    statistics = []
    for part, out in zip(x.chunk(splits), y.chunk(splits), strict=True):
        moments = (weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1]))
        into = {"out": out, "save_mean": moments[0], "save_invstd": moments[1]}
        aten.native_batch_norm.out(part, weight, bias, *running, True, momentum, eps, **into)
        statistics.append(moments)
    return y, statistics
