"""Random calls of segloss and pseudo_label, and what the definition in float64 says of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssr_kernels.segloss import pseudo_label, reference, segloss

SIZES = {  # logits [B, h, w, K], labels (H, W)
    "4x": ((2, 3, 4, 5), (12, 16)),
    "odd": ((1, 5, 3, 7), (17, 13)),
    "same size": ((2, 4, 4, 3), (4, 4)),
    "1x1 logits": ((2, 1, 1, 3), (4, 5)),
    "1x1 labels": ((2, 4, 4, 3), (1, 1)),
    "smaller labels": ((1, 6, 7, 3), (3, 5)),
    "3x down and up": ((1, 9, 2, 4), (3, 6)),
    "one row": ((1, 1, 9, 6), (1, 37)),
}

KINDS = ("mixed", "no weights", "zero weights", "all ignored", "wild labels", "large logits", "equal logits")
"""What make can make of logits, labels and weights."""

WITHOUT_LOSS = {"zero weights", "all ignored"}

WILD = (-1, 254, -(2**31), 2**40 + 1, 255)
"""Labels that are no class, with more than 32 bits too; those that do not fit into the dtype come out as others."""

TIE = 1e-12
"""Logits in float64 that are closer than this, as a part of the largest, are equal ones."""


@dataclass
class Call:
    """The arguments of one segloss."""

    logits: Tensor  # [B, h, w, K]
    labels: Tensor  # [B, H, W]
    weights: Tensor | None  # [B, H, W]
    ignore_index: int = 255

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """In segloss' order."""
        return self.logits, self.labels, self.weights, self.ignore_index

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> "Call":
        """The same call on another device or with logits, a leaf, of another dtype."""
        logits = self.logits.detach().to(device=device, dtype=dtype).clone().requires_grad_()
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, logits=logits, labels=self.labels.to(device), weights=weights)


def make(
    kind: str,
    shape: tuple[int, ...],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    labels_dtype: torch.dtype = torch.uint8,
) -> Call:
    """A random call of one of KINDS: a fifth of the labels ignored, weights in [0, 1)."""
    logits = torch.randn(shape, dtype=torch.float64) * (300 if kind == "large logits" else 3)
    if kind == "equal logits":
        logits = logits[..., :1].expand(shape)
    labels = torch.randint(0, shape[3], (shape[0], *size))
    labels = torch.where(torch.rand(labels.shape) < 0.2, 255, labels)
    weights = None if kind == "no weights" else torch.rand(labels.shape)
    if kind == "zero weights":
        weights = torch.zeros(labels.shape)
    elif kind == "all ignored":
        labels = torch.full_like(labels, 255)
    elif kind == "large logits":  # one pixel surely wrong: where all are right the gradient is what rounding leaves
        labels[:1, :1, :1] = reference._upsample(logits[:1], *size).argmin(1)[:, :1, :1]
    elif kind == "wild labels":
        wild = torch.tensor([value for value in WILD if labels_dtype == torch.int64 or 0 <= value < 256])
        labels = torch.where(torch.rand(labels.shape) < 0.5, wild[torch.randint_like(labels, len(wild))], labels)
    return Call(logits.to(dtype).requires_grad_(), labels.to(labels_dtype), weights)


def run(call: Call, backend: str | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits; by way of 4 times the loss, so that the loss's own gradient is not 1."""
    loss = segloss(*call.arguments(), backend=backend)
    return loss.detach(), torch.autograd.grad(4 * loss, call.logits)[0] / 4


def definition(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Loss and gradient by autograd on the definition, in `dtype`."""
    exact = call.to(dtype=dtype)
    loss = reference.segloss(*exact.arguments())
    return loss.detach(), torch.autograd.grad(loss, exact.logits)[0]


def errors(actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative error of loss and gradient, ||difference|| / ||exact||; infinite for what must be 0 and is not."""
    return {name: relative(a, e) for name, a, e in zip(("loss", "gradient"), actual, exact, strict=True)}


def relative(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; NaN counts as infinite."""
    difference, norm = (actual.double() - exact.double()).norm().item(), exact.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm and difference == difference else float("inf")


def label_errors(logits: Tensor, size: tuple[int, int], threshold: float, backend: str) -> dict[str, float]:
    """Of pseudo-labels against the definition in float64.

    Returns:
        confidence: relative error. label: by how much the chosen class's logit is less than the highest, over the
        largest logit. lowest, count: 0 if it is the lowest of equal ones, and if the count is that of the returned
        confidences; else infinite.
    """
    labels, confidence, count = pseudo_label(logits, size, threshold, backend=backend)
    exact_logits = reference._upsample(logits.detach().double(), *size)  # [B, K, H, W]
    _, exact, _ = reference.pseudo_label(logits.detach().double(), size, threshold)
    behind = (exact_logits.amax(1, keepdim=True) - exact_logits) / exact_logits.abs().max().clamp_min(1e-30)
    lost = behind.gather(1, labels.long().clamp_max(logits.shape[3] - 1)[:, None])[:, 0]
    lowest = (behind < TIE).to(torch.uint8).argmax(1)
    another = ((lost < TIE) & (labels != lowest)).any().item() or labels.max().item() >= logits.shape[3]
    return {
        "confidence": relative(confidence, exact),
        "label": lost.max().item(),
        "lowest": float("inf") if another else 0.0,
        "count": 0.0 if count.item() == (confidence >= threshold).sum().item() else float("inf"),
    }
