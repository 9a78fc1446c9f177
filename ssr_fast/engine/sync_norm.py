"""Lets BatchNorm see the images of all ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from ssr_fast.engine.ranks import Ranks
from ssr_fast.models.heads import SplitBatchNorm2d
from ssr_fast.models.sync_norm import OverRanks


def synchronise_batchnorm(module: nn.Module, ranks: Ranks) -> int:
    """Make every BatchNorm in a module normalise by the statistics of all ranks, in training.

    Call it after the module's working copies are made, or for each; copies made later keep it.

    Args:
        module: nets, of student and teacher alike.
        ranks: of the default process group; a process alone stays as it is.

    Returns:
        how many there are.
    """
    found = [part for part in module.modules() if isinstance(part, SplitBatchNorm2d)]
    if ranks.world > 1:
        # a plain function: a deep copy of a net takes it over as it is, and does not copy a process group
        def mean(values: Tensor) -> Tensor:
            out: Tensor = _Mean.apply(values, ranks)
            return out

        for norm in found:
            norm.over_ranks = OverRanks(mean, ranks.world)
    return len(found)


class _Mean(torch.autograd.Function):
    """A tensor's mean over the ranks; all ranks' losses are differentiated by it, so the gradient's mean goes back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _mean(values, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _mean(grads[0], ctx.ranks), None


def _mean(values: Tensor, ranks: Ranks) -> Tensor:
    out = values.clone(memory_format=torch.contiguous_format)
    ranks.mean_(out)
    return out
