"""Which pixels a step contrasts: the public function, its op and its backends.

B images, h w pixels of the segments' grid, K segments an image, A pixels a segment.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, library
from ..registry import Backend, Op, no_reasons
from . import sample_native, sample_reference
from .sample_reference import IDS

MAX_SEGMENTS = 1023
"""The most segments of an image (kMaxSegments of csrc/contrast.h)."""
MAX_SAMPLES = 1024
"""The most pixels of a segment (kMaxPixels)."""

Sampler = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor, Tensor]]

LIBRARY = torch.library.Library("ssr_kernels", "FRAGMENT")
LIBRARY.define(
    "contrast_sample(Tensor ids, Tensor key, int segments, int samples, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


class Samples(NamedTuple):
    """What sample_pairs draws; rows of an image are its segments, the largest first."""

    pixel: Tensor
    """int64 [B, K, A], numbers y w + x of the pixels drawn; -1 behind the last."""
    segment: Tensor
    """int32 [B, K], id of each segment; 0 where the image has no more."""
    taken: Tensor
    """int32 [B, K], how many pixels were drawn of it: min(A, its size)."""
    dropped: Tensor
    """int32 [B], segments of the image beyond the K largest."""


def sample_pairs(
    segments: Tensor, key: Tensor, segment_count: int, pixel_count: int, *, backend: str | None = None
) -> Samples:
    """Draw pixels of the K largest segments of each image, uniformly and without replacement.

    A pure function of its arguments: every backend, device and process draws the same, and the key is read on the
    device, so that a captured graph draws anew when the key changes. Of segments of one size the lower id is the
    larger. Which pixels of a segment are drawn, and their order, follows 22 random bits a pixel (of equal ones the
    pixel with the lower number comes first).

    Args:
        segments: [B, h, w], any integer dtype: ids from 1 to 65535, which need not be compact; any other value is no
            segment.
        key: int64 scalar tensor of ssr_kernels.counter, on the segments' device.
        segment_count: K, 1 .. 1023.
        pixel_count: A, 1 .. 1024.
        backend: see registry.Op.choose. "auto" takes compiled code where it can: all give the same bits.

    Returns:
        Samples.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    checks.shape("segments", segments, "[B, h, w]", (None, None, None))
    checks.integer("segments", segments)
    checks.shape("key", key, "scalar", ())
    if key.dtype != torch.int64:
        raise TypeError(f"key must be int64 (it is {key.dtype})")
    checks.same_device("key", key, "segments", segments)
    for name, value, most in (
        ("segment_count", segment_count, MAX_SEGMENTS),
        ("pixel_count", pixel_count, MAX_SAMPLES),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most} (it is {value})")
    ids = _int32(segments).flatten(1).contiguous()
    return Samples(*SAMPLE_PAIRS.choose(backend, (ids,)).run(ids, key, segment_count, pixel_count))


def _int32(segments: Tensor) -> Tensor:
    """The ids as int32; what does not fit is no segment."""
    if segments.dtype in (torch.int64, torch.uint64, torch.uint32):
        segments = segments.to(torch.int64)
        segments = torch.where((segments > 0) & (segments < IDS), segments, 0)
    return segments.to(torch.int32)


@torch.compiler.assume_constant_result
def _library_reasons(name: str) -> list[str]:
    return list(library.reasons(name))


def _cuda_reasons(tensors: Sequence[Tensor]) -> list[str]:
    found = _library_reasons("ssr_cuda")
    if not found and not torch.cuda.is_available():
        found.append("there is no CUDA device")
    return found + ["cuda runs on tensors of a CUDA device" for tensor in tensors if tensor.device.type != "cuda"]


def _cpp_reasons(tensors: Sequence[Tensor]) -> list[str]:
    found = _library_reasons("ssr_cpu")
    return found + ["cpp runs on tensors of the CPU" for tensor in tensors if tensor.device.type != "cpu"]


_SAMPLERS: dict[str, Sampler] = {
    "cuda": sample_native.sample_cuda,
    "cpp": sample_native.sample_cpp,
    "reference": sample_reference.sample_pairs,
}


def _sample(
    ids: Tensor, key: Tensor, segments: int, samples: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _SAMPLERS[backend](ids, key, segments, samples)


def _sample_fake(
    ids: Tensor, key: Tensor, segments: int, samples: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = ids.shape[0]
    index = ids.new_empty((batch, segments, samples), dtype=torch.int64)
    return index, ids.new_empty((batch, segments)), ids.new_empty((batch, segments)), ids.new_empty(batch)


LIBRARY.impl("contrast_sample", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("ssr_kernels::contrast_sample", _sample_fake, lib=LIBRARY)


def _runs(backend: str) -> Sampler:
    def run(ids: Tensor, key: Tensor, segments: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        drawn: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.ssr_kernels.contrast_sample(
            ids, key, segments, samples, backend
        )
        return drawn

    return run


SAMPLE_PAIRS = Op(
    "sample_pairs",
    (
        Backend("cuda", _runs("cuda"), _cuda_reasons),
        Backend("cpp", _runs("cpp"), _cpp_reasons),
        Backend("reference", _runs("reference"), no_reasons),
    ),
)
