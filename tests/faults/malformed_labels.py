"""The malformed labels: of ids, of colours, and SYNTHIA's, which OpenCV decodes."""

import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.faults import crafted
from tests.faults.crafted import HEIGHT, SHORT, WIDTH, chunk, deep_png, encoded, flipped, ids, picture, png
from tests.faults.malformed import (
    ANY,
    HANDLED,
    NAMED,
    Case,
    content,
    frames,
    sparse,
    special_files,
    synthia_label,
)

COLORS = {"names": ["road", "car", "sky"], "colors": [[128, 64, 128], [0, 0, 142], [70, 130, 180]]}


def label_cases() -> list[Case]:
    """Labels of a `folder` data set with the ids 0..2."""
    return [*_damaged(), *_modes(), *_values(), *special_files("label", label=True)]


def _damaged() -> Iterator[Case]:
    data = encoded(ids(500), "PNG")
    for length in (1, 8, 20, 33, 50, len(data) // 2, len(data) - 40):
        yield Case(f"label cut at {length}", content(data[:length]), label=True)
    for at in (0, 13, 18, 24, 29, 45, len(data) // 2, len(data) - 17):
        yield Case(f"label flipped at {at}", content(flipped(data, at)), label=True)
    for name, made in {
        "empty": b"",
        "text": b"no label",
        "json": b'{"shapes": []}',
        "svg": b"<svg/>",
        "bomb 9459x9459": png(9459, 9459, zlib.compress(bytes(100)), color=0),
        "60000x60000": png(60000, 60000, zlib.compress(bytes(100)), color=0),
        "89000000 high": png(1, 89_000_000, zlib.compress(bytes(100)), color=0),
        "whole 5000x5000": crafted.bilevel_png(5000, 5000),
    }.items():
        yield Case(f"label {name}", content(made), label=True)
    yield Case("label huge", sparse(data, 5 << 30), words="too large", label=True)


def _modes() -> Iterator[Case]:
    """Every mode: what keeps ids exact is read, what cannot is named."""
    small = Image.fromarray(np.where(ids(510) == 255, 0, ids(510)).astype(np.uint8))
    rgb = Image.merge("RGB", [small] * 3)
    palette = small.copy()
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    wide = np.array(small)
    good = {
        "L.png": encoded(small, "PNG"),
        "P.png": encoded(palette, "PNG"),
        "P transparency.png": encoded(palette, "PNG", transparency=0),
        "1.png": encoded(small.point(lambda value: 255 * (value > 0)).convert("1"), "PNG"),
        "RGB grey.png": encoded(rgb, "PNG"),
        "RGBA grey.png": encoded(rgb.convert("RGBA"), "PNG"),
        "LA.png": encoded(small.convert("LA"), "PNG"),
        "I;16.png": deep_png(wide.astype(np.uint16)),
        "I.tif": encoded(wide.astype(np.int32), "TIFF"),
        "PA.tif": crafted.palette_alpha_tiff(511),
        "RGBX.tif": crafted.plain_tiff(
            np.dstack([wide, wide, wide, wide + 9]).tobytes(), samples=4, photometric=2, t338=(SHORT, 1, 0),
            t258=(SHORT, 1, 8),
        ),
        "I;16B.tif": crafted.plain_tiff(wide.astype(">u2").tobytes(), bits=16, order=">"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "L.bmp": encoded(small, "BMP"),
        "animated.png": encoded(small, "PNG", save_all=True, append_images=[small.rotate(180)]),
    }  # fmt: skip
    bad = {
        "JPEG.jpg": encoded(small, "JPEG"),
        "JPEG.png": encoded(Image.fromarray(ids(512)), "JPEG"),
        "MPO.jpg": encoded(rgb, "MPO", save_all=True, append_images=frames(40)),
        "jpeg.tif": encoded(small, "TIFF", compression="jpeg"),
        "colour.png": encoded(picture(513), "PNG"),
        "colour.webp": encoded(picture(514), "WEBP", lossless=True),
        "CMYK.tif": encoded(Image.fromarray(picture(515)).convert("CMYK"), "TIFF"),
        "LAB.tif": encoded(Image.merge("LAB", Image.fromarray(picture(516)).split()), "TIFF"),
        "F.tif": encoded(wide.astype(np.float32), "TIFF"),
        "NaN.tif": encoded(np.full((HEIGHT, WIDTH), np.nan, np.float32), "TIFF"),
        "16-bit colour.png": deep_png(np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)),
    }
    for files, expect in ((good, HANDLED), (bad, NAMED)):
        for name, data in files.items():
            stem, _, suffix = name.rpartition(".")
            loose = ANY if stem == "RGBX" else expect  # Pillow's version decides what it makes of the fourth channel
            yield Case(f"label mode {suffix} {stem}", content(data), loose, suffix=f".{suffix}", label=True)


def _values() -> Iterator[Case]:
    ones = np.ones((HEIGHT, WIDTH), np.int32)
    arrays = {
        "unknown id": (ids(520) | 8, "while folder labels hold 0..2, 255"),
        "one unknown id": (np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) == 777, 9, 1).astype(np.uint8),
                           "the value 9 at column 9, row 16 (1 pixel(s)"),
        "id 256": ((ones * 256).astype(np.uint16), "the value 256"),
        "id 65535": ((ones * 65535).astype(np.uint16), "the value 65535"),
        "all ignored": ((ones * 255).astype(np.uint8), "is ignored everywhere"),
        "wrong size": (ids(521, 47, 32), "is 47x32"),
        "turned": (ids(522, 32, 48), "is 32x48"),
        "1x1": (ids(523, 1, 1) * 0, "is 1x1"),
    }  # fmt: skip
    for name, (values, words) in arrays.items():
        yield Case(f"label {name}", content(encoded(values, "PNG")), words=words, label=True)
    for name, values in {"negative": -ones, "least": ones * -(2**31), "greatest": ones * (2**31 - 1)}.items():
        yield Case(f"label {name}", content(encoded(values, "TIFF")), words="value", suffix=".tif", label=True)
    signed = crafted.plain_tiff(np.full((HEIGHT, WIDTH), -5, "<i2").tobytes(), bits=16, t339=(SHORT, 1, 2))
    yield Case("label signed", content(signed), words="the value -5", suffix=".tif", label=True)


def color_cases() -> list[Case]:
    """Labels of a data set whose classes have COLORS."""
    colors = np.array(COLORS["colors"], np.uint8)
    right = colors[np.random.default_rng(530).integers(0, 3, (HEIGHT, WIDTH))]
    wrong = right.copy()
    wrong[3, 5] = 1, 2, 3
    alpha = Image.fromarray(right).convert("RGBA")
    cases = {
        "right.png": (encoded(right, "PNG"), HANDLED, ""),
        "alpha.png": (encoded(alpha, "PNG"), HANDLED, ""),
        "16-bit.png": (deep_png(right.astype(np.uint16) * 257), HANDLED, ""),
        "lossless.webp": (encoded(right, "WEBP", lossless=True), HANDLED, ""),
        "ids.png": (encoded(np.where(ids(531) == 255, 1, ids(531)).astype(np.uint8), "PNG"), HANDLED, ""),
        "PA.tif": (crafted.palette_alpha_tiff(532), HANDLED, ""),
        "one colour.png": (encoded(wrong, "PNG"), NAMED, "the colour (1, 2, 3) at column 5, row 3"),
        "noise.png": (encoded(picture(533), "PNG"), NAMED, "which no class has"),
        "black.png": (encoded(right * 0, "PNG"), NAMED, "is ignored everywhere"),
        "jpeg.jpg": (encoded(right, "JPEG", quality=100), NAMED, "JPEG"),
        "CMYK.tif": (encoded(Image.fromarray(picture(534)).convert("CMYK"), "TIFF"), NAMED, ""),
        "wrong size.png": (encoded(right[1:], "PNG"), NAMED, "48x31"),
    }
    return [
        Case(f"colours {name.rpartition('.')[0]}", content(data), expect, words, "." + name.rpartition(".")[2], True)
        for name, (data, expect, words) in cases.items()
    ]


def synthia_cases() -> list[Case]:
    """16-bit labels of SYNTHIA."""
    return [*_synthia_damaged(), *special_files("synthia", label=True)[:-1]]


def _synthia_damaged() -> Iterator[Case]:
    data = synthia_label(540)
    for length in (1, 8, 20, 33, 60, len(data) // 4, len(data) // 2, len(data) - 40, len(data) - 16):
        yield Case(f"synthia cut at {length}", content(data[:length]), label=True)
    for at in (0, 13, 18, 24, 25, 29, 45, len(data) // 3, len(data) // 2, len(data) - 25, len(data) - 14):
        yield Case(f"synthia flipped at {at}", content(flipped(data, at)), label=True)
    little = zlib.compress(bytes(100))
    packed = crafted.zeros_packed(64 << 20)
    flat = zlib.compress(bytes(1 + 6 * ((1 << 20) + 7)))
    before = data[:33] + chunk(b"zTXt", b"Comment\0\0" + packed) + data[33:]
    for name, made, expect in (
        ("good", data, HANDLED),
        ("empty", b"", NAMED),
        ("text", b"no label", NAMED),
        ("one channel", deep_png(ids(541).astype(np.uint16)), NAMED),
        ("8-bit grey", encoded(ids(542), "PNG"), NAMED),
        ("unknown id", deep_png(np.full((HEIGHT, WIDTH, 3), 23, np.uint16)), NAMED),
        ("id 65535", deep_png(np.full((HEIGHT, WIDTH, 3), 65535, np.uint16)), NAMED),
        ("void", deep_png(np.zeros((HEIGHT, WIDTH, 3), np.uint16)), NAMED),
        ("alpha", deep_png(np.ones((HEIGHT, WIDTH, 4), np.uint16)), HANDLED),
        ("JPEG", encoded(np.full((HEIGHT, WIDTH, 3), 3, np.uint8), "JPEG"), NAMED),
        ("wrong size", synthia_label(543, WIDTH - 1), NAMED),
        ("0x0", png(0, 0, little, depth=16), NAMED),
        ("9400x9400", png(9400, 9400, little, depth=16), NAMED),
        ("60000x60000", png(60000, 60000, little, depth=16), NAMED),
        ("wider than OpenCV reads", png((1 << 20) + 7, 1, flat, depth=16), NAMED),
        ("bomb behind the pixels", png(WIDTH, HEIGHT, packed, depth=16), NAMED),
        ("bomb in text", before, ANY),
        ("chunk of 4 GB", data[:33] + b"\xf0" + data[34:], NAMED),
        ("bmp", encoded(np.full((HEIGHT, WIDTH, 3), 3, np.uint8), "BMP"), NAMED),
        ("bmp of two sizes", crafted.bmp_sized(545, 48, 8), NAMED),
        ("gif", encoded(picture(544), "GIF"), NAMED),
        ("float", encoded(np.ones((HEIGHT, WIDTH), np.float32), "TIFF"), NAMED),
    ):
        yield Case(f"synthia {name}", content(made), expect, label=True)
    yield Case("synthia huge", sparse(data, 5 << 30), words="too large", label=True)
