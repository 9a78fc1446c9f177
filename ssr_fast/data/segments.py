"""Segment stores: one map of class-agnostic segments an image, made once, read by the loader.

A store is a folder with store.json, which says what made it, and one 16-bit grey PNG an image, at the image's own size
and at its path below the data set's root with .png appended (images/a.jpg -> images/a.jpg.png, so that no two images
share a map). Value 0 is no segment, 1..65535 are segments; an id means nothing outside its own map.
H W pixels, S segments.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from ssr_fast.data.images import BadFile, opened
from ssr_fast.data.index import Sample
from ssr_fast.data.stores import Recipe, Store, StoreKind, create_folder, open_folder, write_file
from ssr_fast.errors import UserError

MAX_SEGMENTS = 65535
"""Ids that a map has room for beside 0, none."""

COMMAND = "python -m ssr_fast.prepare masks"

_KIND = StoreKind("segments", "segment store", COMMAND)
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_KEY = "ssr_fast"  # the PNG text that ties a map to its store's recipe


class SegmentStore(Store[NDArray[np.uint16]]):
    """The maps of one data set; made by `open_store` or `create_store`."""

    suffix = ".png"

    def read(self, image: Path | str, size: tuple[int, int] | None = None) -> NDArray[np.uint16]:
        """An image's segments, uint16 [H, W], 0 where there is none.

        Args:
            image: path of the image.
            size: (width, height) that the map must have; None takes any.

        Raises:
            UserError: the map is missing, damaged, of another size or recipe; the sentence names it and the command
                that makes it.
        """
        try:
            return self._decode(image, size)
        except BadFile as error:
            raise UserError(f"the segment map {error.path} {error.problem}; run `{COMMAND} {self.root}`") from error

    def require(self, samples: Sequence[Sample]) -> None:
        """Look for the map of every sample: there and of its image's size (`read` finds damage).

        Raises:
            UserError: names the first that is not, and counts the others.
        """
        bad: list[str] = []
        for sample in samples:
            path = self.path(sample.image)
            try:
                self._header(path, (sample.width, sample.height), lambda image: None)
            except BadFile as error:
                bad.append(f"the segment map {path} {error.problem}")
        if bad:
            more = f" (and {len(bad) - 1} more of {len(samples)})" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{more}; run `{COMMAND} {self.root}`, with --split and --out as they are here")

    def write(self, image: Path | str, segments: NDArray[np.uint16]) -> None:
        """Write an image's map, whole or not at all.

        Args:
            image: path of the image.
            segments: uint16 [H, W].

        Raises:
            UserError: it cannot be written.
        """
        if segments.dtype != np.uint16 or segments.ndim != 2:
            raise ValueError(f"segments must be uint16 [H, W], not {segments.dtype} {segments.shape}")
        text = PngInfo()
        text.add_text(_KEY, self.recipe.digest)
        picture = Image.fromarray(np.ascontiguousarray(segments))
        # a map that a power failure cut short is found by its check sums and made again: nothing waits for the disk
        write_file(self.path(image), self.folder, lambda file: picture.save(file, "PNG", pnginfo=text))

    def _decode(self, image: Path | str, size: tuple[int, int] | None) -> NDArray[np.uint16]:
        path = self.path(image)
        # the sums first: Pillow's decoder looks at none, and takes some flipped bits for other pixels
        self._header(path, size, lambda file: file.verify())
        if not path.read_bytes().endswith(_PNG_END):
            raise BadFile(path, "is cut short", "make it again")
        values: list[NDArray[np.uint16]] = []
        self._header(path, size, lambda file: values.append(np.array(file).astype(np.uint16, copy=False)))
        return values[0]

    def _header(self, path: Path, size: tuple[int, int] | None, use: Callable[[ImageFile.ImageFile], object]) -> None:
        """Open a map, check what its header says, and hand it on.

        Raises:
            BadFile: what is wrong with the map.
        """
        try:
            os.stat(path)
        except FileNotFoundError as error:
            raise BadFile(path, "is missing", "make it") from error
        except OSError:
            pass  # opening it gives the reason
        with opened(path) as image:
            # Pillow before 11 opens 16-bit grey as I, whose only PNG form it is
            if image.format != "PNG" or image.mode not in ("I;16", "I"):
                raise BadFile(path, "is no segment map (a 16-bit grey PNG)", "make it again")
            if size is not None and image.size != size:
                found, wanted = (f"{width}x{height}" for width, height in (image.size, size))
                raise BadFile(path, f"is {found} pixels and its image is {wanted}", "make it again")
            if image.info.get(_KEY) != self.recipe.digest:
                raise BadFile(path, "was made with other options than its store", "make it again")
            use(image)


def open_store(folder: str, root: Path, option: str = "data.segments") -> SegmentStore:
    """The store that an option names.

    Args:
        folder: of the store; empty: `segments` in the data set's root.
        root: of the data set (the layout's).
        option: the option's name, for errors.

    Raises:
        UserError: there is no store, or its store.json is damaged.
    """
    path, recipe = open_folder(_KIND, folder, root, option)
    return SegmentStore(path, root, recipe)


def create_store(folder: Path | None, root: Path, recipe: Recipe, overwrite: bool) -> SegmentStore:
    """The store in `folder` (None: `segments` in the data set's root), made if there is none.

    Raises:
        UserError: the folder holds maps of another recipe (and not `overwrite`), other things, or cannot be written.
    """
    return SegmentStore(create_folder(_KIND, folder, root, recipe, overwrite), root, recipe)


def compact(ids: NDArray[np.integer[Any]]) -> NDArray[np.uint16]:
    """Ids [H, W] of any integer type, none negative -> the same segments as 1..S in the order of their ids, uint16.

    0 stays 0. Of more than 65535 segments the largest are kept (of equal ones the lower ids), the others become 0.
    """
    values, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    keep = np.flatnonzero(values != 0)
    if len(keep) > MAX_SEGMENTS:
        largest = np.argsort(-counts[keep], kind="stable")[:MAX_SEGMENTS]
        keep = keep[np.sort(largest)]
    table = np.zeros(len(values), np.uint16)
    table[keep] = np.arange(1, len(keep) + 1, dtype=np.uint16)
    return table[inverse].reshape(ids.shape)
