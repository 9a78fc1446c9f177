"""Argument checks of the ops: each error names the argument, what it must be and what it is."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, legend: str, sizes: Sequence[int | None]) -> None:
    """Raise unless `tensor` has the shape `sizes` (None: any size).

    Args:
        name: the argument's name in the error.
        tensor: what was passed.
        legend: the shape in the field's letters, such as "[B, h, w, C]".
        sizes: the sizes that the other arguments fix.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {legend} (it is a {type(tensor).__name__})")
    actual = tuple(tensor.shape)
    fits = len(actual) == len(sizes) and all(want in (None, have) for want, have in zip(sizes, actual, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must have the shape {legend} = [{wanted}] (it has {list(actual)})")


def floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has a floating point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point (it is {tensor.dtype})")


def integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has an integer dtype (bool is none)."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor (it is {tensor.dtype})")


def same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise TypeError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype} (it is {tensor.dtype})")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device} (it is on {tensor.device})")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which torch.autocast casts operands on the device of `tensor`; None where it is off."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # the question raises for a meta tensor
        return None
    return torch.get_autocast_dtype(kind)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of an op's reductions: float64 for float64 operands (tests), else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
