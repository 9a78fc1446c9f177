"""The ops ssr_kernels::dwconv_* and the autograd functions around them.

The ops are opaque to torch.compile and run on any device: what is inside is the backend that the caller has chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("ssr_kernels", "FRAGMENT")
LIBRARY.define("dwconv_gelu_forward(Tensor x, Tensor weight, Tensor bias, str backend) -> Tensor")
LIBRARY.define(
    "dwconv_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool[] wanted, str backend) -> Tensor[]"
)
LIBRARY.define("dwconv_dilated_forward(Tensor x, Tensor[] weights, int[] dilations, str backend) -> Tensor[]")
LIBRARY.define(
    "dwconv_dilated_backward(Tensor[] grads, Tensor x, Tensor[] weights, int[] dilations, bool[] wanted, str backend) "
    "-> Tensor[]"
)

SECOND = (
    "{name} has no second derivative (backward with create_graph=True): "
    "use ssr_kernels.dwconv.reference.{name}, plain PyTorch, for that"
)


@dataclass(frozen=True)
class Implementation:
    """A backend's four functions, with the signatures of those of forms."""

    gelu_forward: Callable[..., Tensor]
    gelu_backward: Callable[..., list[Tensor]]
    dilated_forward: Callable[..., list[Tensor]]
    dilated_backward: Callable[..., list[Tensor]]


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {}
"""What loads each backend's Implementation; backends.py fills it."""


def _gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().gelu_forward(x, weight, bias)


def _gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: Sequence[bool], backend: str
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().gelu_backward(grad, x, weight, bias, wanted)


def _dilated_forward(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], backend: str) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().dilated_forward(x, weights, dilations)


def _dilated_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    wanted: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend]().dilated_backward(grads, x, weights, dilations, wanted)


def _gelu_forward_fake(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: Sequence[bool], backend: str
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, flag in zip((x, weight, bias), wanted, strict=True) if flag]


def _dilated_forward_fake(x: Tensor, weights: Sequence[Tensor], *others: object) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in weights]


def _dilated_backward_fake(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    wanted: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, flag in zip((x, *weights), wanted, strict=True) if flag]


for _name, _run, _fake in (
    ("dwconv_gelu_forward", _gelu_forward, _gelu_forward_fake),
    ("dwconv_gelu_backward", _gelu_backward, _gelu_backward_fake),
    ("dwconv_dilated_forward", _dilated_forward, _dilated_forward_fake),
    ("dwconv_dilated_backward", _dilated_backward, _dilated_backward_fake),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssr_kernels::{_name}", _fake, lib=LIBRARY)


class DepthwiseGelu(torch.autograd.Function):
    """dwconv_gelu_forward with dwconv_gelu_backward as its gradient, which is not differentiable itself."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The result [B, H, W, C] of a call; nothing but the arguments is kept for the gradient."""
        out: Tensor = torch.ops.ssr_kernels.dwconv_gelu_forward(x, weight, bias, backend)
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias.

        Raises:
            RuntimeError: with create_graph=True (a second derivative was asked for).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND.format(name="dwconv_gelu"))
        wanted = ctx.needs_input_grad[1:]
        found = torch.ops.ssr_kernels.dwconv_gelu_backward(
            grad.contiguous(), *ctx.saved_tensors, list(wanted), ctx.backend
        )
        return None, *_spread(found, wanted)


class Dilated(torch.autograd.Function):
    """dwconv_dilated_forward with dwconv_dilated_backward as its gradient, which is not differentiable itself."""

    @staticmethod
    def forward(ctx: Any, backend: str, dilations: tuple[int, ...], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The result [B, H, W, C] of each branch; nothing but the arguments is kept for the gradient."""
        outs = torch.ops.ssr_kernels.dwconv_dilated_forward(x, weights, dilations, backend)
        ctx.save_for_backward(x, *weights)
        ctx.backend, ctx.dilations = backend, dilations
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights.

        Raises:
            RuntimeError: with create_graph=True (a second derivative was asked for).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND.format(name="dwconv_dilated"))
        x, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        dense = [grad.contiguous() for grad in grads]
        found = torch.ops.ssr_kernels.dwconv_dilated_backward(
            dense, x, weights, ctx.dilations, list(wanted), ctx.backend
        )
        return None, None, *_spread(found, wanted)


def _spread(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that were wanted in their places, None in the others."""
    gradients = iter(found)
    return [next(gradients) if flag else None for flag in wanted]
