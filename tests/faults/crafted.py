"""Image files made byte by byte: sizes that lie, bombs, modes that no library writes."""

import io
import struct
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 48, 32
PNG_START = b"\x89PNG\r\n\x1a\n"
SHORT, LONG = 3, 4  # types of TIFF tags


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """RGB noise uint8 [H, W, 3], never black."""
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3)).astype(np.uint8)


def ids(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A label [H, W] of the ids 0..2 and some 255."""
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), (height, width))


def encoded(image: Image.Image | NDArray[np.generic], kind: str, **options: object) -> bytes:
    """The bytes of an image file of a Pillow format."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG, [H, W] or RGB(A) [H, W, 3 or 4]."""
    bgr = values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]
    return cv2.imencode(".png", bgr)[1].tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, pixels: bytes, depth: int = 8, color: int = 2, before: bytes = b"", end: bool = True
) -> bytes:
    """A PNG whose header says width x height and whose one IDAT holds `pixels`, packed already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return PNG_START + header + before + chunk(b"IDAT", pixels) + (chunk(b"IEND", b"") if end else b"")


def whole_png(seed: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A good picture with other chunks before or behind its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in picture(seed))
    data = png(WIDTH, HEIGHT, zlib.compress(rows), before=before)
    return data[:-12] + after + data[-12:]


def zeros_packed(count: int) -> bytes:
    """`count` zero bytes as a zlib stream a thousandth as long."""
    packer = zlib.compressobj(1)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & ((1 << 20) - 1))), packer.flush()])


def bilevel_png(width: int, height: int) -> bytes:
    """A black 1-bit PNG that is whole, however large."""
    return png(width, height, zeros_packed(((width + 7) // 8 + 1) * height), depth=1, color=0)


def tiff(tags: dict[int, tuple[int, int, int]], pixels: bytes = b"", order: str = "<", next_offset: int = 0) -> bytes:
    """A TIFF of the given tags, number -> (type, count, value or offset); `pixels` begin at byte 8 + 2 + 12 n + 4."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    rows = [struct.pack(order + "HHI", tag, kind, count) + _value(order, kind, count, value)
            for tag, (kind, count, value) in sorted(tags.items())]  # fmt: skip
    return (
        start
        + struct.pack(order + "IH", 8, len(rows))
        + b"".join(rows)
        + struct.pack(order + "I", next_offset)
        + pixels
    )


def _value(order: str, kind: int, count: int, value: int) -> bytes:
    return struct.pack(order + "HH", value, 0) if kind == SHORT and count == 1 else struct.pack(order + "I", value)


def plain_tiff(pixels: bytes, bits: int = 8, samples: int = 1, photometric: int = 1, **changed: object) -> bytes:
    """An uncompressed one-strip TIFF; `changed` replaces tags: t256=(LONG, 1, 7), or adds them; None removes one."""
    tags = {
        256: (LONG, 1, WIDTH),
        257: (LONG, 1, HEIGHT),
        258: (SHORT, 1, bits),
        259: (SHORT, 1, 1),
        262: (SHORT, 1, photometric),
        273: (LONG, 1, 0),
        277: (SHORT, 1, samples),
        278: (LONG, 1, HEIGHT),
        279: (LONG, 1, len(pixels)),
    }
    fixed = {int(name[1:]): value for name, value in changed.items() if name[0] == "t" and name[1:].isdigit()}
    tags.update(fixed)
    kept = {tag: value for tag, value in tags.items() if value is not None}
    if 273 not in fixed:
        kept[273] = (LONG, 1, 8 + 2 + 12 * len(kept) + 4)
    return tiff(kept, pixels, str(changed.get("order", "<")), int(str(changed.get("next_offset", 0))))


def palette_alpha_tiff(seed: int) -> bytes:
    """Palette indices with alpha (Pillow's mode PA): indices are `ids`, alpha is 77."""
    pixels = np.dstack([ids(seed), np.full((HEIGHT, WIDTH), 77, np.uint8)]).tobytes()
    entries = 11
    offset = 8 + 2 + 12 * entries + 4
    bits = struct.pack("<I", 8 | 8 << 16)
    (two_bits,) = struct.unpack("<I", bits)
    palette = np.arange(768, dtype="<u2").tobytes()
    return plain_tiff(
        pixels + palette,
        samples=2,
        photometric=3,
        t258=(SHORT, 2, two_bits),
        t279=(LONG, 1, len(pixels)),
        t273=(LONG, 1, offset),
        t320=(SHORT, 768, offset + len(pixels)),
        t338=(SHORT, 1, 2),
    )


def jpeg_sized(seed: int, width: int, height: int) -> bytes:
    """A good JPEG whose header says another size."""
    data = bytearray(encoded(picture(seed), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_sized(seed: int, width: int, height: int) -> bytes:
    """A good BMP whose header says another size; a negative height means rows from the top."""
    data = bytearray(encoded(picture(seed), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp_sized(seed: int, width: int, height: int) -> bytes:
    """An extended WebP whose canvas is said to be another size than its frame."""
    inner = encoded(picture(seed), "WEBP", lossless=True)[12:]
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_exif(seed: int, exif: bytes) -> bytes:
    """A good JPEG with `exif` as its EXIF block."""
    data = encoded(picture(seed), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + data[2:]


def flipped(data: bytes, at: int) -> bytes:
    """All bits of the byte `at` (negative: from the end) changed."""
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)
