"""Random calls of align, and what the definition in float64 says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_kernels.align import align_stages, reference

GRIDS = (
    ((7, 9), (3, 4)),  # finer than the target's
    ((8, 8), (4, 8)),  # finer in one direction
    ((4, 6), (4, 6)),  # the same
    ((3, 2), (5, 7)),  # coarser
    ((5, 3), (1, 1)),
    ((1, 9), (2, 3)),  # coarser and finer
)
"""Grids of a stage and of the target."""


@dataclass
class Grouped:
    """The arguments of one align_stages."""

    features: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    target: Tensor
    valid: list[Tensor] | None
    shares: list[float]

    def arguments(self):
        """In align_stages' order."""
        return self.features, self.weights, self.biases, self.target, self.valid, self.shares

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that may get a gradient, by a name: x0, w0, b0, x1, ..."""
        named = {}
        for index, parts in enumerate(zip(self.features, self.weights, self.biases, strict=True)):
            named |= {f"{n}{index}": t for n, t in zip("xwb", parts, strict=True) if t is not None}
        return named

    def run(self, backend: str | None) -> Tensor:
        """The loss."""
        return align_stages(*self.arguments(), backend=backend)

    def to(self, **how) -> "Grouped":
        """The same call with other dtypes or devices (masks keep theirs)."""
        move = lambda t: None if t is None else t.detach().to(**how).requires_grad_()  # noqa: E731
        where = {"device": how["device"]} if "device" in how else {}
        return Grouped(
            [move(t) for t in self.features],
            [move(t) for t in self.weights],
            [move(t) for t in self.biases],
            self.target.to(**how),
            None if self.valid is None else [mask.to(**where) for mask in self.valid],
            self.shares,
        )


def grouped(
    shapes: Sequence[tuple[int, int, int]],
    coarse: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    masks: bool,
    batch: int = 2,
) -> Grouped:
    """A random call; `shapes` are h, w, C of each stage."""

    def leaf(*shape: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(shape)).to(dtype).requires_grad_()

    return Grouped(
        [leaf(batch, *shape) for shape in shapes],
        [leaf(width, shape[2], factor=shape[2] ** -0.5) for shape in shapes],
        [leaf(width) for _ in shapes],
        torch.randn(batch, *coarse, width).to(dtype),
        [torch.rand(batch, *shape[:2]) < 0.7 for shape in shapes] if masks else None,
        [0.5 + 0.25 * index for index in range(len(shapes))],
    )


def run(call: Grouped, backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the leaves that want one."""
    loss = call.run(backend)
    leaves = {name: leaf for name, leaf in call.leaves().items() if leaf.requires_grad}
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def definition(call: Grouped, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd on the definition, in `dtype`."""
    exact = call.to(dtype=dtype)
    loss = reference.align_stages(*exact.arguments())
    leaves = exact.leaves()
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||actual - expected|| / ||expected|| of each gradient; NaN counts as infinite, and 0 against 0 as 0."""
    errors = {}
    for name in expected:
        difference = (actual[name].double() - expected[name].double().to(actual[name].device)).norm().item()
        norm = expected[name].double().norm().item()
        errors[name] = float("inf") if difference != difference else difference / norm if norm else difference
    return errors
