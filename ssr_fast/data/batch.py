"""One step's samples, as every loader gives them and every method takes them.

B batch, H W pixels of the crop, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        source_image: uint8 [B, H, W, 3] RGB, or, of a loader that normalises, float32 [B, 3, H, W], channels-last in
            memory; B is 0 for a method without source data.
        source_label: uint8 [B, H, W], 255 ignored; likewise.
        target_image: as source_image.
        target_valid: bool [B, H, W], False where the crop lies outside the image.
        source_features: float32 [B, D, h, w], the frozen encoder's of the source images where they are kept: of the
            crops (cached_views), or crops of the whole images' (cached_full).
        target_features: float32 [B, D, h, w], crops of the features of the whole target images, where a store of them
            is read.
        source_places, target_places: float64 [B, h + w, 3], in place of these features, which tokens of the resident
            ones (data/residents.py) they are made of.
        target_segments: int32 [B, H, W], ids of the target's segments, each image's its own, where a method learns from
            them; 0 where there is no segment, and outside of the image.
    """

    source_image: Tensor
    source_label: Tensor
    target_image: Tensor
    target_valid: Tensor
    source_features: Tensor | None = None
    target_segments: Tensor | None = None
    target_features: Tensor | None = None
    source_places: Tensor | None = None
    target_places: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copies."""
        return self.each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: page-locked copies make `to` asynchronous."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        return replace(self, **{name: change(part) for name, part in self.parts().items()})

    def split(self, count: int) -> list["Batch"]:
        """The batch as `count` equal ones, in order.

        Raises:
            ValueError: its images cannot be shared evenly.
        """
        if count == 1:
            return [self]
        images = len(self.target_image)
        if images % count:
            raise ValueError(f"a batch of {images} images a domain cannot be split into {count} equal ones")
        shares = {name: part.chunk(count) if len(part) else [part] * count for name, part in self.parts().items()}
        return [replace(self, **{name: parts[share] for name, parts in shares.items()}) for share in range(count)]

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it has, by name."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


def batch_of(parts: Mapping[str, Tensor], crop: tuple[int, int]) -> Batch:
    """The batch of stacked views.

    Args:
        parts: by name as in Batch, features [B, h, w, D]; of the source nothing, or all.
        crop: (H, W).
    """
    whole = dict(parts)
    target = whole["target_image"]
    whole.setdefault("source_image", target[:0])
    whole.setdefault("source_label", torch.empty((0, *crop), dtype=torch.uint8))
    for name in ("source_features", "target_features"):
        if name in whole:
            whole[name] = whole[name].permute(0, 3, 1, 2)  # [B, D, h, w], channels-last in memory
    return Batch(**whole)
