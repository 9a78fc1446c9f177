"""Counter-based random numbers: a pure function of (key, stream, position), equal on every device.

A step that draws only from here captures in a CUDA graph (the key is a device tensor, so a replay draws new numbers)
and repeats bit for bit after a resume, with no generator state to save.

The mixer is the 32-bit finaliser "lowbias32" (a xorshift-multiply hash), run in int64 arithmetic so that PyTorch
computes it on any device without unsigned types.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_Bits = TypeVar("_Bits", int, Tensor)


def _mix(x: _Bits) -> _Bits:
    """Bijective 32-bit hash of int64 values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


def _multiply(x: _Bits, factor: int) -> _Bits:
    """x * factor modulo 2^32 for x in [0, 2^32): the product is split so that int64 never overflows."""
    low = (x & 0xFFFF) * factor
    high = ((x >> 16) * (factor & _MASK)) & 0xFFFF
    return (low + (high << 16)) & _MASK


@overload
def fold(key: int, value: int) -> int: ...
@overload
def fold(key: Tensor, value: int | Tensor) -> Tensor: ...
def fold(key: Any, value: Any) -> Any:
    """Derive a key from a key and a number (a seed, a step, a rank, a stream).

    Args:
        key: int64 scalar tensor, or a number, for which the host computes.
        value: non-negative number below 2^31, or, for a tensor, an int64 tensor of such on the key's device.

    Returns:
        in [0, 2^32): a number for two numbers, else an int64 tensor on the key's device, scalar where value is.
    """
    return _mix((_mix(key & _MASK) + _GOLDEN + value) & _MASK)


def uniform(key: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (key, stream, position).

    Args:
        key: int64 scalar tensor; its device is the result's.
        stream: which independent sequence of this key.
        shape: shape of the result, row-major positions.

    Returns:
        float32 tensor of `shape` with 24 random bits a number.
    """
    count = 1
    for size in shape:
        count *= size
    return _fraction(bits(fold(key, stream), count)).reshape(*shape)


def uniform_streams(key: Tensor, streams: int, count: int) -> Tensor:
    """Several streams at once: float32 [streams, count], row i as `uniform(key, i, (count,))` draws it."""
    stream = torch.arange(streams, dtype=torch.int64, device=key.device)
    return _fraction(bits(fold(key, stream)[:, None], count))


def _fraction(drawn: Tensor) -> Tensor:
    """32 random bits -> float32 in [0, 1), of the upper 24."""
    return (drawn >> 8).to(torch.float32) * (1.0 / (1 << 24))


def bits(key: Tensor, count: int) -> Tensor:
    """32 random bits a position, a pure function of (key, position); no two positions of a key have equal bits.

    Args:
        key: int64 [..., 1] or scalar tensor of keys.
        count: number of positions.

    Returns:
        int64 [..., count] in [0, 2^32) on the key's device.
    """
    position = torch.arange(count, dtype=torch.int64, device=key.device)
    return _mix((_mix((position * _GOLDEN) & _MASK) ^ key) & _MASK)
