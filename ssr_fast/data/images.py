"""Decoding of image and label files, with the reason named when a file is bad.

Legend: H W pixels.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from ssr_fast.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""File name endings (lower case) that are taken for images."""

MAX_PIXELS = 89_478_485
"""Pillow's own bound for files that are not decompression bombs; the sets of the field stay under 25 million."""

MAX_SIDE = 65_535
"""Pixels a side, as in JPEG: a row costs its pointer and padding however narrow it is, and OpenCV has bounds too."""

MAX_BYTES = 1 << 30
"""Size of a file: MAX_PIXELS of 16-bit RGBA and half as much again. Decoders of WebP read all of it at once."""

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # of IMAGE_SUFFIXES; for EPS Pillow would run Ghostscript
_SINGLE = ("1", "L", "P", "I", "F")  # modes of one channel, besides those of 16 bits

_EXIF_ORIENTATION = 0x0112
_GIVE_RELEASED = "give the released GT/LABELS files, or name converted ones *_labelTrainIds.png"
_RESTORE = "restore it from its source or remove it"

_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError, struct.error,
    zlib.error, cv2.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What decoders raise on damaged files (SyntaxError is Pillow's word for a broken PNG)."""


class BadFile(UserError):
    """One file that cannot be used: `path`, the `problem` as a predicate, and `advice` what to do."""

    def __init__(self, path: Path, problem: str, advice: str) -> None:
        super().__init__(f"{printable(path)} {problem}; {advice}")
        self.path, self.problem, self.advice = path, problem, advice

    def __reduce__(self) -> tuple[type["BadFile"], tuple[Path, str, str]]:
        return BadFile, (self.path, self.problem, self.advice)  # loader processes send exceptions by pickle


def printable(path: Path) -> str:
    """A path for a sentence: line breaks, control characters and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def decode_image(path: Path) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Any image file -> (RGB uint8 [H, W, 3], notes on what had to be changed).

    Greyscale is repeated over the channels, palettes are looked up, alpha is dropped, CMYK is converted, and of
    16-bit values the high byte is kept (>> 8). The EXIF orientation is not applied: labels are drawn on stored pixels.

    Raises:
        BadFile: the file cannot be opened, is no image, is damaged, too large, or holds 32-bit or negative values.
    """
    with opened(path) as image:
        # Before the pixels are loaded the decoder's arguments show the file's depth, of which the mode says nothing:
        # 16-bit RGB opens as RGB, and 16-bit grey as I;16 or, before Pillow 11, as I.
        deep = any(";16" in str(tile) for tile in image.tile)
        notes = _notes(image, deep)
        rgb = _to_rgb(image, deep, path)
    if not rgb.any():
        notes.append("all black")
    return rgb, tuple(notes)


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Any image file -> RGB uint8 [H, W, 3]; conversions and errors as in `decode_image`."""
    return decode_image(Path(path))[0]


def decode_label(path: Path) -> NDArray[np.generic]:
    """A label file -> its raw values, integer [H, W] (palette files: the INDEX), or uint8 [H, W, 3] for a colour file.

    Raises:
        BadFile: as `decode_image`, or the file is a JPEG, or holds fractions.
    """
    with opened(path) as image:
        _refuse_jpeg(image, path)
        if image.mode == "PA":
            values = np.array(image.getchannel(0))
        elif image.mode in _SINGLE or image.mode.startswith("I;16"):
            values = np.array(image)
        else:
            values = np.array(image.convert("RGB"))
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype.kind not in "ui":
        raise BadFile(path, f"holds values of type {values.dtype}", "store labels as 8-bit PNG")
    return values


def decode_synthia_label(path: Path) -> NDArray[np.generic]:
    """A 16-bit SYNTHIA label -> its classes uint16 [H, W].

    The class is the first of three RGB channels and sits in the low byte, which Pillow cuts off: OpenCV reads it.

    Raises:
        BadFile: the file cannot be opened or decoded, is no PNG, or has not three channels.
    """
    with opened(path) as image:
        if image.format != "PNG":  # of other headers Pillow and OpenCV may read different sizes: the check is Pillow's
            raise BadFile(path, f"is a {image.format} where SYNTHIA's labels are PNG", _GIVE_RELEASED)
        image.verify()  # the chunks' checksums: OpenCV reserves whatever length a damaged chunk says, up to 4 GB
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise BadFile(path, "cannot be decoded (damaged or cut short)", _RESTORE)
    if values.ndim != 3 or values.shape[2] < 3:
        raise BadFile(
            path,
            "has one channel where a SYNTHIA label has the class in the first of three",
            _GIVE_RELEASED,
        )
    return values[:, :, 2]  # [H, W]; OpenCV's order is BGR


def palette_color(path: Path, index: int) -> tuple[int, ...] | None:
    """RGB colour at `index` of a file's palette; None if there is no such file, palette or entry."""
    try:
        with opened(path) as image:
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except BadFile:
        return None
    return tuple(palette[3 * index : 3 * index + 3]) if palette else None


@contextmanager
def opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The open file, header read and size checked; every decoding error in the body becomes a BadFile."""
    try:
        _check_file(path)
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise _too_large(path, f"{width}x{height} pixels")
            yield image
    except BadFile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, "as its header says") from error
    except UnidentifiedImageError as error:
        raise BadFile(path, "is not an image file in a known format", _RESTORE) from error
    except PermissionError as error:
        raise BadFile(path, "may not be read (permission denied)", "give yourself read permission") from error
    except _DECODE_ERRORS as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise BadFile(path, f"cannot be decoded ({reason})", _RESTORE) from error


def _check_file(path: Path) -> None:
    """What can be said before opening: a pipe would wait for ever, a device has no end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise BadFile(path, "is a folder where an image file is expected", "rename or remove it")
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(path, "is not a regular file (but a pipe, socket or device)", _RESTORE)
    if status.st_size == 0:
        raise BadFile(path, "is empty (0 bytes)", _RESTORE)
    if status.st_size > MAX_BYTES:
        raise BadFile(path, f"is too large ({status.st_size} bytes; the limit is {MAX_BYTES} bytes)", _RESTORE)


def _too_large(path: Path, size: str) -> BadFile:
    limit = f"the limit is {MAX_PIXELS} pixels, {MAX_SIDE} a side"
    return BadFile(path, f"is too large ({size}; {limit})", "cut it into parts or remove it")


def _refuse_jpeg(image: ImageFile.ImageFile, path: Path) -> None:
    """No label may have been through JPEG: as such, as the first of several pictures (MPO), or inside a TIFF."""
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")):
        raise BadFile(path, "is a JPEG, which does not keep class ids exact", "store labels as PNG")


def _notes(image: ImageFile.ImageFile, deep: bool) -> list[str]:
    """What `_to_rgb` will change, in words that go on 'N images are ...'."""
    notes = []
    if deep:
        notes.append("16-bit, scaled to 8 bits (>> 8)")
    if image.mode in ("L", "1", "LA", "La", "I") or image.mode.startswith("I;16"):
        notes.append("greyscale, repeated over R, G, B")
    if image.mode in ("P", "PA"):
        notes.append("palette files, converted to RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        notes.append(f"{image.mode}, the alpha channel is dropped")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.append(f"{image.mode}, converted to RGB")
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        notes.append("rotated by an EXIF tag, which is not applied")
    return notes


def _to_rgb(image: Image.Image, deep: bool, path: Path) -> NDArray[np.uint8]:
    """An open image of any mode -> RGB uint8 [H, W, 3]."""
    if image.mode.startswith("I;16") or (deep and image.mode == "I"):
        values = np.array(image)  # [H, W]
        if values.min() < 0:
            raise BadFile(path, "holds negative values", "convert it to 8-bit RGB")
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadFile(path, "holds 32-bit values, whose range is unknown", "convert it to 8-bit RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's documented way: straight to RGB it warns
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
