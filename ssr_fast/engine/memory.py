"""What to lower, and by how much, when a training step does not fit into the GPU's memory.

A step's own bytes (activations, what the backward pass keeps) grow with the images of a micro-batch; weights, optimiser
and teacher are there before it. So two readings of the memory say how many images would have fitted.
"""

import math
import re
from dataclasses import dataclass

import torch

from ssr_fast.errors import UserError

GIB = 2**30
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
_REQUEST = re.compile(r"Tried to allocate ([0-9.]+) (bytes|[KMGT]iB)")
_CROP_STEP = 32
"""Pixels: the coarsest stride of the backbone, of which a crop should be a multiple."""
_WORTH_SAYING = 0.05
"""Share of the GPU that others must hold to be mentioned; CUDA itself always holds some hundred MiB."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """A GPU's memory when a step failed for want of it; all in bytes."""

    capacity: int
    """Of the whole GPU."""
    resident: int
    """What PyTorch held at the step's beginning: weights, optimiser, teacher, frozen nets."""
    peak: int
    """The most that PyTorch held until the step failed."""
    requested: int = 0
    """What could not be allocated; 0 if it is not known."""
    others: int = 0
    """What is held outside of PyTorch's allocator: other processes, CUDA, NCCL, DALI."""

    @classmethod
    def read(cls, error: BaseException, device: torch.device, resident: int) -> "MemoryUse":
        """The readings of a GPU, as soon as `error` was caught.

        Args:
            error: the torch.OutOfMemoryError.
            device: the GPU.
            resident: torch.cuda.memory_allocated(device) when the step began, where the peak was reset too
                (torch.cuda.reset_peak_memory_stats), so that it is a training step's.
        """
        free, capacity = torch.cuda.mem_get_info(device)
        others = max(0, capacity - free - torch.cuda.memory_reserved(device))
        peak = torch.cuda.max_memory_allocated(device)
        return cls(capacity=capacity, resident=resident, peak=peak, requested=requested_bytes(error), others=others)

    @property
    def need(self) -> int:
        """The step needed at least this much; it may have asked for more later."""
        return self.peak + self.requested

    @property
    def room(self) -> int:
        """What a step can use for itself; not above 0 if what is there before it leaves nothing."""
        return self.capacity - self.resident - self.others

    def share(self) -> float | None:
        """At most this part of the step's own bytes fits, in [0, 1]; None if the readings do not say."""
        own = self.need - self.resident
        return min(1.0, max(0, self.room) / own) if own > 0 else None


def begin_measuring(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU as a step begins, from which its peak is measured; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def requested_bytes(error: BaseException) -> int:
    """Bytes that could not be allocated, from PyTorch's message; 0 if it does not say."""
    found = _REQUEST.search(str(error))
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def largest_batch(used: MemoryUse, batch_size: int) -> int | None:
    """The most images a domain that can fit, below `batch_size`, which did not; 0 for none, None if unknown."""
    share = used.share()
    return None if share is None else min(batch_size - 1, math.floor(batch_size * share))


def split(batch_size: int, fits: int) -> int:
    """The largest part of a batch, not above `fits` >= 1, of which a whole number makes the batch."""
    return next(part for part in range(min(fits, batch_size), 0, -1) if batch_size % part == 0)


def smaller_crop(crop: tuple[int, int], share: float) -> tuple[int, int] | None:
    """The largest crop of about these proportions with at most `share` of the area, in whole steps; None if there is
    none.

    Args:
        crop: height and width in pixels.
        share: below 1, or the crop is lowered by one step all the same.
    """
    scale = math.sqrt(share)
    sides = [min(int(side * scale), side - 1) // _CROP_STEP * _CROP_STEP for side in crop]
    return (sides[0], sides[1]) if min(sides) > 0 else None


def out_of_memory(
    error: BaseException,
    *,
    used: MemoryUse,
    batch_size: int,
    accumulate: int,
    crop: tuple[int, int],
    recompute: bool,
    where: str,
) -> UserError:
    """One sentence on what to lower and by how much; `error` is its cause.

    Args:
        error: the torch.OutOfMemoryError that came out of a training step.
        used: the GPU's memory then.
        batch_size: images a domain of a micro-batch, --data.batch_size.
        accumulate: micro-batches of a step, --optim.accumulate.
        crop: height and width in pixels, --data.crop.
        recompute: --run.recompute_blocks.
        where: the step and the device, such as "step 12 on cuda:3".
    """
    others = used.others > _WORTH_SAYING * used.capacity
    held = f"{_gib(used.resident)} before the step"
    held += f", {_gib(used.others)} held by other processes or libraries" if others else ""
    need = max(used.need, used.resident)
    cures = ["end the other processes on this GPU (nvidia-smi shows them)"] if others else []
    if used.room <= 0:
        cures += ["shard the student (--parallel.mode fsdp)", "take a smaller --model.backbone"]
        cures[0] = f"no batch fits beside that: {cures[0]}"
    else:
        if used.requested and used.need + used.others <= used.capacity:
            cures.append("set PYTORCH_ALLOC_CONF=expandable_segments:True, as the free memory is in pieces")
        cures += _cures(used, batch_size, accumulate, crop, recompute)
    text = f"out of memory in {where}, at least {_gib(need)} of the GPU's {_gib(used.capacity)} needed ({held}): "
    made = UserError(text + ", or ".join(cures))
    made.__cause__ = error
    return made


def _cures(used: MemoryUse, batch_size: int, accumulate: int, crop: tuple[int, int], recompute: bool) -> list[str]:
    """What to lower, the mildest first; empty if nothing of it is left to lower."""
    cures = []
    share, fits = used.share(), largest_batch(used, batch_size)
    if batch_size > 1:
        if fits is None:
            why = "how much an image takes is not known, so this is a guess"
        else:
            known = f"{batch_size} -> at most {fits}" if fits else "not one image a domain fits"
            why = f"{known}, an image pair takes {_gib((used.need - used.resident) / batch_size)} or more"
        part = split(batch_size, max(1, batch_size // 2 if fits is None else fits))
        kept = f"--data.batch_size {part} --optim.accumulate {accumulate * batch_size // part}"
        same = "keeps the images of a step and is nearly the same step (BatchNorm's statistics are of a micro-batch)"
        cures.append(f"lower --data.batch_size ({why}): {kept} {same}")
    if batch_size == 1 or fits == 0:
        smaller = smaller_crop(crop, 0.5 if share is None else share * batch_size)
        if smaller is not None:
            lower = f"lower --data.crop {crop[0]} {crop[1]} -> at most {smaller[0]} {smaller[1]}"
            cures = [f"{cures[0]}, and {lower}" if cures else lower]
    if not recompute:
        cures.append("give --run.recompute_blocks true (67 % fewer bytes kept at 1024 by MiT-B5, counted)")
    return cures or ["take a smaller --model.backbone or a GPU with more memory"]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
