"""The ops ssr_kernels::contrast_forward and contrast_backward, and the autograd function around them.

The ops are opaque to torch.compile and run on any device: what is inside is the backend that the caller has chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks

LIBRARY = torch.library.Library("ssr_kernels", "FRAGMENT")
LIBRARY.define(
    "contrast_forward(Tensor embedding, Tensor group, Tensor klass, float temperature, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "contrast_backward(Tensor grad, Tensor embedding, Tensor group, Tensor klass, Tensor rows, Tensor scale, "
    "float temperature, str backend) -> Tensor"
)

SECOND = (
    "contrast_loss has no second derivative (backward with create_graph=True): "
    "use ssr_kernels.contrast.reference.contrast_loss, plain PyTorch, for that"
)


@dataclass(frozen=True)
class Implementation:
    """A backend's two functions, with the signatures of forms.forward and forms.backward without `chunk`."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {}
"""What loads each backend's Implementation; loss_backends.py fills it."""


def _forward(
    embedding: Tensor, group: Tensor, klass: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(embedding.device.type, enabled=False):  # or it would cast the float32 products inside
        return IMPLEMENTATIONS[backend]().forward(embedding, group, klass, temperature)


def _forward_fake(embedding: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulation_dtype(embedding)
    rows = embedding.new_empty((3, embedding.shape[0]), dtype=dtype)
    return embedding.new_empty((), dtype=dtype), rows, embedding.new_empty((), dtype=dtype)


def _backward(
    grad: Tensor,
    embedding: Tensor,
    group: Tensor,
    klass: Tensor,
    rows: Tensor,
    scale: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    with torch.autocast(embedding.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().backward(grad, embedding, group, klass, rows, scale, temperature)


def _backward_fake(grad: Tensor, embedding: Tensor, *others: object) -> Tensor:
    return embedding.new_empty(embedding.shape)


LIBRARY.impl("contrast_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("contrast_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssr_kernels::contrast_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssr_kernels::contrast_backward", _backward_fake, lib=LIBRARY)


class Contrast(torch.autograd.Function):
    """contrast_forward with contrast_backward as its gradient, which is not differentiable itself."""

    @staticmethod
    def forward(ctx: Any, backend: str, temperature: float, embedding: Tensor, group: Tensor, klass: Tensor) -> Tensor:
        """Loss of a call.

        Args:
            ctx: autograd's.
            backend: a key of IMPLEMENTATIONS.
            temperature: positive.
            embedding: [n, D].
            group: [n] int32.
            klass: [n] int32.
        """
        loss, rows, scale = torch.ops.ssr_kernels.contrast_forward(embedding, group, klass, temperature, backend)
        ctx.save_for_backward(embedding, group, klass, rows, scale)
        ctx.backend, ctx.temperature = backend, temperature
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the embedding; group and klass get none.

        Raises:
            RuntimeError: with create_graph=True (a second derivative was asked for).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        gradient = torch.ops.ssr_kernels.contrast_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.backend)
        return None, None, gradient, None, None
