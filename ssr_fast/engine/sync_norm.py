"""Lets BatchNorm see the images of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
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
        for norm in found:
            norm.over_ranks = OverRanks(mean_over_ranks, ranks.world)
    return len(found)


def mean_over_ranks(values: Tensor) -> Tensor:
    """A tensor's mean over the ranks of the default group. The gradient's mean over them goes back: the loss that is
    differentiated is the sum of all ranks' losses."""
    out: Tensor = _mean(values)
    return out


# an operator, which torch.compile takes as it is: it traces an autograd.Function with a collective, and gives other
# gradients without a word (PyTorch 2.11)
@torch.library.custom_op("ssr_fast::mean_over_ranks", mutates_args=())
def _mean(values: Tensor) -> Tensor:
    out = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out)
    return out.div_(dist.get_world_size())


@_mean.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return mean_over_ranks(grad)


_mean.register_autograd(_backward)
