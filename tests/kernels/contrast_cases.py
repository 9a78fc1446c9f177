"""Random calls of contrast_loss, and what the definition in float64 says of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssr_kernels.contrast import contrast_loss, reference

KINDS = (
    "mixed", "one group", "all padding", "mostly padding", "unknown classes", "one class", "nothing in common", "zeros",
    "duplicates", "any norm", "close",
)  # fmt: skip
"""What make can make of groups, classes and embeddings, all finite; "nan" has one number that is not."""

WITHOUT_LOSS = {"one group", "all padding", "unknown classes", "one class", "nothing in common"}
"""The kinds of which no row counts."""

TINY = 1e-13
"""A norm under the definition's bound."""


@dataclass
class Call:
    """The arguments of one contrast_loss."""

    embedding: Tensor  # [n, D]
    group: Tensor  # [n]
    klass: Tensor  # [n]
    temperature: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """In contrast_loss' order."""
        return self.embedding, self.group, self.klass, self.temperature

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> "Call":
        """The same call on another device or with an embedding, a leaf, of another dtype."""
        embedding = self.embedding.detach().to(device=device, dtype=dtype).clone().requires_grad_()
        return replace(self, embedding=embedding, group=self.group.to(device), klass=self.klass.to(device))


def make(kind: str, n: int, width: int, temperature: float = 0.1, dtype: torch.dtype = torch.float32) -> Call:
    """A random call of one of KINDS."""
    x = torch.randn(n, width, dtype=torch.float64)
    group, klass = torch.randint(-1, n // 4 + 1, (n,)), torch.randint(-1, 3, (n,))
    if kind == "one group":
        group = torch.full((n,), 3)
    elif kind == "all padding":
        group = torch.full((n,), -1)
    elif kind == "mostly padding":
        group = torch.where(torch.rand(n) < 0.6, -1, group)
    elif kind == "unknown classes":
        klass = torch.full((n,), -1)
    elif kind == "one class":
        klass = torch.zeros(n, dtype=torch.int64)
    elif kind == "nothing in common":
        group, klass = torch.arange(n), torch.arange(n)
    elif kind == "zeros":
        x[::3] = 0
        x[1::5] = torch.nn.functional.normalize(x[1::5]) * TINY
    elif kind == "duplicates":
        x = x[torch.arange(n) // 2]
    elif kind == "any norm":
        x *= 10 ** (28 * torch.rand(n, 1, dtype=torch.float64) - 12)
    elif kind == "nan":
        group, klass, x[n // 2, 0] = torch.arange(n) // 2, torch.arange(n) // 4, torch.nan
    elif kind == "close":
        x = torch.randn(width, dtype=torch.float64) + 0.3 * x
    return Call(x.to(dtype).requires_grad_(), group, klass, temperature)


def run(call: Call, backend: str | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the embedding."""
    loss = contrast_loss(*call.arguments(), backend=backend)
    return loss.detach(), torch.autograd.grad(loss, call.embedding)[0]


def definition(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Loss and gradient by autograd on the definition, in `dtype`."""
    exact = call.to(dtype=dtype)
    loss = reference.contrast_loss(*exact.arguments())
    return loss.detach(), torch.autograd.grad(loss, exact.embedding)[0]


def errors(call: Call, actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative error of the loss and of the gradient as ||difference|| / ||exact||.

    Each row of the gradients counts times its norm, so that rows of any norm have the same say. NaN counts as infinite,
    and what must be 0 and is not, as infinite too; where the exact loss is NaN, this one must be.
    """
    if exact[0].isnan():
        return {"loss is NaN": 0.0 if actual[0].isnan() else float("inf")}
    norms = call.embedding.detach().double().norm(dim=1, keepdim=True)
    (loss, gradient), (exact_loss, exact_gradient) = actual, exact
    found = {
        "loss": _relative(loss.double(), exact_loss.double()),
        "gradient": _relative(gradient.double() * norms, exact_gradient.double() * norms),
    }
    dead = (norms[:, 0] <= reference.EPS) | (call.group < 0)
    return found | {"gradient of dead rows": _relative(gradient.double() * dead[:, None], gradient.double() * 0)}


def _relative(actual: Tensor, exact: Tensor) -> float:
    difference, norm = (actual - exact).norm().item(), exact.norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm and difference == difference else float("inf")
