"""The stored features of an image, and their crops: cut, resampled and mirrored with the image's own transform.

h w tokens, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of an image lie.

    Args:
        size: (width, height) of the image, in pixels.
        seen: (width, height) in pixels that the encoder saw it at.
        stride: pixels of `seen` that a token stands for, in both directions; token k covers k stride .. (k+1) stride.
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    stride: int


@dataclass(frozen=True)
class FeatureMap:
    """The stored features of one image.

    Args:
        values: int8 or float16 [h, w, D].
        scales: float32 [h, w, 1], what the values of a token are multiplied with; None for float16.
        geometry: where the tokens lie.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None
    geometry: Geometry

    def dense(self, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[np.float32]:
        """The features as numbers, float32 [h, w, D], of some rows and columns of tokens."""
        values = self.values[rows, columns].astype(np.float32)
        return values if self.scales is None else values * self.scales[rows, columns]

    def cut(
        self, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int], flip: bool
    ) -> NDArray[np.float32]:
        """The features of a view of the image, cut and mirrored as `crop_image` does with its pixels.

        The result has one token for each `stride` pixels of the crop, rounded to a whole number n; token i stands for
        the pixels i crop / n .. (i+1) crop / n (align_corners False). Its value is the bilinear interpolation, in
        float32, of the stored tokens at its centre; beyond the outermost centres theirs are repeated, so a part of the
        crop that lies outside of the image has the features of the image's edge. Where centres coincide (an image that
        was not resized, a corner on a token's) it is the stored token itself.

        Args:
            size: (width, height) that the image is resized to.
            corner: (x, y) of the crop's upper left corner in the resized image.
            crop: (height, width).
            flip: mirror left to right after cutting.

        Returns:
            float32 [h, w, D].
        """
        (top, down, row_weight), (left, right, column_weight) = taps(
            self.geometry, self.values.shape, size, corner, crop
        )
        part = self.dense(slice(top[0], down[-1] + 1), slice(left[0], right[-1] + 1))
        part = _blend(part, top - top[0], down - top[0], row_weight[:, None, None], 0)
        part = _blend(part, left - left[0], right - left[0], column_weight[None, :, None], 1)
        return np.ascontiguousarray(part[:, ::-1] if flip else part)


Taps = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Of each place along an axis: the stored token below, the one above, and the weight of that."""


def taps(
    geometry: Geometry, shape: Sequence[int], size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]
) -> tuple[Taps, Taps]:
    """Which stored tokens make those of a view, along rows and along columns.

    Args:
        shape: (h, w, ...) of what is stored.
        geometry, size, corner, crop: see FeatureMap.cut.
    """
    rows, columns = (
        _neighbours(
            _centres(crop[axis], corner[1 - axis], size[1 - axis], geometry.seen[1 - axis], geometry.stride),
            shape[axis],
        )
        for axis in (0, 1)
    )
    return rows, columns


def grid_of(pixels: int, stride: int) -> int:
    """Tokens along a side of a crop: one for each `stride` pixels, rounded, at least one."""
    return max(1, (2 * pixels + stride) // (2 * stride))


def _centres(crop: int, corner: int, size: int, seen: int, stride: int) -> NDArray[np.float64]:
    """Where the centres of a crop's tokens lie, in stored tokens counted from the centre of the first.

    One division of whole numbers, so that coinciding centres give whole numbers exactly.
    """
    n = grid_of(crop, stride)
    twice = (2 * n * corner + (2 * np.arange(n, dtype=np.int64) + 1) * crop) * seen
    return twice / (2 * n * stride * size) - 0.5


def _neighbours(places: NDArray[np.float64], count: int) -> Taps:
    """The tokens below and above each place, of `count`, and the weight of those above."""
    places = places.clip(0, count - 1)
    low = np.floor(places).astype(np.int64)
    weight = (places - low).astype(np.float32)
    return low, np.where(weight > 0, low + 1, low), weight


def _blend(
    part: NDArray[np.float32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    weight: NDArray[np.float32],
    axis: int,
) -> NDArray[np.float32]:
    below = part.take(low, axis)
    if not weight.any():
        return below
    mixed: NDArray[np.float32] = below * (1 - weight) + part.take(high, axis) * weight
    return mixed
