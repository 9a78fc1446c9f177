"""Pictures of segments for people: an image beside its segments in colours that say nothing, with their boundaries.

H W pixels, S segments.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]

_GAP = 8  # pixels between pictures
_BACKGROUND = (23, 26, 31)
_BOUNDARY = (255, 255, 255)
_COLOR_SHARE, _NONE_SHARE = 0.6, 0.25  # of the colour in a segment; of the image where there is none
_LARGEST = 1024  # width of an image in a sheet of several
_GOLDEN_TURN = 0.6180339887498949  # hues of neighbouring ids lie far apart


def segment_picture(image: Picture, segments: NDArray[np.uint16]) -> Picture:
    """The image, and right of it its segments: coloured, with white boundaries, dark where there is no segment.

    Args:
        image: uint8 [H, W, 3] RGB.
        segments: uint16 [H, W], 0 none.

    Returns:
        uint8 [H, 2 W + gap, 3] RGB.
    """
    if image.shape[:2] != segments.shape:
        raise ValueError(f"image {image.shape[:2]} and segments {segments.shape} differ in size")
    grey = image.mean(2, keepdims=True, dtype=np.float32)  # [H, W, 1]
    mixed = grey * np.float32(1.0 - _COLOR_SHARE) + _colors(segments) * np.float32(_COLOR_SHARE)
    mixed = np.where((segments == 0)[..., None], image * np.float32(_NONE_SHARE), mixed)
    mixed[boundaries(segments)] = _BOUNDARY
    out = np.empty((image.shape[0], 2 * image.shape[1] + _GAP, 3), np.uint8)
    out[:] = _BACKGROUND
    out[:, : image.shape[1]], out[:, image.shape[1] + _GAP :] = image, np.rint(mixed).astype(np.uint8)
    return out


def boundaries(segments: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour lies in another segment, bool [H, W]."""
    found = np.zeros(segments.shape, np.bool_)
    found[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    found[:-1] |= segments[:-1] != segments[1:]
    return found


def sheet(pictures: Sequence[Picture]) -> Picture:
    """Pictures of any size below one another, those that are too wide reduced: uint8 [height, width, 3]."""
    reduced = [_reduced(picture) for picture in pictures]
    width = max(picture.shape[1] for picture in reduced)
    height = sum(picture.shape[0] + _GAP for picture in reduced) - _GAP
    out = np.empty((height, width, 3), np.uint8)
    out[:] = _BACKGROUND
    top = 0
    for picture in reduced:
        out[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + _GAP
    return out


def _colors(segments: NDArray[np.uint16]) -> NDArray[np.float32]:
    """A colour for each id: float32 [H, W, 3], 0 to 255."""
    hue = (np.arange(int(segments.max()) + 1) * _GOLDEN_TURN) % 1.0 * 6.0  # in sixths of a turn
    k = (hue[:, None] + np.array([5.0, 3.0, 1.0])) % 6.0
    table = 255.0 * (1.0 - np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))  # [ids, 3]
    colors: NDArray[np.float32] = table.astype(np.float32)[segments]
    return colors


def _reduced(picture: Picture) -> Picture:
    largest = 2 * _LARGEST + _GAP
    if picture.shape[1] <= largest:
        return picture
    height = max(1, round(picture.shape[0] * largest / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize((largest, height), Image.Resampling.BOX))
