"""The ops ssr_kernels::align_forward and align_backward, and the autograd function around them.

The ops are opaque to torch.compile and run on any device: what is inside is the backend that the caller has chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import forms

LIBRARY = torch.library.Library("ssr_kernels", "FRAGMENT")
LIBRARY.define(
    "align_forward(Tensor[] features, Tensor[] weights, Tensor?[] biases, Tensor target, Tensor[]? valid, "
    "float[] shares, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "align_backward(Tensor grad, Tensor[] features, Tensor[] weights, Tensor?[] biases, Tensor target, "
    "Tensor[]? valid, Tensor rows, Tensor scale, bool[] wanted, str backend) -> Tensor[]"
)


SECOND = (
    "align_loss and align_stages have no second derivative (backward with create_graph=True): "
    "use ssr_kernels.align.reference.align_stages, plain PyTorch, for that"
)


@dataclass(frozen=True)
class Implementation:
    """A backend's two functions, with the signatures of forms.forward and forms.backward without `steps`."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {}
"""What loads each backend's Implementation; backends.py fills it."""


def _forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    shares: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stages = forms.split(features, weights, biases, valid)
    return IMPLEMENTATIONS[backend]().forward(stages, target, shares)


def _forward_fake(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: object, target: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulation_dtype(features[0])
    count = sum(x.shape[0] * x.shape[1] * x.shape[2] for x in features)
    loss, rows = target.new_empty((), dtype=dtype), target.new_empty((3, count), dtype=dtype)
    return loss, rows, target.new_empty(len(features), dtype=dtype)


def _backward(
    grad: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    rows: Tensor,
    scale: Tensor,
    wanted: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    stages = forms.split(features, weights, biases, valid)
    return IMPLEMENTATIONS[backend]().backward(grad, stages, target, rows, scale, wanted)


def _backward_fake(
    grad: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *others: Any,
) -> list[Tensor]:
    wanted = others[-2]
    stages = zip(features, weights, biases, strict=True)
    of_stages = [t for stage in stages for t in stage]
    return [t.new_empty(t.shape) for t, flag in zip(of_stages, wanted, strict=True) if flag and t is not None]


LIBRARY.impl("align_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("align_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssr_kernels::align_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssr_kernels::align_backward", _backward_fake, lib=LIBRARY)


class Align(torch.autograd.Function):
    """align_forward with align_backward as its gradient, which is not differentiable itself."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, shares: tuple[float, ...], biased: tuple[bool, ...], target: Tensor, *tensors: Tensor
    ) -> Tensor:
        """Loss of a grouped call.

        Args:
            ctx: autograd's.
            backend: a key of IMPLEMENTATIONS.
            shares: factor of each stage's loss.
            biased: which stages have a bias.
            target: [B, hs, ws, D].
            tensors: the features, the weights, the biases of the stages that have one, and the masks or none.
        """
        features, weights, biases, valid = _unpack(biased, tensors)
        loss, rows, scale = torch.ops.ssr_kernels.align_forward(
            features, weights, biases, target, valid, shares, backend
        )
        ctx.save_for_backward(target, rows, scale, *tensors)
        ctx.backend, ctx.biased = backend, biased
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the features, weights and biases; the target and the masks get none.

        Raises:
            RuntimeError: with create_graph=True (a second derivative was asked for).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        target, rows, scale, *tensors = ctx.saved_tensors
        features, weights, biases, valid = _unpack(ctx.biased, tensors)
        places = _places(ctx.biased)
        wanted = [place is not None and ctx.needs_input_grad[4 + place] for place in places]
        gradients = torch.ops.ssr_kernels.align_backward(
            grad, features, weights, biases, target, valid, rows, scale, wanted, ctx.backend
        )
        results: list[Tensor | None] = [None] * len(tensors)
        order = [place for place, flag in zip(places, wanted, strict=True) if flag]
        for place, gradient in zip(order, gradients, strict=True):
            assert place is not None
            results[place] = gradient
        return (None, None, None, None, *results)


def _unpack(
    biased: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor] | None]:
    """Features, weights, biases and masks of Align.forward's `tensors`."""
    count, with_bias = len(biased), sum(biased)
    biases = iter(tensors[2 * count : 2 * count + with_bias])
    valid = list(tensors[2 * count + with_bias :])
    every_bias = [next(biases) if flag else None for flag in biased]
    return list(tensors[:count]), list(tensors[count : 2 * count]), every_bias, valid or None


def _places(biased: Sequence[bool]) -> list[int | None]:
    """Where among `tensors` the features, weight and bias of each stage stand; None: there is no bias."""
    count = len(biased)
    places: list[int | None] = []
    for index, flag in enumerate(biased):
        places += [index, count + index, 2 * count + sum(biased[:index]) if flag else None]
    return places
