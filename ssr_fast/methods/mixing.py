"""ClassMix: half of the classes of each source image are pasted onto a target image. Sync-free, counter-based.

B batch, H W pixels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssr_kernels import counter


def class_masks(labels: Tensor, class_count: int, key: Tensor) -> Tensor:
    """Draw ceil(half) of the classes present in each image and return where they are.

    Args:
        labels: uint8 [B, H, W]; values from class_count on (ignored pixels) are never drawn.
        class_count: K.
        key: int64 scalar tensor, the draw's key.

    Returns:
        bool [B, H, W].
    """
    flat = labels.flatten(1).to(torch.int64)  # [B, H*W]
    present = torch.zeros(labels.shape[0], 256, device=labels.device).scatter_(1, flat, 1.0)
    present[:, class_count:] = 0.0
    score = torch.where(present > 0, counter.uniform(key, 0, present.shape), 2.0)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)  # absent classes come last
    chosen = (rank < (present.sum(1, keepdim=True) / 2).ceil()) & (present > 0)  # [B, 256]
    return chosen.gather(1, flat).view(labels.shape)


def paste(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Source where mask [B, H, W], else target: both [B, H, W] or [B, C, H, W]."""
    return torch.where(mask if source.ndim == 3 else mask[:, None], source, target)


def compose(mask: Tensor | None, source: Tensor, target: Tensor) -> Tensor:
    """Stored features for a mixed image: an approximation of what the encoder would make of it, which it never saw.

    Each token is source and target in the shares that the mask has of its area. The encoder itself would see the pasted
    parts beside their new neighbours, and the strong augmentation.

    Args:
        mask: bool [B, H, W], where the source is pasted; None where nothing is.
        source, target: features [B, D, h, w].
    """
    if mask is None:
        return target
    share = F.adaptive_avg_pool2d(mask[:, None].to(source.dtype), (source.shape[2], source.shape[3]))  # [B, 1, h, w]
    return share * source + (1 - share) * target
