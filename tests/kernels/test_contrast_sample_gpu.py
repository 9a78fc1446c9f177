"""sample_pairs on a GPU: the definition's bits, repeatability, graph replay with another key, no host sync."""

import numpy as np
import pytest
import torch

from ssr_kernels import library
from ssr_kernels.contrast import sample_pairs, sampling
from tests.kernels.sample_cases import CASES, blocks, expected, key_of, same

pytestmark = pytest.mark.gpu

BACKENDS = [
    "reference",
    pytest.param("cuda", marks=pytest.mark.skipif(bool(library.reasons("ssr_cuda")), reason="ssr_cuda is not built")),
]
ON_EACH = pytest.mark.parametrize("backend", BACKENDS)


def on_device(segments: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(segments).to("cuda")


def key(number: int) -> torch.Tensor:
    return key_of(number).to("cuda")


def patches(seed: int, batch: int = 2, size: int = 128) -> torch.Tensor:
    return on_device(blocks(np.random.default_rng(seed), batch, size, size, np.arange(1, 200)))


def poison() -> None:
    """What the allocator hands out next is no number, and no index either."""
    filled = torch.full((64 << 20,), float("nan"), device="cuda")
    del filled


@ON_EACH
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_bit_for_bit(case, backend, seed):
    make, count, pixels = CASES[case]
    segments = make(np.random.default_rng(seed))
    poison()
    found = sample_pairs(on_device(segments), key(seed), count, pixels, backend=backend)
    same(found, expected(segments, key_of(seed), count, pixels))


@ON_EACH
@pytest.mark.parametrize("size", [(4, 256, 256), (1, 512, 512), (2, 1024, 2048)])
def test_large_maps(size, backend, seed):
    segments = blocks(np.random.default_rng(seed), *size, np.arange(1, 3000))
    found = sample_pairs(on_device(segments), key(seed), 64, 256, backend=backend)
    same(found, expected(segments, key_of(seed), 64, 256))


@ON_EACH
def test_two_runs_are_bitwise_equal_on_poisoned_memory(backend, seed):
    segments = patches(seed)
    first = sample_pairs(segments, key(seed), 100, 64, backend=backend)
    poison()
    second = sample_pairs(segments, key(seed), 100, 64, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@ON_EACH
def test_a_replay_draws_by_the_key_of_now_without_a_sync(backend, seed):
    segments, number = patches(seed), key(seed)

    def draw() -> sampling.Samples:
        return sample_pairs(segments, number, 50, 32, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = draw()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    number.copy_(key(seed + 1))
    segments.copy_(patches(seed + 1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, draw(), strict=True))
    assert not torch.equal(captured.pixel, before.pixel)


@ON_EACH
def test_compiles_in_one_graph(backend, seed):
    segments = patches(seed)
    compiled = torch.compile(sample_pairs, fullgraph=True)(segments, key(1), 20, 8, backend=backend)
    wanted = sample_pairs(segments, key(1), 20, 8, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(compiled, wanted, strict=True))


def test_auto_takes_the_compiled_code(seed):
    wanted = "reference" if library.reasons("ssr_cuda") else "cuda"
    assert sampling.SAMPLE_PAIRS.choose("auto", (patches(seed).flatten(1),)).name == wanted
    assert sampling.SAMPLE_PAIRS.choose("auto", (patches(seed).cpu().flatten(1),)).name != "cuda"
