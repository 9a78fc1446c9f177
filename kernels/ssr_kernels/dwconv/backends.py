"""The backends of the depthwise convolutions: what loads each, and why it cannot run a call."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..machine import interpreted, machine_reasons
from ..registry import Backend, no_reasons
from . import forms
from .registration import IMPLEMENTATIONS, DepthwiseGelu, Dilated, Implementation

MAX_BRANCHES = 4
"""The most dilated branches of one Triton call."""

MAX_IMAGE = 2**31
"""Numbers of an image's map that the Triton kernels can address."""


@cache
def _reference() -> Implementation:
    return Implementation(forms.gelu_forward, forms.gelu_backward, forms.dilated_forward, forms.dilated_backward)


@cache
def _triton() -> Implementation:
    from . import triton

    return Implementation(triton.gelu_forward, triton.gelu_backward, triton.dilated_forward, triton.dilated_backward)


def triton_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why Triton cannot run this call: see Backend.not_supported_reasons."""
    found = list(machine_reasons("triton"))
    if not tensors:
        return found
    x = tensors[0]
    if not found and not interpreted() and any(tensor.device.type != "cuda" for tensor in tensors):
        found.append("triton runs on tensors of a CUDA device")
    if interpreted() and x.dtype in (torch.bfloat16, torch.float16):
        found.append("Triton's interpreter is wrong in bfloat16 and float16")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        found.append("triton has no float64")
    if any(not tensor.is_contiguous() for tensor in tensors):
        found.append("triton takes dense channels-last rows: every tensor must be contiguous")
    if x.shape[1] * x.shape[2] * x.shape[3] >= MAX_IMAGE:
        found.append(f"triton takes images of less than 2^31 numbers (these have {x[0].numel()})")
    return found


def dilated_triton_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why Triton cannot run this call of several branches: see Backend.not_supported_reasons."""
    found = triton_reasons(tensors)
    if len(tensors) - 1 > MAX_BRANCHES:
        found.append(f"triton takes at most {MAX_BRANCHES} branches (there are {len(tensors) - 1})")
    return found


def _apply_gelu(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The call through the autograd function; arguments as op.dwconv_gelu has checked them."""
    out: Tensor = DepthwiseGelu.apply(backend, x, weight, bias)
    return out


def _apply_dilated(backend: str, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """The call through the autograd function; arguments as op.dwconv_dilated has checked them."""
    return list(Dilated.apply(backend, tuple(dilations), x, *weights))


IMPLEMENTATIONS.update({"triton": _triton, "reference": _reference})

Reasons = Callable[[Sequence[Tensor]], list[str]]


def _backends(apply: Callable[..., object], triton: Reasons) -> tuple[Backend, ...]:
    return (
        Backend("triton", partial(apply, "triton"), triton),
        Backend("reference", partial(apply, "reference"), no_reasons),
    )


GELU_BACKENDS = _backends(_apply_gelu, triton_reasons)
DILATED_BACKENDS = _backends(_apply_dilated, dilated_triton_reasons)
