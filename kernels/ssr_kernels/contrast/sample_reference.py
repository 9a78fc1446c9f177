"""The definition of sample_pairs in PyTorch: fixed shapes, no synchronisation, the same bits on every device.

B images, N pixels of each, K segments an image, A pixels a segment.
"""

import torch
from torch import Tensor

from .. import counter

IDS = 65536
"""A segment's id lies in 1 .. IDS - 1 (kIds of csrc/contrast.h)."""
DRAW_BITS = 22
"""Bits of a pixel's draw (kDrawBits)."""


def sample_pairs(ids: Tensor, key: Tensor, segments: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See sampling.sample_pairs; `ids` is int32 [B, N]."""
    batch, pixels = ids.shape
    device = ids.device
    known = torch.where((ids > 0) & (ids < IDS), ids, 0).to(torch.int64)  # [B, N]
    sizes = torch.zeros(batch, IDS, dtype=torch.int64, device=device).scatter_add_(1, known, torch.ones_like(known))
    sizes[:, 0] = 0
    size, chosen = sizes.sort(dim=1, descending=True, stable=True)  # of equal sizes the lower id first
    size, chosen = size[:, :segments], chosen[:, :segments]  # [B, K]
    rank = torch.where(size > 0, torch.arange(segments, device=device), segments)
    ranks = torch.full((batch, IDS), segments, device=device).scatter_(1, chosen, rank)
    order = _in_order(ranks.gather(1, known), key)  # [B, N] pixels, those of rank 0 first
    place = torch.arange(samples, device=device)
    start = (size.cumsum(1) - size)[:, :, None]  # [B, K, 1]
    inside = place < size[:, :, None]  # [B, K, A]
    if pixels == 0:
        index = torch.full(inside.shape, -1, device=device)
    else:
        where = torch.where(inside, start + place, 0)
        index = torch.where(inside, order.gather(1, where.flatten(1)).view(where.shape), -1)
    segment = torch.where(size > 0, chosen, 0).to(torch.int32)
    dropped = ((sizes > 0).sum(1) - segments).clamp(min=0).to(torch.int32)
    return index, segment, size.clamp(max=samples).to(torch.int32), dropped


def _in_order(rank: Tensor, key: Tensor) -> Tensor:
    """Numbers of the pixels of each image [B, N] in order of (rank, draw, pixel)."""
    batch, pixels = rank.shape
    image_key = counter.fold(key, torch.arange(batch, device=rank.device))  # [B]
    draw = counter.bits(image_key[:, None], pixels) >> (32 - DRAW_BITS)  # [B, N]
    return (rank << DRAW_BITS | draw).sort(dim=1, stable=True).indices
