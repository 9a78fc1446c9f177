"""Upsample + weighted cross-entropy, and pseudo-labels, in plain PyTorch: the definition of the ops.

B batch, h w pixels of the logits, H W pixels of the labels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks


def segloss(logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """Weighted cross-entropy over ALL pixels of the upsampled logits, a scalar. See op.segloss."""
    b, height, width = labels.shape
    upsampled = _upsample(logits, height, width)  # [B, K, H, W]
    target = labels.long()
    # a label that is no class counts as ignored: on every device the same, and never an access out of bounds
    known = (target >= 0) & (target < logits.shape[3])
    target = torch.where(known, target, torch.full_like(target, ignore_index))
    losses = F.cross_entropy(upsampled, target, ignore_index=ignore_index, reduction="none")  # [B, H, W]
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
    return losses.sum() / max(b * height * width, 1)


def pseudo_label(logits: Tensor, size: tuple[int, int], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Class, probability of the class, and how many pixels reach the threshold. See op.pseudo_label."""
    with torch.no_grad():
        upsampled = _upsample(logits, *size)  # [B, K, H, W]
        labels = upsampled.argmax(dim=1).to(torch.uint8)  # [B, H, W]
        confidence = (upsampled.amax(dim=1) - upsampled.logsumexp(dim=1)).exp().float()  # [B, H, W]
        return labels, confidence, (confidence >= threshold).sum()


def _upsample(logits: Tensor, height: int, width: int) -> Tensor:
    """[B, h, w, K] -> [B, K, H, W], bilinear, align_corners False, float32 (float64 stays)."""
    maps = logits.to(checks.accumulation_dtype(logits)).permute(0, 3, 1, 2)  # [B, K, h, w]
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
