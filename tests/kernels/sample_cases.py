"""The definition of sample_pairs in NumPy, and maps of segments to try it on."""

import numpy as np
import torch

from ssr_kernels import counter
from ssr_kernels.contrast import sampling


def key_of(number):
    return counter.fold(torch.zeros((), dtype=torch.int64), number)


def mix(x):
    """lowbias32 on uint32, where products wrap."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def expected(segments, key, count, pixels):
    """The definition, one segment after another."""
    batch = segments.shape[0]
    index = np.full((batch, count, pixels), -1, np.int64)
    segment, taken = np.zeros((batch, count), np.int32), np.zeros((batch, count), np.int32)
    dropped = np.zeros(batch, np.int32)
    with np.errstate(over="ignore"):
        for b in range(batch):
            ids = segments[b].astype(np.int64).ravel()
            image_key = mix(mix(np.array([int(key)], np.uint32)) + np.uint32(0x9E3779B9) + np.uint32(b))
            number = np.arange(ids.size, dtype=np.uint32)
            draw = mix(mix(number * np.uint32(0x9E3779B9)) ^ image_key) >> np.uint32(10)
            present, sizes = np.unique(ids[(ids > 0) & (ids < 65536)], return_counts=True)
            largest = sorted(zip(-sizes, present, strict=True))
            dropped[b] = max(0, len(largest) - count)
            for rank, (size, name) in enumerate(largest[:count]):
                members = np.flatnonzero(ids == name)
                members = members[np.lexsort((members, draw[members]))][:pixels]
                index[b, rank, : len(members)] = members
                segment[b, rank], taken[b, rank] = name, min(-size, pixels)
    return index, segment, taken, dropped


def same(actual, wanted):
    for name, a, b in zip(sampling.Samples._fields, actual, wanted, strict=True):
        assert np.array_equal(a.cpu().numpy(), b), name


def blocks(rng, batch, h, w, names):
    """Ids in patches, some pixels without one."""
    grid = rng.choice(names, (batch, -(-h // 3), -(-w // 5)))
    ids = grid.repeat(3, 1).repeat(5, 2)[:, :h, :w].copy()
    ids[rng.random(ids.shape) < 0.1] = 0
    return ids.astype(np.int32)


CASES = {
    "patches": (lambda rng: blocks(rng, 3, 37, 41, np.arange(1, 40)), 16, 8),
    "more than K": (lambda rng: blocks(rng, 2, 40, 60, np.arange(1, 400)), 7, 5),
    "all K equal": (lambda rng: np.arange(1, 301, dtype=np.int32).reshape(1, 15, 20).repeat(4, 2), 100, 3),
    "not compact": (lambda rng: blocks(rng, 2, 20, 30, np.array([1, 2, 777, 65535, 40000])), 8, 16),
    "no segment": (lambda rng: np.zeros((2, 9, 11), np.int32), 4, 4),
    "one image without": (
        lambda rng: blocks(rng, 2, 9, 11, np.array([5])) * np.array([0, 1], np.int32)[:, None, None],
        4,
        4,
    ),
    "one segment": (lambda rng: np.full((1, 70, 90), 9, np.int32), 3, 1024),
    "a pixel each": (lambda rng: rng.permutation(70 * 90).reshape(1, 70, 90).astype(np.int32), 50, 2),
    "beyond the ids": (lambda rng: blocks(rng, 1, 20, 30, np.array([-5, 0, 65536, 70000, 3])), 4, 6),
    "several tiles": (lambda rng: blocks(rng, 2, 101, 131, np.arange(1, 30)), 32, 33),
    "one pixel": (lambda rng: np.array([[[7]]], np.int32), 1, 1),
    "no pixels": (lambda rng: np.zeros((2, 0, 5), np.int32), 3, 2),
    "no images": (lambda rng: np.zeros((0, 4, 5), np.int32), 3, 2),
    "most": (lambda rng: blocks(rng, 1, 120, 150, np.arange(1, 1200)), 1023, 4),
}
