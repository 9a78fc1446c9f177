"""The segmentation loss, its gradient and pseudo-labels in closed form, in PyTorch: what the backend "reference" runs.

Pixels are taken in chunks, so that no tensor of B*K*H*W numbers exists. lse of each pixel is kept for the backward
pass, which computes the upsampled logits again.

B batch, h w pixels of the logits, H W pixels of the labels, K classes; u the upsampled logits, lse = log sum_k exp u_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

CHUNK = 131072
"""Label pixels of which the upsampled logits exist at a time: 4 bytes x CHUNK x K, and some temporary ones."""

Part = tuple[slice, slice]
"""The images and the rows of a chunk."""


@dataclass(frozen=True)
class Upsampling:
    """Bilinear upsampling (align_corners False) in two steps: rows by their taps, columns as F.interpolate."""

    maps: Tensor  # [B, K, h, w]
    low: Tensor  # [H]
    upper: Tensor  # [H]
    width: int

    @classmethod
    def of(cls, logits: Tensor, height: int, width: int) -> "Upsampling":
        """Upsampling of logits [B, h, w, K] to height x width, in the accumulation dtype."""
        maps = logits.to(checks.accumulation_dtype(logits)).permute(0, 3, 1, 2).contiguous()
        return cls(maps, *taps(height, maps.shape[2], maps), width)

    def chunk(self, images: slice, rows: slice) -> Tensor:
        """u of a chunk, [images, K, rows, W]."""
        maps, low = self.maps[images], self.low[rows]
        above, below = maps.index_select(2, low), maps.index_select(2, (low + 1).clamp_max(maps.shape[2] - 1))
        tall = torch.lerp(above, below, self.upper[rows, None])  # [images, K, rows, w]
        return F.interpolate(tall, size=(tall.shape[2], self.width), mode="bilinear", align_corners=False)


def forward(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Loss and lse.

    Args:
        logits: [B, h, w, K].
        labels: [B, H, W]; what is no class counts as ignored.
        weights: [B, H, W] or None.
        ignore_index: label of a pixel without a class.
        chunk: label pixels whose upsampled logits exist at a time.

    Returns:
        loss: scalar in the accumulation dtype.
        lse: [B, H, W].
    """
    up = Upsampling.of(logits, *labels.shape[1:])
    lse = up.maps.new_empty(labels.shape)
    loss = up.maps.new_zeros(())
    for part in chunks(labels.shape, chunk):
        target, factor = targets(labels, weights, ignore_index, logits.shape[3], part, lse.dtype)
        u = up.chunk(*part)
        highest = u.amax(dim=1)
        below = highest - u.gather(1, target)[:, 0]
        total = u.sub_(highest[:, None]).exp_().sum(dim=1).log_()
        lse[part] = highest + total
        loss += (factor * (below + total)).sum()
    return loss / max(labels.numel(), 1), lse


def backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    chunk: int = CHUNK,
) -> Tensor:
    """Gradient of the logits, [B, h, w, K] in their dtype: the adjoint of the upsampling of that of u.

    That of u is factor * grad / (B*H*W) * (exp(u - lse) - [class is the label]).

    Args:
        grad: scalar, gradient of the loss.
        logits, labels, weights, ignore_index, chunk: as in forward.
        lse: forward's.
    """
    up = Upsampling.of(logits, *labels.shape[1:])
    rows = resampling_matrix(up.low, up.upper, logits.shape[1])  # [H, h]
    columns = resampling_matrix(*taps(up.width, logits.shape[2], lse), logits.shape[2])  # [W, w]
    gradient = torch.zeros_like(up.maps)
    share = grad.to(lse.dtype) / max(labels.numel(), 1)
    for part in chunks(labels.shape, chunk):
        target, factor = targets(labels, weights, ignore_index, logits.shape[3], part, lse.dtype)
        d = up.chunk(*part).sub_(lse[part][:, None]).exp_()
        d.scatter_(1, target, d.gather(1, target) - 1)
        d *= (factor * share)[:, None]
        gradient[part[0]] += rows[part[1]].t() @ (d @ columns)
    result = logits.new_empty(logits.shape)  # dense, whatever the strides of the logits
    return result.copy_(gradient.permute(0, 2, 3, 1))


def pseudo_label(
    logits: Tensor, height: int, width: int, threshold: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Class uint8 [B, H, W], its probability float32 [B, H, W], and how many pixels reach the threshold, int64."""
    up = Upsampling.of(logits, height, width)
    labels = logits.new_empty((len(logits), height, width), dtype=torch.uint8)
    confidence = logits.new_empty(labels.shape, dtype=torch.float32)
    for part in chunks(labels.shape, chunk):
        u = up.chunk(*part)
        highest, classes = u.max(dim=1)  # the first of equal ones
        labels[part] = classes.to(torch.uint8)
        confidence[part] = 1 / u.sub_(highest[:, None]).exp_().sum(dim=1).to(torch.float32)
    return labels, confidence, (confidence >= threshold).sum()


def chunks(shape: torch.Size, chunk: int) -> Iterator[Part]:
    """Images and rows of [B, H, W] in parts of at most `chunk` pixels and half of them all, but whole rows."""
    batch, height, width = shape
    chunk = min(chunk, ceil(shape.numel() / 2))
    rows = min(height, max(1, chunk // max(width, 1)))
    images = max(1, chunk // max(rows * width, 1))
    for image in range(0, batch, images):
        for row in range(0, height, max(rows, 1)):
            yield slice(image, image + images), slice(row, row + rows)


def targets(
    labels: Tensor, weights: Tensor | None, ignore_index: int, classes: int, part: Part, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A class for each pixel, [images, 1, rows, W] int64, and its weight [images, rows, W]: 0 without a class."""
    label = labels[part].to(torch.int64)
    target = label.clamp(0, classes - 1)
    known = (target == label) & (label != ignore_index)
    factor = known.to(dtype) if weights is None else torch.where(known, weights[part].to(dtype), 0.0)
    return target[:, None], factor


def taps(fine: int, coarse: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower of the two pixels and weight of the upper one, [fine] each, as ATen has them; 0 where there is no upper."""
    position = (torch.arange(fine, dtype=like.dtype, device=like.device) + 0.5) * (coarse / fine) - 0.5
    position = position.clamp_min(0)
    low = position.floor().clamp_max(coarse - 1)
    return low.long(), torch.where(low < coarse - 1, position - low, 0.0)


def resampling_matrix(low: Tensor, upper: Tensor, coarse: int) -> Tensor:
    """[fine, coarse]: the weights of the `coarse` pixels in each of the fine ones, from their taps."""
    columns = torch.arange(coarse, device=low.device)
    return (columns == low[:, None]) * (1 - upper[:, None]) + (columns == low[:, None] + 1) * upper[:, None]
