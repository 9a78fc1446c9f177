"""Stored features of a whole data set in one piece of memory: which of its tokens a view is made of.

T tokens of all images one after another, D channels; h w tokens of a view.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.feature_map import FeatureMap, Geometry, taps
from ssr_fast.data.features import FeatureStore
from ssr_fast.data.index import Sample

_MOST_THREADS = 16


@dataclass(frozen=True)
class Resident:
    """Where an image's tokens are: `rows` x `columns` of them from number `first` on."""

    first: int
    rows: int
    columns: int
    geometry: Geometry


@dataclass(frozen=True)
class Residents:
    """Where the tokens of every image of a data set are."""

    images: Mapping[str, Resident]

    def places(
        self, image: str, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int], flip: bool
    ) -> NDArray[np.float64]:
        """What a view is made of; arguments as of FeatureMap.cut.

        Returns:
            [h + w, 3]: of each row of the view the first token of the stored row above it, that of the one below, and
            the weight of the one below; of each column the same as numbers within a stored row.
        """
        found = self.images[image]
        rows, columns = taps(found.geometry, (found.rows, found.columns), size, corner, crop)
        down = np.stack([found.first + rows[0] * found.columns, found.first + rows[1] * found.columns, rows[2]], axis=1)
        across = np.stack([*columns], axis=1)
        return np.concatenate([down, across[::-1] if flip else across]).astype(np.float64)


def read_residents(
    store: FeatureStore, samples: Sequence[Sample]
) -> tuple[Residents, NDArray[Any], NDArray[np.float32] | None]:
    """All features of a data set.

    Args:
        store: whole, see FeatureStore.require.
        samples: the images.

    Returns:
        (where each image's tokens are, int8 or float16 [T, D], float32 [T, 1] scales of int8).

    Raises:
        UserError: a file is damaged.
    """

    def read(sample: Sample) -> FeatureMap:
        return store.read(sample.image, (sample.width, sample.height))

    images: dict[str, Resident] = {}
    values: list[NDArray[Any]] = []
    scales: list[NDArray[np.float32]] = []
    count = 0
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for sample, found in zip(samples, pool.map(read, samples), strict=True):
            rows, columns, channels = found.values.shape
            images[str(sample.image)] = Resident(count, rows, columns, found.geometry)
            values.append(found.values.reshape(-1, channels))
            scales += [] if found.scales is None else [found.scales.reshape(-1, 1)]
            count += rows * columns
    return Residents(images), np.concatenate(values), np.concatenate(scales) if scales else None
