"""Counter-based random numbers: equal to an independent uint32 implementation, uniform, uncorrelated, repeatable."""

import numpy as np
import pytest
import torch

from ssr_kernels import counter
from tests.syncfree import NoHostSync

GOLDEN = np.uint32(0x9E3779B9)


def key(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """lowbias32 in wrapping uint32 arithmetic."""
    x = np.asarray(x, dtype=np.uint32)
    with np.errstate(over="ignore"):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))


def fold(k: int, value: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return mix(mix(np.uint32(k & 0xFFFFFFFF)) + GOLDEN + np.uint32(value))


def uniform(k: int, stream: int, start: int, stop: int) -> np.ndarray:
    position = np.arange(start, stop, dtype=np.uint64).astype(np.uint32)
    with np.errstate(over="ignore"):
        bits = mix(mix(position * GOLDEN) ^ fold(k, stream))
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@pytest.mark.parametrize("value", [0, 1, 12345, 2**31 - 1, 2**32 - 1])
def test_equals_the_uint32_implementation(value):
    for stream in (0, 1, 7, 2**31 - 1):
        assert counter.fold(key(value), stream).item() == fold(value, stream)
        drawn = counter.uniform(key(value), stream, (3, 5, 7))
        assert drawn.dtype == torch.float32 and drawn.shape == (3, 5, 7)
        np.testing.assert_array_equal(drawn.numpy().ravel(), uniform(value, stream, 0, 105))


def test_positions_beyond_a_million():
    count = (1 << 20) + 4099
    drawn = counter.uniform(key(99), 3, (count,)).numpy()
    np.testing.assert_array_equal(drawn[1 << 20 :], uniform(99, 3, 1 << 20, count))
    # 24-bit numbers collide as random ones do (n^2 / 2^25 pairs): neither a short period nor a permutation
    repeated = count - len(np.unique(drawn))
    assert abs(repeated - count**2 / 2**25) < 0.1 * count**2 / 2**25


def test_a_number_depends_on_its_position_alone():
    short, long = counter.uniform(key(5), 0, (10,)), counter.uniform(key(5), 0, (4, 25))
    assert torch.equal(short, long.reshape(-1)[:10])
    assert torch.equal(long, counter.uniform(key(5), 0, (4, 25)))
    assert counter.uniform(key(5), 0, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("value", range(4))
def test_uniform_by_chi_square(value):
    count, bins = 1 << 18, 1024
    drawn = counter.uniform(key(value), value, (count,)).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    for numbers in (drawn, drawn * 1024 % 1):  # the high bits and the ones below them
        counts, _ = np.histogram(numbers, bins=bins, range=(0, 1))
        chi_square = ((counts - count / bins) ** 2).sum() / (count / bins)
        # mean bins-1, variance 2(bins-1): five sigma, both sides (too even is as suspicious)
        assert abs(chi_square - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))


def test_neighbours_are_uncorrelated():
    count = 1 << 18
    drawn = counter.uniform(key(1), 0, (count,)).double().numpy() - 0.5
    for lag in (1, 2, 3, 64, 512, 513):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / np.sqrt(count)


def test_streams_and_keys_are_uncorrelated():
    count = 1 << 16
    keys = [key(1), key(2), key(3), counter.fold(key(1), 0), counter.fold(key(1), 1), counter.fold(key(2), 1)]
    rows = [counter.uniform(k, stream, (count,)).double().numpy() for k in keys for stream in range(4)]
    correlation = np.abs(np.corrcoef(np.stack(rows)) - np.eye(len(rows)))
    assert correlation.max() < 5.5 / np.sqrt(count)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_the_same_position_over_steps_is_uniform():
    """What a training run draws: one position, the key folded with each step."""
    steps = 4096
    drawn = np.array([uniform(int(fold(7, step)), 2, 11, 12)[0] for step in range(steps)])
    counts, _ = np.histogram(drawn, bins=64, range=(0, 1))
    chi_square = ((counts - steps / 64) ** 2).sum() / (steps / 64)
    assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)


def test_fold_takes_a_number_or_a_tensor_and_rarely_collides():
    folded = [counter.fold(key(3), step).item() for step in range(2000)]
    assert folded == [counter.fold(key(3), key(step)).item() for step in range(2000)]
    assert len(set(folded)) == 2000
    assert all(0 <= value < 2**32 for value in folded)


def test_no_host_sync():
    start, number = key(1), key(2)
    with NoHostSync():
        counter.uniform(counter.fold(start, number), 4, (8, 8))
        counter.uniform_streams(start, 3, 5)


def test_the_result_is_on_the_device_of_the_key():
    assert counter.uniform(torch.empty((), dtype=torch.int64, device="meta"), 0, (2, 3)).device.type == "meta"


@pytest.mark.gpu
def test_a_device_key_draws_the_same_numbers():
    for count in (1, 1 << 21):
        drawn = counter.uniform(key(8).cuda(), 5, (count,))
        assert drawn.is_cuda
        assert torch.equal(drawn.cpu(), counter.uniform(key(8), 5, (count,)))


def test_several_streams_at_once_equal_one_by_one():
    drawn = counter.uniform_streams(key(77), 6, 9)
    assert drawn.shape == (6, 9) and drawn.dtype == torch.float32
    assert all(torch.equal(row, counter.uniform(key(77), stream, (9,))) for stream, row in enumerate(drawn))
