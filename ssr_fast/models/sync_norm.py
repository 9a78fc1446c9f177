"""BatchNorm in training whose statistics are those of all ranks' images, in plain differentiable operators.

S splits, B batch, C channels, h w feature pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OverRanks:
    """How the ranks average.

    Attributes:
        mean: a tensor's mean over the ranks, as new memory, differentiable; every rank must call it as often, with the
            same shapes in the same order, in the forward and in the backward pass.
        world: the number of ranks.
    """

    mean: Callable[[Tensor], Tensor]
    world: int


def sync_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    momentum: float,
    eps: float,
    splits: int,
    ranks: OverRanks,
) -> Tensor:
    """Batch norm in training over the images of all ranks, which are of the same shape on each.

    Two collectives of [S, C] numbers forward, and two backward where x is differentiated.

    Args:
        x: [B, C, h, w]; statistics are computed in float32 where it is of lower precision.
        weight, bias: [C].
        running: mean and variance [C], moved in place by each part in turn.
        momentum: by how much.
        eps: added to the variance.
        splits: equal parts of the batch, each with statistics of its own.
        ranks: who else has a part of the batch.

    Returns:
        [B, C, h, w] of x's type.
    """
    parts = x.unflatten(0, (splits, x.shape[0] // splits))  # [S, B / S, C, h, w]
    parts = parts.to(torch.promote_types(x.dtype, torch.float32))
    own_variance, own_mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0)  # [S, C]
    mean = ranks.mean(own_mean)
    variance = ranks.mean(own_variance + (own_mean - mean).square())
    _move(running, mean.detach(), variance.detach(), momentum, ranks.world * x.numel() // own_mean.numel())
    scale = weight * (variance + eps).rsqrt()  # [S, C]
    out = (parts - _beside(mean)) * _beside(scale) + _beside(bias.expand_as(scale))
    return out.to(x.dtype).flatten(0, 1)


def _beside(values: Tensor) -> Tensor:
    """[S, C] -> [S, 1, C, 1, 1]."""
    return values[:, None, :, None, None]


@torch.no_grad()
def _move(running: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, momentum: float, count: int) -> None:
    """Towards the mean and the unbiased variance of each part, whose channels have `count` values on all ranks."""
    unbiased = variance * (count / (count - 1))
    for statistic, values in zip(running, (mean, unbiased), strict=True):
        for part in values:
            statistic.mul_(1.0 - momentum).add_(part, alpha=momentum)
