"""The backends of align: what loads each, and why it cannot run a call."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..machine import interpreted, machine_reasons
from ..registry import Backend, no_reasons
from . import forms, native
from .registration import IMPLEMENTATIONS, Align, Implementation

HALF = (torch.bfloat16, torch.float16)


def _implementation(steps: forms.GramSteps) -> Implementation:
    return Implementation(partial(forms.forward, steps=steps), partial(forms.backward, steps=steps))


@cache
def _reference() -> Implementation:
    return _implementation(forms.TorchSteps())


@cache
def _cpp() -> Implementation:
    from .cpp import CppSteps

    return _implementation(CppSteps())


@cache
def _triton() -> Implementation:
    from .triton import Triton

    kernels = Triton()
    return Implementation(kernels.forward, kernels.backward)


@cache
def _cuda() -> Implementation:
    from .cuda import Cuda

    kernels = Cuda()
    return Implementation(kernels.forward, kernels.backward)


def cpp_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the C++ library cannot run this call: see Backend.not_supported_reasons."""
    found = machine_reasons("cpp")
    if any(tensor.device.type != "cpu" for tensor in tensors):
        found.append("cpp runs on tensors of the CPU")
    features = _features(tensors)
    if any(x.dtype not in (torch.float32, torch.float64) for x in features):
        found.append("cpp runs in float32 or float64")
    return found + _common_reasons("cpp", features, tensors)


def triton_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why Triton cannot run this call: see Backend.not_supported_reasons."""
    found = machine_reasons("triton")
    features = _features(tensors)
    if not found and not interpreted() and any(tensor.device.type != "cuda" for tensor in tensors):
        found.append("triton runs on tensors of a CUDA device")
    if interpreted() and any(x.dtype in HALF for x in features):
        found.append("Triton's interpreter is wrong in bfloat16 and float16")
    if any(x.dtype == torch.float64 for x in features):
        found.append("triton has no float64")
    return found + _common_reasons("triton", features, tensors)


def cuda_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the CUDA library, with Triton beside it, cannot run this call: see Backend.not_supported_reasons."""
    found = machine_reasons("cuda") + triton_reasons(tensors)
    features = _features(tensors)
    if any(x.dtype not in HALF for x in features):
        found.append("cuda runs in bfloat16 or float16")
    if len(features) > native.MAX_STAGES:
        found.append(f"cuda takes at most {native.MAX_STAGES} stages")
    if any(forms.takes_gram(x.shape, tensors[0].shape) and x.shape[3] % native.CUDA_CHANNELS for x in features):
        found.append("cuda needs channels in multiples of 16 on grids finer than the target's")
    on_device = [] if torch.compiler.is_compiling() else [x for x in features if x.device.type == "cuda"]
    if any(x.data_ptr() % native.ALIGNMENT for x in on_device):
        found.append("cuda needs features aligned to 16 bytes")
    return found


def _common_reasons(name: str, features: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[str]:
    found = []
    if len({x.dtype for x in features}) > 1:
        found.append(f"{name} takes all stages in one dtype")
    if any(not tensor.is_contiguous() for tensor in tensors):
        found.append(f"{name} takes dense channels-last rows: every tensor must be contiguous")
    return found


def _features(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The features among a call's tensors: the target comes first, and no other has four dimensions."""
    return [tensor for tensor in tensors[1:] if tensor.ndim == 4]


def _apply(
    backend: str,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    stage_weights: Sequence[float],
) -> Tensor:
    """The grouped call through the autograd function; arguments as op.align_stages has checked them."""
    biased = tuple(bias is not None for bias in biases)
    present = [bias for bias in biases if bias is not None]
    shares = tuple(float(share) for share in stage_weights)
    masks = () if valid is None else tuple(mask.detach() for mask in valid)
    loss: Tensor = Align.apply(backend, shares, biased, target.detach(), *features, *weights, *present, *masks)
    return loss


def _backend(
    name: str, load: Callable[[], Implementation], reasons: Callable[[Sequence[Tensor]], list[str]]
) -> Backend:
    IMPLEMENTATIONS[name] = load
    return Backend(name, partial(_apply, name), reasons)


BACKENDS = (
    _backend("cuda", _cuda, cuda_reasons),
    _backend("triton", _triton, triton_reasons),
    _backend("reference", _reference, no_reasons),
    _backend("cpp", _cpp, cpp_reasons),  # after the reference: by name only, so that a compiler changes no result
)
