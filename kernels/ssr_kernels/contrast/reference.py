"""Multi-positive InfoNCE over rows in plain PyTorch, all pairs at once: the definition of the op.

n rows, D their width.
"""

import torch
from torch import Tensor

from .. import checks

EPS = 1e-12
"""A row whose norm is at most this has no direction: it counts as the vector 0 and gets no gradient."""


def contrast_loss(embedding: Tensor, group: Tensor, klass: Tensor, temperature: float) -> Tensor:
    """Mean over the counted rows of lse_i - mean over positives of s_ip, a scalar. See loss.contrast_loss."""
    e = directions(embedding.to(checks.accumulation_dtype(embedding)))  # [n, D]
    s = e @ e.t() / temperature  # [n, n]
    positive, negative = pairs(group, klass)
    positives = positive.sum(dim=1)
    counted = (positives > 0) & negative.any(dim=1)
    # a row that does not count has perhaps nothing to sum over: zeros keep its lse and gradient finite
    paired = torch.where(positive | negative, s, -torch.inf)
    lse = torch.where(counted[:, None], paired, 0.0).logsumexp(dim=1)
    mean = torch.where(positive, s, 0.0).sum(dim=1) / positives.clamp_min(1)
    return torch.where(counted, lse - mean, 0.0).sum() / counted.sum().clamp_min(1)


def directions(x: Tensor) -> Tensor:
    """x / |x| of each row [n, D]; 0, with zero gradient, where |x| <= EPS."""
    squares = (x * x).sum(dim=1, keepdim=True)
    short = squares <= EPS * EPS  # false for NaN, which stays NaN
    return torch.where(short, 0.0, x) / torch.where(short, 1.0, squares).sqrt()


def pairs(group: Tensor, klass: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows j are positive and which negative to row i, [n, n] bool each."""
    present, known = group >= 0, klass >= 0
    other = ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    may = other & present[:, None] & present
    same_group = group[:, None] == group
    both_known, same_class = known[:, None] & known, klass[:, None] == klass
    positive = same_group | (both_known & same_class)
    negative = both_known & ~same_class & ~same_group
    return may & positive, may & negative
