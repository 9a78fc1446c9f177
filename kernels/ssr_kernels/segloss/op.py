"""Segmentation loss from low-resolution logits, and pseudo-labels.

B batch, h w pixels of the logits, H W pixels of the labels, K classes.
"""

import torch
from torch import Tensor

from .. import checks
from ..registry import Op
from .backends import PSEUDO_LABEL_BACKENDS, SEGLOSS_BACKENDS

SEGLOSS = Op("segloss", SEGLOSS_BACKENDS)
PSEUDO_LABEL = Op("pseudo_label", PSEUDO_LABEL_BACKENDS)

LABELS = (torch.uint8, torch.int32, torch.int64)
"""The dtypes that the kernels read; labels of another one are copied."""

MAX_CLASSES = 255
"""Pseudo-labels are uint8, and 255 means ignore."""


def segloss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = 255,
    *,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits upsampled to the labels' size (bilinear, align_corners False), times weights.

    The sum is divided by B*H*W: ALL pixels, the ignored ones included, as DAFormer's mean over a map that holds zeros
    there. A label outside [0, K) counts as ignored too, on every backend: the training step cannot afford to look
    (that would wait for the device). Find such labels beforehand with `check_labels`.

    Four bytes a label pixel are kept for the backward pass, which is not differentiable itself; no map of B*K*H*W
    numbers is ever made. Sums are float32.

    Args:
        logits: [B, h, w, K], floating point.
        labels: [B, H, W], any integer dtype.
        weights: [B, H, W] factor of each pixel, floating point, without gradient; None: 1.
        ignore_index: label of a pixel without a class.
        backend: see registry.Op.choose.

    Returns:
        scalar, float32 (float64 for float64 logits); 0 with zero gradient when all pixels are ignored.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    _check_logits(logits)
    checks.shape("labels", labels, "[B, H, W]", (logits.shape[0], None, None))
    checks.integer("labels", labels)
    checks.same_device("labels", labels, "logits", logits)
    if 0 in labels.shape[1:]:
        raise ValueError(f"labels must have at least one row and one column (it has {list(labels.shape)})")
    if weights is not None:
        checks.shape("weights", weights, "[B, H, W]", tuple(labels.shape))
        checks.floating("weights", weights)
        checks.same_device("weights", weights, "logits", logits)
        weights = weights.detach()
    labels = labels if labels.dtype in LABELS else labels.to(torch.int64)
    tensors = (logits, labels) if weights is None else (logits, labels, weights)
    return SEGLOSS.choose(backend, tensors).run(logits, labels, weights, ignore_index)


def pseudo_label(
    logits: Tensor, size: tuple[int, int], threshold: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's label of each pixel of the upsampled logits, how sure it is, and how many pixels are sure enough.

    Args:
        logits: [B, h, w, K], floating point; receives no gradient. K <= 255.
        size: (H, W) of the result.
        threshold: probability that counts as sure.
        backend: see registry.Op.choose.

    Returns:
        labels uint8 [B, H, W] (of equal logits the lowest class), confidence float32 [B, H, W] in [0, 1] (probability
        of that class), count int64 scalar of confidence >= threshold, on the logits' device.

    Raises:
        ValueError, TypeError: an argument of a wrong shape or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    _check_logits(logits)
    if not 1 <= logits.shape[3] <= MAX_CLASSES:
        raise ValueError(f"logits must have 1 to {MAX_CLASSES} classes for uint8 labels (it has {logits.shape[3]})")
    if min(size) < 1:
        raise ValueError(f"size must be (H, W) >= 1 (it is {tuple(size)})")
    return PSEUDO_LABEL.choose(backend, (logits,)).run(logits, size, threshold)


def check_labels(labels: Tensor, class_count: int, ignore_index: int = 255) -> None:
    """Raise unless every label is a class or ignore_index. Waits for the device: for data preparation, not for a step.

    Args:
        labels: any shape, any integer dtype.
        class_count: K; classes are 0 .. K-1.
        ignore_index: label of a pixel without a class.

    Raises:
        ValueError: names the unknown labels (the lowest ten) and how many pixels have one.
    """
    checks.integer("labels", labels)
    values = labels.long()
    unknown = values[((values < 0) | (values >= class_count)) & (values != ignore_index)]
    if unknown.numel():
        names = ", ".join(str(value) for value in unknown.unique()[:10].tolist())
        raise ValueError(
            f"labels must be 0 .. {class_count - 1} or {ignore_index}: {unknown.numel()} pixels have another ({names})"
        )


def _check_logits(logits: Tensor) -> None:
    checks.shape("logits", logits, "[B, h, w, K]", (None, None, None, None))
    checks.floating("logits", logits)
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits must have at least one pixel and one class (it has {list(logits.shape)})")
