"""The malformed images: damaged, mislabelled, absurd, of unusual modes, of unusual names."""

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from tests.faults import crafted
from tests.faults.crafted import HEIGHT, LONG, SHORT, WIDTH, chunk, encoded, picture, png, whole_png
from tests.faults.malformed import ANY, HANDLED, NAMED, Case, content, frames, link, sparse, special_files

FORMATS = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"lossless": True}),
}
NAMES = [
    "umlaut ä", "日本語", "emoji \U0001f6e3", "combining e\u0301", "not utf-8 \udcff\udcfe", "new\nline", "tab\tbed",
    "escape \x1b[31mred", "right-to-left \u202egnp", "[bold red]markup[x]", "%s {0} $HOME `id`", "-rf", "~",
    "back\\slash", "'quo\"ted'", " leading", "trailing ", "a..b", "*?[x]", "x" * 200, "ü" * 110, "CON", "a;b|c&d", "#1",
    "\u2028separator",
]  # fmt: skip


def image_cases() -> list[Case]:
    """All of them, but for `large_cases`."""
    groups = (_cut, _flipped, _no_images, _wrong_endings, _names, _sizes, _bombs, _modes, _metadata)
    return [case for group in groups for case in group()] + special_files("image", label=False)


def large_cases(count: int) -> list[Case]:
    """Whole images just below the limit, each of another size: a few kB that take up to 12 bytes a pixel to decode."""
    return [
        Case(f"large {side}", content(crafted.bilevel_png(side, side)), HANDLED) for side in range(9459 - count, 9459)
    ]


def _cut() -> Iterator[Case]:
    """Files that end too early; of the last bytes some hold no pixels."""
    for seed, (suffix, (kind, options)) in enumerate(FORMATS.items()):
        data = encoded(picture(seed), kind, **options)
        for length in (1 + seed % 3, 5, 12, 30, 60, len(data) // 4, len(data) // 2, len(data) * 9 // 10):
            yield Case(f"cut {suffix} at {length}", content(data[:length]), suffix=f".{suffix}")
        for rest in (9, 1):
            yield Case(f"cut {suffix} by {rest}", content(data[:-rest]), ANY, suffix=f".{suffix}")


def _flipped() -> Iterator[Case]:
    """One byte changed in signature, header, data or end; only PNG has checksums everywhere."""
    for seed, (suffix, (kind, options)) in enumerate(FORMATS.items()):
        data = encoded(picture(100 + seed), kind, **options)
        for at in (0, 9, 13, 17, 20, 25, 29, len(data) // 3, len(data) // 2, -15, -3):
            stem = f"flipped {suffix} {at}"
            expect = NAMED if suffix == "png" and at > 0 else ANY
            yield Case(stem, content(crafted.flipped(data, at)), expect, suffix=f".{suffix}")
    garbled = random.Random(1)
    for number in range(12):
        data = bytearray(encoded(picture(number), "JPEG" if number % 2 else "TIFF"))
        for at in garbled.sample(range(4, min(len(data), 600)), 8):
            data[at] = garbled.randrange(256)
        yield Case(f"garbled {number}", content(bytes(data)), ANY, suffix=".jpg" if number % 2 else ".tif")


def _no_images() -> Iterator[Case]:
    """Other files with an image's name."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", encoded(picture(), "PNG"))
    array = io.BytesIO()
    np.save(array, picture())
    others = {
        "text": b"this is no picture\n",
        "utf-16": "no picture".encode("utf-16"),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "zip": archive.getvalue(),
        "gzip": gzip.compress(encoded(picture(), "PNG"), mtime=0),
        "npy": array.getvalue(),
        "pdf": b"%PDF-1.4\n%%EOF\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n",
        "gif": encoded(picture(5), "GIF"),
        "huge gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(9) + b";",
        "ico": encoded(picture(6), "ICO"),
        "elf": b"\x7fELF" + bytes(60),
        "zeros": bytes(1000),
        "noise": random.Random(7).randbytes(4000),
        "only a signature": crafted.PNG_START,
        "only SOI": b"\xff\xd8\xff",
        "only RIFF": b"RIFF\xff\xff\xff\xffWEBP",
        "only BM": b"BM",
        "only II": b"II*\0",
    }
    yield Case("empty", content(b""), words="is empty")
    for name, data in others.items():
        yield Case(f"is {name}", content(data), words="")


def _wrong_endings() -> Iterator[Case]:
    """A good image of another format than its name says is read as what it is."""
    for seed, (suffix, kind) in enumerate(
        [("png", "JPEG"), ("jpg", "PNG"), ("bmp", "WEBP"), ("webp", "BMP"), ("tif", "PNG"), ("JPEG", "TIFF")]
    ):
        yield Case(f"{kind} as {suffix}", content(encoded(picture(200 + seed), kind)), HANDLED, suffix=f".{suffix}")
    yield Case("good link", link("JPEG as png.png"), HANDLED)


def _names() -> Iterator[Case]:
    """Names of every kind, once with a good file and once with a bad one."""
    for number, name in enumerate(NAMES):
        yield Case(name, content(encoded(picture(300 + number), "PNG")), HANDLED)
        yield Case(f"{name}!", content(f"no picture {number}".encode()), words="is not an image")


def _sizes() -> Iterator[Case]:
    """Headers that say absurd sizes over little data."""
    little = zlib.compress(bytes(100))
    for width, height in ((0, 0), (0, 5), (5, 0), (2**31 - 1, 1), (2**31, 1), (2**32 - 1, 2**32 - 1), (60000, 60000),
                          (10000, 10000), (1, 2**31 - 1), (9459, 9459), (1, 89_000_000), (89_000_000, 1)):  # fmt: skip
        yield Case(f"png {width}x{height}", content(png(width, height, little)))
    yield Case("png below the limit, 16-bit", content(png(9400, 9400, little, depth=16)))
    yield Case("png 1x1", content(png(1, 1, zlib.compress(b"\0abc"))), HANDLED, size=(1, 1))
    yield Case("png no data", content(png(48, 32, b"")))
    yield Case("png depth 3", content(png(48, 32, little, depth=3)))
    yield Case("png colour type 9", content(png(48, 32, little, color=9)))
    yield Case("png palette missing", content(png(48, 32, zlib.compress(bytes(49 * 32)), color=3)), ANY)
    for width, height in ((65535, 65535), (0, 0), (48, 0), (WIDTH * 40, HEIGHT * 40)):
        yield Case(f"jpg {width}x{height}", content(crafted.jpeg_sized(9, width, height)), ANY, suffix=".jpg")
    for width, height in ((0, 0), (-48, 32), (2**31 - 1, 2**31 - 1), (9459, 9459), (48, -(2**31))):
        yield Case(f"bmp {width}x{height}", content(crafted.bmp_sized(9, width, height)), suffix=".bmp")
    yield Case("bmp from the top", content(crafted.bmp_sized(9, WIDTH, -HEIGHT)), HANDLED, suffix=".bmp")
    for width, height in ((16383, 16383), (2**24, 2**24), (WIDTH * 50, HEIGHT * 50)):
        yield Case(f"webp {width}x{height}", content(crafted.webp_sized(9, width, height)), ANY, suffix=".webp")
    pixels = picture(8)[..., 0].tobytes()
    for name, tags in {
        "wide": {"t256": (LONG, 1, 2**32 - 1)},
        "flat": {"t257": (LONG, 1, 0)},
        "no width": {"t256": None},
        "wide pair": {"t256": (LONG, 2**31, 8)},
        "below the limit": {"t256": (LONG, 1, 9459), "t257": (LONG, 1, 9459), "t278": (LONG, 1, 9459)},
        "tiles 0x0": {"t322": (LONG, 1, 0), "t323": (LONG, 1, 0), "t324": (LONG, 1, 8), "t325": (LONG, 1, 8)},
        "offset behind the end": {"t273": (LONG, 1, 2**31)},
        "strip of 4 GB": {"t279": (LONG, 1, 2**32 - 1)},
        "4 billion strips": {"t273": (LONG, 2**32 - 1, 8), "t279": (LONG, 2**32 - 1, 8)},
        "rows 0": {"t278": (LONG, 1, 0)},
        "bits of a giant count": {"t258": (SHORT, 2**32 - 1, 8)},
        "65535 samples": {"t277": (SHORT, 1, 65535)},
        "compression 9999": {"t259": (SHORT, 1, 9999)},
        "deflate of noise": {"t259": (SHORT, 1, 8)},
        "fax of noise": {"t259": (SHORT, 1, 4), "t258": (SHORT, 1, 1)},
        "jpeg of noise": {"t259": (SHORT, 1, 7)},
        "width as text": {"t256": (2, 8, 8)},
        "width as fraction": {"t256": (5, 1, 0)},
    }.items():
        yield Case(f"tif {name}", content(crafted.plain_tiff(pixels, **tags)), ANY, suffix=".tif")


def _bombs() -> Iterator[Case]:
    """Little files that unpack to much, and files that claim to be huge."""
    packed = crafted.zeros_packed(96 << 20)
    yield Case("bomb behind the pixels", content(png(WIDTH, HEIGHT, packed)), HANDLED)
    yield Case("bomb 30000x30000", content(crafted.bilevel_png(30000, 3000)), words="too large")
    text = b"Comment\0\0" + packed
    for name, extra in {
        "zTXt": chunk(b"zTXt", text),
        "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        "iCCP": chunk(b"iCCP", b"profile\0\0" + packed),
        "many zTXt": chunk(b"zTXt", b"C\0\0" + crafted.zeros_packed((1 << 20) - 1)) * 100,
        "long tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * (3 << 20)),
        "30000 chunks": chunk(b"teSt", b"") * 30_000,
        "chunk of 4 GB": struct.pack(">I", 2**32 - 1) + b"teSt",
        "text chunk of 2 GB": struct.pack(">I", 2**31 - 1) + b"tEXt",
        "fcTL only": chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
    }.items():
        yield Case(f"bomb {name} before", content(whole_png(10, before=extra)), ANY)
        yield Case(f"bomb {name} after", content(whole_png(11, after=extra)), ANY)
    yield Case("huge nothing", sparse(b"", 5 << 30))
    yield Case("huge webp", sparse(b"RIFF\xff\xff\xff\xffWEBPVP8L", 6 << 30), words="too large", suffix=".webp")
    yield Case("huge jpg", sparse(encoded(picture(12), "JPEG"), 7 << 30), words="too large", suffix=".jpg")
    yield Case("padded png", sparse(encoded(picture(13), "PNG"), 40 << 20), HANDLED)


def _modes() -> Iterator[Case]:
    """Whole images of every mode."""
    rgb, grey = Image.fromarray(picture(20)), Image.fromarray(picture(21)[..., 0])
    alpha = rgb.copy()
    alpha.putalpha(grey)
    wide = np.random.default_rng(22).integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(np.uint16)
    signed = wide[..., 0].astype("<i2").tobytes()
    good = {
        "1.png": encoded(grey.convert("1"), "PNG"),
        "L.png": encoded(grey, "PNG"),
        "LA.png": encoded(alpha.convert("LA"), "PNG"),
        "P.png": encoded(rgb.convert("P"), "PNG"),
        "P bytes transparency.png": encoded(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
        "RGB transparency.png": encoded(rgb, "PNG", transparency=(1, 2, 3)),
        "2-bit.png": encoded(rgb.quantize(4), "PNG", bits=2),
        "I;16.png": crafted.deep_png(wide[..., 0]),
        "RGB;16.png": crafted.deep_png(wide[..., :3]),
        "RGBA;16.png": crafted.deep_png(wide),
        "RGBA.png": encoded(alpha, "PNG"),
        "animated.png": encoded(frames(30)[0], "PNG", save_all=True, append_images=frames(31)),
        "animated.webp": encoded(frames(32)[0], "WEBP", save_all=True, append_images=frames(33)),
        "frames.tif": encoded(frames(34)[0], "TIFF", save_all=True, append_images=frames(35)),
        "frames.jpg": encoded(frames(36)[0], "MPO", save_all=True, append_images=frames(37)),
        "grey.jpg": encoded(grey, "JPEG"),
        "CMYK.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "CMYK.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "YCbCr.tif": encoded(rgb.convert("YCbCr"), "TIFF"),
        "RGBA.webp": encoded(alpha, "WEBP"),
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"),
        "big.tif": encoded(rgb, "TIFF", big_tiff=True),
        "deflate.tif": encoded(rgb, "TIFF", compression="tiff_deflate"),
        "1.tif": encoded(grey.convert("1"), "TIFF", compression="group4"),
        "P.bmp": encoded(rgb.convert("P"), "BMP"),
        "PA.tif": crafted.palette_alpha_tiff(23),
        "I;16.tif": encoded(wide[..., 0].copy(), "TIFF"),
        "I;16B.tif": crafted.plain_tiff(wide[..., 1].astype(">u2").tobytes(), bits=16, order=">"),
        "looping.tif": crafted.plain_tiff(picture(24)[..., 0].tobytes(), next_offset=8),
        "white is zero.tif": crafted.plain_tiff(picture(25)[..., 0].tobytes(), photometric=0),
    }
    bad = {
        "I.tif": encoded(wide[..., 0].astype(np.int32), "TIFF"),
        "F.tif": encoded(wide[..., 0].astype(np.float32), "TIFF"),
        "NaN.tif": encoded(np.full((HEIGHT, WIDTH), np.nan, np.float32), "TIFF"),
        "signed.tif": crafted.plain_tiff(signed, bits=16, t339=(SHORT, 1, 2)),
    }
    decided = {"LAB.tif": encoded(Image.merge("LAB", rgb.split()), "TIFF")}
    for files, expect in ((good, HANDLED), (bad, NAMED), (decided, ANY)):
        for name, data in files.items():
            stem, _, suffix = name.rpartition(".")
            yield Case(f"mode {suffix} {stem}", content(data), expect, suffix=f".{suffix}")


def _metadata() -> Iterator[Case]:
    """EXIF and text of any content; the pixels are whole."""
    turned = Image.Exif()
    turned[0x0112] = 6
    header = b"II*\0\x08\0\0\0"
    entry = struct.pack("<HHHI", 1, 0x0112, 3, 1)
    blocks = {
        "turned": turned.tobytes()[6:],
        "orientation 99": header + entry + struct.pack("<HHI", 99, 0, 0),
        "orientation as text": header + struct.pack("<HHHI", 1, 0x0112, 2, 4) + b"abc\0" + bytes(4),
        "noise": random.Random(3).randbytes(300),
        "zeros": bytes(50),
        "none": b"",
        "giant count": header + struct.pack("<HHHII", 1, 0x0112, 3, 2**31, 8),
        "65535 tags": header + b"\xff\xff",
        "circle": header + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8),
        "division by zero": header + struct.pack("<HHHII", 1, 0x011A, 5, 1, 26) + bytes(12),
        "far offset": b"II*\0\xff\xff\xff\xff",
    }
    for name, block in blocks.items():
        yield Case(f"exif {name}", content(crafted.with_exif(40, block)), ANY, suffix=".jpg")
        yield Case(f"png exif {name}", content(whole_png(41, before=chunk(b"eXIf", block))), ANY)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 9\nthis is not hexadecimal", zip=True)
    yield Case("png raw profile", content(encoded(picture(42), "PNG", pnginfo=info)), ANY)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8888888888888888888888"/>'
    yield Case("png xmp", content(whole_png(43, before=chunk(b"iTXt", xmp))), ANY)
    yield Case("jpg short segment", content(b"\xff\xd8\xff\xe1\0\0" + encoded(picture(44), "JPEG")[2:]), ANY)
