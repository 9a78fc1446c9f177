"""sample_pairs: every backend against a definition in NumPy, its distribution, and its edges."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ssr_kernels import library
from ssr_kernels.contrast import sample_pairs, sampling
from tests.kernels.contrast_shim import sample_on_shim, shim_reasons
from tests.kernels.sample_cases import CASES, expected, key_of, same
from tests.syncfree import NoHostSync

BACKENDS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(library.reasons("ssr_cpu")), reason="ssr_cpu is not built")),
    pytest.param("shim", marks=pytest.mark.skipif(bool(shim_reasons()), reason="; ".join(shim_reasons()))),
]


def draw(backend, segments, key, count, pixels):
    if backend == "shim":
        return sample_on_shim(segments, key, count, pixels)
    return sample_pairs(segments, key, count, pixels, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_bit_for_bit(case, backend, seed):
    make, count, pixels = CASES[case]
    segments = make(np.random.default_rng(seed))
    key = key_of(seed)
    same(draw(backend, torch.from_numpy(segments), key, count, pixels), expected(segments, key, count, pixels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_possible_id(backend):
    """65535 segments of one pixel, in an image of 256 x 256."""
    segments = np.random.default_rng(3).permutation(65536).reshape(1, 256, 256).astype(np.int32)
    found = draw(backend, torch.from_numpy(segments), key_of(1), 20, 3)
    assert found.segment.tolist() == [list(range(1, 21))] and found.dropped.tolist() == [65515]
    same(found, expected(segments, key_of(1), 20, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_any_integer_dtype(dtype):
    segments = torch.randint(0, 100, (2, 13, 17))
    wanted = sample_pairs(segments.to(torch.int32), key_of(1), 8, 4)
    for a, b in zip(sample_pairs(segments.to(dtype), key_of(1), 8, 4), wanted, strict=True):
        assert torch.equal(a, b)
    far = torch.where(segments == 3, 2**40 + 5, segments)  # does not become a 5 on its way to 32 bits
    assert torch.equal(
        sample_pairs(far, key_of(1), 99, 4).pixel, sample_pairs(segments * (segments != 3), key_of(1), 99, 4).pixel
    )


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_draws_are_uniform(backend):
    """100 000 draws of 4 among 25 pixels: each pixel as often, in each place as often."""
    row = torch.arange(50) // 5
    segments = (1 + 10 * row[:, None] + row).to(torch.int32).expand(50, 50, 50)  # 100 segments of 5 x 5 an image
    counts = np.zeros((4, 25), np.int64)
    for number in range(5):
        index = draw(backend, segments, key_of(number), 100, 4).pixel.flatten(0, 1)  # [5000, 4]
        assert all(len(set(drawn)) == 4 for drawn in index.tolist())
        inside = (index // 50 % 5 * 5 + index % 5).numpy()  # where in its segment
        for place in range(4):
            counts[place] += np.bincount(inside[:, place], minlength=25)
    assert counts.sum() == 100_000
    for place in range(4):
        assert chisquare(counts[place]).pvalue > 0.001, place
    assert chisquare(counts.sum(0)).pvalue > 0.001


def test_images_and_keys_draw_differently():
    segments = torch.ones(2, 40, 40, dtype=torch.int32)
    first, other = sample_pairs(segments, key_of(1), 1, 64), sample_pairs(segments, key_of(2), 1, 64)
    assert not torch.equal(first.pixel[0], first.pixel[1]) and not torch.equal(first.pixel, other.pixel)


SCRIPT = """
import sys, torch
from ssr_kernels import counter
from ssr_kernels.contrast import sample_pairs
segments = torch.arange(2 * 50 * 60).view(2, 50, 60) // 37 % 90
key = counter.fold(torch.zeros((), dtype=torch.int64), 5)
print([part.tolist() for part in sample_pairs(segments, key, 20, 6, backend=sys.argv[1])])
"""


def test_two_processes_draw_the_same():
    outputs = {
        subprocess.check_output([sys.executable, "-c", SCRIPT, name], text=True) for name in ("auto", "reference")
    }
    assert len(outputs) == 1


def test_does_not_synchronise_and_compiles():
    segments = torch.randint(0, 9, (2, 12, 15), dtype=torch.int32)
    with NoHostSync():
        sample_pairs(segments, key_of(1), 4, 3, backend="reference")
    wanted = sample_pairs(segments, key_of(1), 4, 3)
    compiled = torch.compile(sample_pairs, fullgraph=True, backend="aot_eager")(segments, key_of(1), 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(compiled, wanted, strict=True))
    ids = segments.flatten(1)
    for backend in ("reference", sampling.SAMPLE_PAIRS.choose(None, (ids,)).name):
        torch.library.opcheck(torch.ops.ssr_kernels.contrast_sample.default, (ids, key_of(1), 4, 3, backend))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": torch.zeros(2, 3)}, r"segments must have the shape \[B, h, w\]"),
        ({"segments": torch.zeros(1, 2, 3)}, "segments must be an integer tensor"),
        ({"key": torch.zeros(1, dtype=torch.int64)}, "key must have the shape scalar"),
        ({"key": torch.zeros((), dtype=torch.int32)}, "key must be int64"),
        ({"segment_count": 0}, r"segment_count must be 1 to 1023 \(it is 0\)"),
        ({"segment_count": 1024}, "segment_count must be 1 to 1023"),
        ({"pixel_count": 1025}, "pixel_count must be 1 to 1024"),
        ({"backend": "triton"}, "sample_pairs has no triton backend"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {"segments": torch.ones(1, 2, 3, dtype=torch.int32), "key": key_of(1), "segment_count": 2, "pixel_count": 2}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        sample_pairs(**{**call, **change})
