"""What segments say: which pixels of a step are contrasted, and which class a segment is. Sync-free, fixed shapes.

B images, H W pixels, h w feature pixels, N = h w, S segments an image, A pixels a segment, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_kernels.contrast import Samples

IDS = 65536  # of a segment map: 1 .. IDS - 1, 0 for no segment


@dataclass(frozen=True)
class Vote:
    """The classes of the segments that were sampled.

    Attributes:
        klass: int64 [B, S], the majority class, -1 where there is none that is sure enough.
        segment: int64 [B, S], the segments' ids, 0 for none.
    """

    klass: Tensor
    segment: Tensor

    def paint(self, segments: Tensor) -> Tensor:
        """segments integer [B, H, W] -> int64 [B, H, W], the class of each pixel's segment, -1 where none is sure."""
        return _look_up(self.segment, self.klass, segments, -1)


def at_stride(segments: Tensor, size: tuple[int, int]) -> Tensor:
    """The ids [B, H, W] under the centres of a coarser grid's pixels -> [B, h, w]; nearest, as labels are resized."""
    height, width = segments.shape[1:]
    y = ((torch.arange(size[0], device=segments.device) * 2 + 1) * height) // (2 * size[0])
    x = ((torch.arange(size[1], device=segments.device) * 2 + 1) * width) // (2 * size[1])
    return segments.index_select(1, y).index_select(2, x)


def vote(samples: Samples, segments: Tensor, labels: Tensor, sure: Tensor, class_count: int, share: float) -> Vote:
    """The class that at least `share` of a segment's pixels have and are sure of.

    Args:
        samples: what sample_pairs has drawn of `segments`; only these segments vote.
        segments: integer [B, h, w].
        labels: int64 [B, h, w], class of each pixel.
        sure: bool [B, h, w], whether it counts.
        class_count: K.
        share: of all pixels of the segment, above 0.5 for a majority that is one.

    Returns:
        Vote.
    """
    segment = samples.segment.to(torch.int64)
    slots = segment.shape[1]
    number = torch.arange(slots, device=segment.device)
    rank = _look_up(segment, number.expand_as(segment), segments, -1).flatten(1)  # [B, N]
    members = (rank[:, :, None] == number).to(torch.float32)  # [B, N, S]
    classes = torch.arange(class_count, device=segment.device)
    votes = ((labels.flatten(1)[:, :, None] == classes) & sure.flatten(1)[:, :, None]).to(torch.float32)  # [B, N, K]
    counts = members.transpose(1, 2) @ votes  # [B, S, K]; whole numbers, exact in float32 below 2^24
    most, klass = counts.max(2)
    enough = (most >= share * members.sum(1)) & (most > 0)
    return Vote(torch.where(enough, klass, -1), segment)


def groups(samples: Samples) -> Tensor:
    """int64 [B, S, A]: a number for each sampled segment of the batch, -1 for what is no pixel."""
    batch, slots, _ = samples.pixel.shape
    number = torch.arange(batch * slots, device=samples.pixel.device).view(batch, slots, 1)
    return torch.where(samples.pixel >= 0, number, -1)


def gather_rows(feature: Tensor, index: Tensor) -> Tensor:
    """The sampled pixels of a feature map.

    Args:
        feature: [B, C, h, w].
        index: int64 [B, S, A] numbers y w + x; -1 gives the row of pixel 0, to be left out by its group.

    Returns:
        [B S A, C].
    """
    flat = feature.flatten(2).transpose(1, 2)  # [B, N, C]
    places = index.clamp(min=0).flatten(1)[:, :, None].expand(-1, -1, flat.shape[2])
    return flat.gather(1, places).flatten(0, 1)


def _look_up(keys: Tensor, values: Tensor, segments: Tensor, default: int) -> Tensor:
    """values [B, S] of the segments whose keys [B, S] are given (0: none) at each pixel of segments [B, H, W]."""
    table = torch.full((keys.shape[0], IDS), default, dtype=torch.int64, device=keys.device)
    table.scatter_(1, keys, torch.where(keys > 0, values, default))  # several zeros write the same number
    return table.gather(1, segments.flatten(1).to(torch.int64)).view(segments.shape)
