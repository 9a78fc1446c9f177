"""Feature stores: the frozen encoder's features of each whole, un-augmented image, made once, cut by the loader.

A store is a folder with store.json, which says what made it, and one file an image, at the image's path below the data
set's root with .features appended. A file is a header (`_HEADER`), for int8 one float32 scale a token [h, w], and the
values [h, w, D], int8 or float16, all little-endian. Its checksum covers everything behind itself.
H W pixels, h w tokens, D channels.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.feature_map import FeatureMap, Geometry
from ssr_fast.data.images import BadFile
from ssr_fast.data.index import Sample
from ssr_fast.data.stores import Recipe, Store, StoreKind, create_folder, open_folder, write_file
from ssr_fast.errors import UserError

COMMAND = "python -m ssr_fast.prepare features"
DTYPES = ("int8", "fp16")

_KIND = StoreKind("features", "feature store", COMMAND)
_MAGIC = b"SSRFEAT1"  # the last character is the format's version
_HEADER = struct.Struct("<8s16s16s4s8I")
"""Magic, blake2b, recipe, dtype; D, h, w, stride, image's width and height, the encoder's input width and height."""
_COVERED = 24  # the checksum covers the bytes from here on


@dataclass(frozen=True)
class FeatureShape:
    """What all files of a store have in common: D `channels`, and `stride`, the encoder's pixels a token."""

    channels: int
    stride: int


class FeatureStore(Store[FeatureMap]):
    """The features of one data set; made by `open_features` or `create_features`. Its recipe's option `dtype` is one of
    DTYPES."""

    suffix = ".features"

    def read(self, image: Path | str, size: tuple[int, int] | None = None) -> FeatureMap:
        """An image's features.

        Args:
            image: path of the image.
            size: (width, height) of the image; None takes any.

        Raises:
            UserError: the file is missing, damaged, of an image of another size or of another recipe; the sentence
                names it and the command that makes it.
        """
        try:
            return self._decode(image, size)
        except BadFile as error:
            raise UserError(self._advised(error)) from error

    def require(self, samples: Sequence[Sample]) -> FeatureShape:
        """Look for the features of every sample: there, whole in length, of its image's size (`read` finds damage).

        Raises:
            UserError: names the first that is not, and counts the others.
        """
        bad: list[str] = []
        shapes: dict[FeatureShape, Path] = {}
        for sample in samples:
            path = self.path(sample.image)
            try:
                with _opened(path) as file:
                    fields = self._header(path, file.read(_HEADER.size), path.stat().st_size)
                self._check_size(path, fields, (sample.width, sample.height))
                shapes.setdefault(FeatureShape(fields[0], fields[3]), path)
            except BadFile as error:
                bad.append(self._advised(error))
        if bad:
            raise UserError(f"{bad[0]}; {len(bad)} of {len(samples)} images want features" if len(bad) > 1 else bad[0])
        if len(shapes) != 1:
            one, two = list(shapes)[:2]
            raise UserError(
                f"{shapes[one]} and {shapes[two]} hold features of different encoders ({one} and {two}); run "
                f"`{COMMAND} {self.root}` with --overwrite"
            )
        return next(iter(shapes))

    def write(self, image: Path | str, features: NDArray[np.float32], geometry: Geometry) -> None:
        """Write an image's features, whole or not at all; on the disk when it returns.

        Args:
            image: path of the image.
            features: float32 [h, w, D].
            geometry: where the tokens lie.

        Raises:
            BadFile: they are not finite, or too large for the store's dtype.
            UserError: the file cannot be written.
        """
        if features.dtype != np.float32 or features.ndim != 3:
            raise ValueError(f"features must be float32 [h, w, D], not {features.dtype} {features.shape}")
        if not np.isfinite(features).all():
            raise BadFile(Path(image), "has features that are not finite", "check the encoder and its weights")
        dtype = self.recipe.options["dtype"]
        if dtype == "fp16" and np.abs(features).max() > np.finfo(np.float16).max:
            raise BadFile(Path(image), "has features beyond what fp16 holds", "give --dtype int8")
        payload = _int8(features) if dtype == "int8" else features.astype("<f2").tobytes()
        rows, columns, channels = features.shape
        numbers = (channels, rows, columns, geometry.stride, *geometry.size, *geometry.seen)
        recipe, kind = self.recipe.digest.encode(), dtype.encode()
        covered = _HEADER.pack(_MAGIC, b"", recipe, kind, *numbers)[_COVERED:] + payload
        content = _MAGIC + _checksum(covered) + covered
        write_file(self.path(image), self.folder, lambda file: file.write(content), to_disk=True)

    def _decode(self, image: Path | str, size: tuple[int, int] | None) -> FeatureMap:
        path = self.path(image)
        with _opened(path) as file:
            content = file.read()
        if len(content) >= _COVERED and content[:8] == _MAGIC and content[8:_COVERED] != _checksum(content[_COVERED:]):
            raise BadFile(path, "is damaged or cut short (its checksum is another)", "make it again")
        fields = self._header(path, content[: _HEADER.size], len(content))
        channels, rows, columns, stride, width, height, seen_width, seen_height = fields
        if size is not None:
            self._check_size(path, fields, size)
        geometry = Geometry((width, height), (seen_width, seen_height), stride)
        payload, shape, tokens = content[_HEADER.size :], (rows, columns, channels), rows * columns
        if self.recipe.options["dtype"] == "fp16":
            return FeatureMap(np.frombuffer(payload, "<f2").reshape(shape), None, geometry)
        scales = np.frombuffer(payload, "<f4", tokens).reshape(rows, columns, 1)
        return FeatureMap(np.frombuffer(payload, np.int8, offset=4 * tokens).reshape(shape), scales, geometry)

    def _header(self, path: Path, head: bytes, length: int) -> tuple[int, ...]:
        """The numbers of a file's header.

        Raises:
            BadFile: it is of another kind, length or recipe.
        """
        if head[:8] != _MAGIC[: len(head)] or not head:
            raise BadFile(path, "is no feature file of this version", "make it again")
        if len(head) < _HEADER.size:
            raise BadFile(path, "is cut short", "make it again")
        _, _, recipe, kind, *fields = _HEADER.unpack(head)
        dtype = kind.rstrip(b"\0").decode("ascii", "replace")
        if recipe != self.recipe.digest.encode() or dtype != self.recipe.options["dtype"]:
            raise BadFile(path, "was made with other options than its store", "make it again")
        channels, rows, columns = fields[:3]
        expected = _HEADER.size + rows * columns * (2 * channels if dtype == "fp16" else channels + 4)
        if length != expected or not all(fields):
            raise BadFile(path, f"has {length} bytes where its header says {expected}", "make it again")
        return tuple(fields)

    def _check_size(self, path: Path, fields: tuple[int, ...], size: tuple[int, int]) -> None:
        width, height = fields[4:6]
        if (width, height) != size:
            sizes = f"is of an image of {width}x{height} pixels and the image has {size[0]}x{size[1]}"
            raise BadFile(path, sizes, "make it again")

    def _advised(self, error: BadFile) -> str:
        return f"the feature file {error.path} {error.problem}; run `{COMMAND} {self.root}` as this store was made"


def open_features(folder: str, root: Path, option: str) -> FeatureStore:
    """The store that an option names.

    Args:
        folder: of the store; empty: `features` in the data set's root.
        root: of the data set (the layout's).
        option: the option's name, for errors.

    Raises:
        UserError: there is no store, it is damaged, or no feature store.
    """
    path, recipe = open_folder(_KIND, folder, root, option)
    if recipe.options.get("dtype") not in DTYPES:
        raise UserError(
            f"--{option}: {path} is a store of something else ({recipe}); give a folder that `{COMMAND}` made"
        )
    return FeatureStore(path, root, recipe)


def create_features(folder: Path | None, root: Path, recipe: Recipe, overwrite: bool) -> FeatureStore:
    """The store in `folder` (None: `features` in the data set's root), made if there is none.

    Raises:
        UserError: the folder holds features of another recipe (and not `overwrite`), other things, or cannot be
            written.
    """
    return FeatureStore(create_folder(_KIND, folder, root, recipe, overwrite), root, recipe)


def _opened(path: Path) -> Any:
    """The open file.

    Raises:
        BadFile: it is missing or cannot be read.
    """
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise BadFile(path, "is missing", "make it") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror})", "check its permissions") from error


def _int8(features: NDArray[np.float32]) -> bytes:
    """Scales float32 [h, w] and values int8 [h, w, D] in bytes: symmetric, a scale a token, 0 for a token of zeros."""
    scales = (np.abs(features).max(2, keepdims=True) / np.float32(127)).astype("<f4")
    divisors = np.where(scales > 0, scales, np.float32(1))
    values = np.rint(features / divisors).clip(-127, 127).astype(np.int8)
    return scales.tobytes() + values.tobytes()


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
