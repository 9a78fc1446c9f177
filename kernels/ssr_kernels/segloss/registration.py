"""The ops ssr_kernels::segloss_forward, segloss_backward and pseudo_label, and the autograd function of the loss.

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
    "segloss_forward(Tensor logits, Tensor labels, Tensor? weights, int ignore_index, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "segloss_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? weights, Tensor lse, int ignore_index, "
    "str backend) -> Tensor"
)
LIBRARY.define(
    "pseudo_label(Tensor logits, SymInt height, SymInt width, float threshold, str backend) -> (Tensor, Tensor, Tensor)"
)

SECOND = (
    "segloss has no second derivative (backward with create_graph=True): "
    "use ssr_kernels.segloss.reference.segloss, plain PyTorch, for that"
)


@dataclass(frozen=True)
class Implementation:
    """A backend's three functions, with the signatures of those in forms.py without `chunk`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    pseudo_label: Callable[..., tuple[Tensor, Tensor, Tensor]]


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {}
"""What loads each backend's Implementation; backends.py fills it."""


def _forward(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):  # or it would cast the float32 products inside
        return IMPLEMENTATIONS[backend]().forward(logits, labels, weights, ignore_index)


def _forward_fake(logits: Tensor, labels: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulation_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty(labels.shape, dtype=dtype)


def _backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().backward(grad, logits, labels, weights, lse, ignore_index)


def _backward_fake(grad: Tensor, logits: Tensor, *others: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _pseudo_label(
    logits: Tensor, height: int, width: int, threshold: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().pseudo_label(logits, height, width, threshold)


def _pseudo_label_fake(
    logits: Tensor, height: int, width: int, threshold: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], height, width)
    count = logits.new_empty((), dtype=torch.int64)
    return logits.new_empty(shape, dtype=torch.uint8), logits.new_empty(shape, dtype=torch.float32), count


LIBRARY.impl("segloss_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("segloss_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("pseudo_label", _pseudo_label, "CompositeExplicitAutograd")
torch.library.register_fake("ssr_kernels::segloss_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssr_kernels::segloss_backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("ssr_kernels::pseudo_label", _pseudo_label_fake, lib=LIBRARY)


class Segloss(torch.autograd.Function):
    """segloss_forward with segloss_backward as its gradient, which is not differentiable itself."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, ignore_index: int, logits: Tensor, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Loss of a call.

        Args:
            ctx: autograd's.
            backend: a key of IMPLEMENTATIONS.
            ignore_index: label of a pixel without a class.
            logits: [B, h, w, K].
            labels: [B, H, W].
            weights: [B, H, W] or None.
        """
        loss, lse = torch.ops.ssr_kernels.segloss_forward(logits, labels, weights, ignore_index, backend)
        ctx.save_for_backward(logits, labels, weights, lse)
        ctx.backend, ctx.ignore_index = backend, ignore_index
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits; labels and weights get none.

        Raises:
            RuntimeError: with create_graph=True (a second derivative was asked for).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        gradient = torch.ops.ssr_kernels.segloss_backward(grad, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
        return None, None, gradient, None, None
