"""Geometry of samples: resize, crop, flip; exact, on the host.

H W pixels. Images are RGB.
"""

from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.labels import IGNORE

MEAN = (123.675, 116.28, 103.53)
"""Of RGB values 0..255, over ImageNet; what lies outside of an image has this colour."""
STD = (58.395, 57.12, 57.375)

_Ids = TypeVar("_Ids", np.uint8, np.uint16)  # train ids, segment ids


def fitted_size(width: int, height: int, box: tuple[int, int] | None) -> tuple[int, int]:
    """Size (width, height) of an image resized to fit `box` with its ratio kept, rounded as mmcv does.

    The longer side fits the box's longer side and the shorter the shorter: 1914x1052 in (1280, 720) gives 1280x704.
    """
    if box is None:
        return width, height
    scale = min(max(box) / max(width, height), min(box) / min(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """image uint8 [H, W, 3] -> [size[1], size[0], 3], OpenCV's bilinear (as mmcv-based systems do)."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def resize_label(label: NDArray[_Ids], size: tuple[int, int]) -> NDArray[_Ids]:
    """label uint8 (or segments uint16) [H, W] -> [size[1], size[0]], OpenCV's nearest neighbour."""
    if (label.shape[1], label.shape[0]) == size:
        return label
    return cv2.resize(label, size, interpolation=cv2.INTER_NEAREST).astype(label.dtype, copy=False)


def crop_image(
    image: NDArray[np.uint8], corner: tuple[int, int], size: tuple[int, int], flip: bool
) -> NDArray[np.uint8]:
    """Cut a crop out of image [H, W, 3]; what lies outside is the mean colour (0 after normalisation).

    Args:
        corner: (x, y) of the crop's upper left corner.
        size: (height, width) of the crop.
        flip: mirror left to right after cutting.
    """
    return _cut(image, corner, size, flip, tuple(np.rint(MEAN).astype(int).tolist()))


def crop_label(
    label: NDArray[_Ids], corner: tuple[int, int], size: tuple[int, int], flip: bool, outside: int = IGNORE
) -> NDArray[_Ids]:
    """Cut a crop out of label (or segments) [H, W], as `crop_image`; what lies outside is ignored (255)."""
    return _cut(label, corner, size, flip, outside)


def _cut(
    array: NDArray[_Ids], corner: tuple[int, int], size: tuple[int, int], flip: bool, outside: int | tuple[int, ...]
) -> NDArray[_Ids]:
    """A part of array [H, W] or [H, W, 3], in memory of its own."""
    x, y = corner
    part = array[y : y + size[0], x : x + size[1]]
    if part.shape[:2] != size:
        whole = np.empty((*size, *array.shape[2:]), array.dtype)
        whole[:] = outside
        whole[: part.shape[0], : part.shape[1]] = part
        part = whole
    # OpenCV mirrors pixels of three bytes several times faster than NumPy
    return cv2.flip(part, 1).astype(array.dtype, copy=False) if flip else part.copy()
