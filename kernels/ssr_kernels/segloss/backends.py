"""The backends of segloss and pseudo_label: what loads each, and why it cannot run a call."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..machine import interpreted, machine_reasons
from ..registry import Backend, no_reasons
from . import forms
from .registration import IMPLEMENTATIONS, Implementation, Segloss

HALF = (torch.bfloat16, torch.float16)

MAX_CLASSES = 256
"""The most classes of which the Triton kernels hold a pixel's logits in registers."""

MAX_SIDE = 32768
"""The most rows or columns of logits and labels: twice the product of two sides stays below 2^31."""


@cache
def _reference() -> Implementation:
    return Implementation(forms.forward, forms.backward, forms.pseudo_label)


@cache
def _triton() -> Implementation:
    from . import triton

    return Implementation(triton.forward, triton.backward, triton.pseudo_label)


def triton_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why Triton cannot run this call: see Backend.not_supported_reasons."""
    found = list(machine_reasons("triton"))
    if not tensors:
        return found
    logits = tensors[0]
    if not found and not interpreted() and any(tensor.device.type != "cuda" for tensor in tensors):
        found.append("triton runs on tensors of a CUDA device")
    if interpreted() and any(tensor.dtype in HALF for tensor in tensors):
        found.append("Triton's interpreter is wrong in bfloat16 and float16")
    if logits.dtype not in (*HALF, torch.float32):
        found.append("triton runs in bfloat16, float16 or float32")
    if logits.shape[3] > MAX_CLASSES:
        found.append(f"triton takes at most {MAX_CLASSES} classes (there are {logits.shape[3]})")
    if any(side > MAX_SIDE for tensor in tensors for side in tensor.shape[1:3]):
        found.append(f"triton takes at most {MAX_SIDE} rows or columns")
    if any(not tensor.is_contiguous() for tensor in tensors):
        found.append("triton takes dense rows [B, h, w, K] and maps [B, H, W]: every tensor must be contiguous")
    return found


def _segloss(backend: str, logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """The loss through the autograd function; arguments as op.segloss has checked them."""
    loss: Tensor = Segloss.apply(backend, ignore_index, logits, labels, weights)
    return loss


def _pseudo_label(
    backend: str, logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-labels; arguments as op.pseudo_label has checked them."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.ssr_kernels.pseudo_label(
        logits.detach(), *size, threshold, backend
    )
    return found


IMPLEMENTATIONS.update({"triton": _triton, "reference": _reference})


def _backends(run: Callable[..., object]) -> tuple[Backend, ...]:
    return (
        Backend("triton", partial(run, "triton"), triton_reasons),
        Backend("reference", partial(run, "reference"), no_reasons),
    )


SEGLOSS_BACKENDS = _backends(_segloss)
PSEUDO_LABEL_BACKENDS = _backends(_pseudo_label)
