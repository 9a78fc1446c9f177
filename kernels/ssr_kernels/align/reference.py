"""Projection + cosine alignment of student stages with a frozen target in plain PyTorch: the definition of the op.

B batch, h w feature pixels of a stage, C its channels, hs ws D grid and channels of the target.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

EPS = 1e-8
"""Lower bound of either norm, that of torch.nn.functional.cosine_similarity."""


def align_stages(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    stage_weights: Sequence[float],
) -> Tensor:
    """Weighted sum of the stages' losses, a scalar. See op.align_stages."""
    masks = [None] * len(features) if valid is None else valid
    losses = [
        _stage(x, weight, bias, target.detach(), mask) * share
        for x, weight, bias, mask, share in zip(features, weights, biases, masks, stage_weights, strict=True)
    ]
    return torch.stack(losses).sum()


def _stage(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, valid: Tensor | None) -> Tensor:
    """sum valid (1 - cos(x W^T + b, target resampled)) / sum valid: a scalar, 0 where nothing is valid."""
    dtype = checks.accumulation_dtype(x)
    p = F.linear(x, weight, bias).to(dtype)  # [B, h, w, D]
    t = resample(target.to(dtype), x.shape[1], x.shape[2])  # [B, h, w, D]
    norms = torch.linalg.vector_norm(p, dim=3).clamp_min(EPS) * torch.linalg.vector_norm(t, dim=3).clamp_min(EPS)
    distance = 1 - (p * t).sum(dim=3) / norms  # [B, h, w]
    if valid is None:
        return distance.mean()
    mask = valid.detach().to(dtype)
    total = mask.sum()
    # where there is nothing to align the sum above is 0 too: divide by 1, not by 0
    return (distance * mask).sum() / torch.where(total > 0, total, torch.ones_like(total))


def resample(target: Tensor, h: int, w: int) -> Tensor:
    """[B, hs, ws, D] -> [B, h, w, D], bilinear, align_corners False (target itself where the grids are the same)."""
    if target.shape[1:3] == (h, w):
        return target
    maps = F.interpolate(target.permute(0, 3, 1, 2), size=(h, w), mode="bilinear", align_corners=False)  # [B, D, h, w]
    return maps.permute(0, 2, 3, 1)  # [B, h, w, D]
