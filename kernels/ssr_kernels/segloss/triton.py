"""The segmentation loss and pseudo-labels on a GPU in Triton: two launches forward, one backward, two for labels.

Forward: pixel_losses, loss_sum. Backward: logit_gradients. Pseudo-labels: surest_classes, count_sum. Every program owns
what it writes and sums are taken in a fixed order: results are bitwise repeatable, on any GPU of an architecture.
"""

from math import ceil
from typing import Any

import torch
import triton
from torch import Tensor

from .. import tables
from . import triton_kernels

SMALLEST = 16
"""Fewer classes are padded to this many."""


def configs(classes: int, device: torch.device) -> dict[str, dict[str, int]]:
    """Each kernel's block sizes, num_warps and num_stages for this padded number of classes, from configs.json."""
    rows = tables.table("segloss", tables.architecture(device))
    return {**rows["sums"], **rows[str(classes)]}


class Call:
    """One call: the arguments that its kernels share, and their launches."""

    def __init__(self, logits: Tensor, height: int, width: int) -> None:
        self.logits, self.batch = logits, logits.shape[0]
        _, h, w, classes = logits.shape
        self.padded = max(SMALLEST, triton.next_power_of_2(classes))
        self.config = configs(self.padded, logits.device)
        self.sizes = {"h": h, "w": w, "height": height, "width": width}
        self.steps = {"sy": h / height, "sx": w / width}
        self.classes = classes

    def programs(self, kernel: str, rows: str, columns: str) -> int:
        """How many programs a kernel takes for the pixels of these sides of `sizes`."""
        return self.batch * self.sizes[rows] * ceil(self.sizes[columns] / self.config[kernel]["BP"])

    def over_labels(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over the pixels of the labels."""
        self.over("height", "width", kernel, **arguments)

    def over_logits(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over the pixels of the logits."""
        self.over("h", "w", kernel, **arguments)

    def over(self, rows: str, columns: str, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over the pixels of these sides of `sizes`."""
        name = kernel.fn.__name__
        classes = {"K": self.classes, "KR": self.padded // self.config[name]["KL"]}  # KL is in the configuration
        programs = self.programs(name, rows, columns)
        self.launch(kernel, programs, logits=self.logits, **self.sizes, **self.steps, **classes, **arguments)

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Launch a kernel with its configuration."""
        kernel[(programs,)](**arguments, **self.config[kernel.fn.__name__])


def forward(logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss and lse: see forms.forward."""
    loss = logits.new_empty((), dtype=torch.float32)
    lse = logits.new_empty(labels.shape, dtype=torch.float32)
    if labels.numel() == 0:
        return loss.zero_(), lse
    call = Call(logits, *labels.shape[1:])
    partials = logits.new_empty(call.programs("pixel_losses", "height", "width"), dtype=torch.float32)
    call.over_labels(
        triton_kernels.pixel_losses, labels=labels, weights=weights, lse=lse, partials=partials,
        ignore_index=ignore_index,
    )  # fmt: skip
    factor = 1 / labels.numel()
    call.launch(triton_kernels.loss_sum, 1, partials=partials, loss=loss, length=len(partials), factor=factor)
    return loss, lse


def backward(
    grad: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None, lse: Tensor, ignore_index: int
) -> Tensor:
    """Gradient of the logits: see forms.backward."""
    result = torch.empty_like(logits)
    if labels.numel() == 0:
        return result.zero_()
    call = Call(logits, *labels.shape[1:])
    call.over_logits(
        triton_kernels.logit_gradients, grad=grad, labels=labels, weights=weights, lse=lse, out=result,
        reach_y=reach(labels.shape[1], logits.shape[1]), reach_x=reach(labels.shape[2], logits.shape[2]),
        factor=1 / labels.numel(), ignore_index=ignore_index,
    )  # fmt: skip
    return result


def pseudo_label(logits: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Class, its probability and the number of sure pixels: see forms.pseudo_label."""
    labels = logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)
    confidence = logits.new_empty(labels.shape, dtype=torch.float32)
    count = logits.new_empty((), dtype=torch.int64)
    if labels.numel() == 0:
        return labels, confidence, count.zero_()
    call = Call(logits, height, width)
    partials = logits.new_empty(call.programs("surest_classes", "height", "width"), dtype=torch.int32)
    call.over_labels(
        triton_kernels.surest_classes, labels=labels, confidence=confidence, partials=partials, threshold=threshold
    )
    call.launch(triton_kernels.count_sum, 1, partials=partials, count=count, length=len(partials))
    return labels, confidence, count


def reach(fine: int, coarse: int) -> int:
    """The most fine pixels to which a coarse one contributes: whole numbers in a closed interval 2 fine / coarse long.

    Its ends are no whole numbers where fine / coarse is an even number.
    """
    return 2 * fine // coarse + (fine % (2 * coarse) != 0)
