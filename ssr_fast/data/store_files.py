"""Prepared stores: a data set's images, resized once, with its train ids and segments, in a few large files.

A store is a folder with
 store.json                what made it;
 index.json                every sample: name, sizes, class counts, where it lies, checksums (its own too);
 images-00000.npy, ...     uint8 [bytes]: RGB pixels [H, W, 3] one image after another (raw), or JPEG files (jpeg);
 labels-00000.npy, ...     uint8 [pixels]: train ids, where the set has labels;
 segments-00000.npy, ...   uint16 [pixels]: segment ids, 0 is none, where segments were given;
 DAFormer's three files of class statistics, where the set has labels.
They are plain one-dimensional NumPy arrays, which any process maps into its memory: a crop is read, not an image.
H W pixels of a stored image, K classes.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.images import BadFile
from ssr_fast.data.stores import Recipe

DTYPES: dict[str, str] = {"images": "|u1", "labels": "|u1", "segments": "<u2"}
HEADER_BYTES = 128  # of a .npy file with one dimension
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One sample.

    Args:
        name: unique in the store.
        image: path of the original below the data set's root.
        label: the same of its label; None without labels.
        width, height: pixels of the original.
        files: length and time of the last change (ns) of the original image and label: these, if made again, are
            compared to see what has changed.
        counts: pixels of each class in the original label, [K]; None without labels.
        stored: (width, height) of the stored image.
        shard: number of the files that hold it.
        start, stop: bytes of the image in its file, without the header.
        first: number of its first pixel in the files of labels and segments.
        sums: checksum of what is stored, by kind: images, labels, segments.
    """

    name: str
    image: str
    label: str | None
    width: int
    height: int
    files: tuple[tuple[int, int], tuple[int, int]]
    counts: tuple[int, ...] | None
    stored: tuple[int, int]
    shard: int
    start: int
    stop: int
    first: int
    sums: Mapping[str, str]

    @staticmethod
    def of(fields: Mapping[str, Any]) -> "Row":
        """A row of index.json."""
        whole = dict(fields)
        whole["files"] = tuple(tuple(stamp) for stamp in fields["files"])
        whole["stored"] = tuple(fields["stored"])
        whole["counts"] = None if fields["counts"] is None else tuple(fields["counts"])
        return Row(**whole)

    @property
    def pixels(self) -> int:
        """H W."""
        return self.stored[0] * self.stored[1]

    def span(self, kind: str) -> tuple[int, int]:
        """Its bytes in the file of a kind, with the header."""
        start, stop = self.start, self.stop
        if kind != "images":
            size = np.dtype(DTYPES[kind]).itemsize
            start, stop = self.first * size, (self.first + self.pixels) * size
        return HEADER_BYTES + start, HEADER_BYTES + stop


def kinds(recipe: Recipe) -> tuple[str, ...]:
    """Which of images, labels, segments a recipe stores."""
    return ("images", *["labels"] * bool(recipe.options["labelled"]), *["segments"] * bool(recipe.options["segments"]))


def shard_name(kind: str, shard: int) -> str:
    """Of a file."""
    return f"{kind}-{shard:05d}.npy"


def checksum(content: bytes | NDArray[Any]) -> str:
    """blake2b of 16 bytes, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()  # type: ignore[arg-type]


def header(kind: str, count: int) -> bytes:
    """The first bytes of a .npy file of `count` numbers."""
    file = io.BytesIO()
    content = {"descr": DTYPES[kind], "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, content)
    assert file.tell() == HEADER_BYTES
    return file.getvalue()


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """image uint8 [H, W, 3] RGB -> a JPEG file of quality 95, 4:4:4."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def decode_jpeg(content: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    """A JPEG file -> RGB uint8 [H, W, 3]; `path` is for the error."""
    try:
        with Image.open(io.BytesIO(content)) as image:  # type: ignore[arg-type]
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadFile(path, f"holds a JPEG that cannot be decoded ({error})", "make the store anew") from error


def checksum_of(file: IO[bytes], start: int, stop: int) -> str:
    """Checksum of a part of a file, a chunk at a time."""
    total = hashlib.blake2b(digest_size=16)
    file.seek(start)
    while start < stop:
        chunk = file.read(min(_CHUNK, stop - start))
        if not chunk:
            break
        total.update(chunk)
        start += len(chunk)
    return total.hexdigest()
