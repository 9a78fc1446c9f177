"""The backends of contrast_loss: what loads each, and why it cannot run a call."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..machine import interpreted, machine_reasons
from ..registry import Backend, no_reasons
from . import forms
from .registration import IMPLEMENTATIONS, Contrast, Implementation

MAX_WIDTH = 256
"""The widest rows that the Triton kernels hold in registers."""

MAX_ROWS = 65536
"""The most rows that the Triton kernels are laid out for."""


@cache
def _reference() -> Implementation:
    return Implementation(forms.forward, forms.backward)


@cache
def _triton() -> Implementation:
    from . import triton

    return Implementation(triton.forward, triton.backward)


def triton_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why Triton cannot run this call: see Backend.not_supported_reasons."""
    found = list(machine_reasons("triton"))
    if not tensors:
        return found
    embedding = tensors[0]
    if not found and not interpreted() and any(tensor.device.type != "cuda" for tensor in tensors):
        found.append("triton runs on tensors of a CUDA device")
    if interpreted() and embedding.dtype == torch.bfloat16:
        found.append("Triton's interpreter is wrong in bfloat16")
    if embedding.dtype not in (torch.bfloat16, torch.float32):
        found.append("triton runs in bfloat16 or float32 (coefficients of pairs underflow in float16)")
    if embedding.shape[1] > MAX_WIDTH:
        found.append(f"triton takes rows of at most {MAX_WIDTH} numbers (these have {embedding.shape[1]})")
    if embedding.shape[0] > MAX_ROWS:
        found.append(f"triton takes at most {MAX_ROWS} rows (there are {embedding.shape[0]})")
    if any(not tensor.is_contiguous() for tensor in tensors):
        found.append("triton takes dense rows: every tensor must be contiguous")
    return found


def _apply(backend: str, embedding: Tensor, group: Tensor, klass: Tensor, temperature: float) -> Tensor:
    """The call through the autograd function; arguments as loss.contrast_loss has checked them."""
    loss: Tensor = Contrast.apply(backend, temperature, embedding, group, klass)
    return loss


def _backend(
    name: str, load: Callable[[], Implementation], reasons: Callable[[Sequence[Tensor]], list[str]]
) -> Backend:
    IMPLEMENTATIONS[name] = load
    return Backend(name, partial(_apply, name), reasons)


BACKENDS = (_backend("triton", _triton, triton_reasons), _backend("reference", _reference, no_reasons))
