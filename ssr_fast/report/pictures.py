"""Pictures for people: label overlays, and one picture that compares image, truth and predictions.

H W pixels. Text is drawn with the font that Pillow carries, so that no font file is needed.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ssr_fast.data.labels import ClassSet

Picture = NDArray[np.uint8]

_BACKGROUND = (23, 26, 31)  # dark frame: it looks the same on a light and on a dark page
_TEXT = (232, 234, 237)
_MARGIN = 12
_FONT_SIZE = 17
_TITLE_HEIGHT = 26
_LEGEND_LINE = 26
_LEGEND_GAP = 18
_SWATCH = 15
_SWATCH_GAP = 6
_MOST_COLUMNS = 3
_TILE_WIDTH = (320, 640)  # tiles are enlarged to the first and reduced to the second


def overlay(image: Picture, label: Picture, classes: ClassSet, opacity: float = 0.55) -> Picture:
    """The label's colours over the image; ignored pixels show the image alone.

    Args:
        image: uint8 [H, W, 3] RGB.
        label: uint8 [H, W] train ids, 255 ignored.
        classes: the label's classes.
        opacity: share of the colour, 0 to 1.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    if image.shape[:2] != label.shape:
        raise ValueError(f"image {image.shape[:2]} and label {label.shape} differ in size")
    colors = classes.colorize(label)
    mixed = image * np.float32(1.0 - opacity) + colors * np.float32(opacity)  # float32 [H, W, 3]
    known = (label < classes.count)[..., None]
    return np.where(known, np.rint(mixed).astype(np.uint8), image)


def comparison(
    image: Picture, truth: Picture | None, predictions: Sequence[tuple[str, Picture]], classes: ClassSet
) -> Picture:
    """One picture: the image, its truth if there is one, each prediction under its title, and a legend.

    Up to three tiles share a row; more begin with a row of image and truth, so that the predictions stand side by side.

    Args:
        image: uint8 [H, W, 3] RGB.
        truth: uint8 [H, W] train ids, or None.
        predictions: (title, uint8 [H, W] train ids) from left to right.
        classes: the labels' classes; the legend names those that occur.

    Returns:
        uint8 [height, width, 3] RGB.
    """
    labels = [("truth", truth)] if truth is not None else []
    labels += list(predictions)
    for title, label in labels:
        if label.shape != image.shape[:2]:
            raise ValueError(f"image {image.shape[:2]} and {title} {label.shape} differ in size")
    tile = _tile_size(image.shape[1], image.shape[0])
    tiles = [("image", _resized(image, tile, Image.Resampling.BICUBIC))]
    tiles += [(title, _resized(classes.colorize(label), tile, Image.Resampling.NEAREST)) for title, label in labels]
    rows = _rows(tiles, 1 + (truth is not None))
    present = sorted({int(value) for _, label in labels for value in np.unique(label) if value < classes.count})
    return np.asarray(_sheet(rows, tile, [(classes.names[k], classes.colors[k]) for k in present]))


_Tile = tuple[str, Image.Image]
_LegendEntry = tuple[str, tuple[int, int, int]]  # name, colour


def _rows(tiles: Sequence[_Tile], given: int) -> list[Sequence[_Tile]]:
    """The tiles in rows; the first `given` are image and truth."""
    if len(tiles) <= _MOST_COLUMNS:
        return [tiles]
    predictions = tiles[given:]
    columns = 2 if len(predictions) in (2, 4) else _MOST_COLUMNS
    return [tiles[:given], *(predictions[first : first + columns] for first in range(0, len(predictions), columns))]


def _sheet(rows: Sequence[Sequence[_Tile]], tile: tuple[int, int], legend: Sequence[_LegendEntry]) -> Image.Image:
    """The tiles with their titles; the legend in the gap that a short first row leaves, or below."""
    step = (tile[0] + _MARGIN, tile[1] + _TITLE_HEIGHT + _MARGIN)
    columns = max(len(row) for row in rows)
    width, height = columns * step[0] + _MARGIN, len(rows) * step[1] + _MARGIN // 2
    gap = (columns - len(rows[0])) * step[0] - _MARGIN
    lines = _legend_lines(legend, gap) if gap > 0 else []
    fits = gap > 0 and len(lines) * _LEGEND_LINE <= tile[1]
    corner = (_MARGIN + len(rows[0]) * step[0], _MARGIN // 2 + _TITLE_HEIGHT)
    if not fits:
        lines = _legend_lines(legend, width - 2 * _MARGIN)
        corner = (_MARGIN, height)
        height += len(lines) * _LEGEND_LINE + _MARGIN // 2
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    for r, row in enumerate(rows):
        for c, (title, picture) in enumerate(row):
            x, y = _MARGIN + c * step[0], _MARGIN // 2 + r * step[1]
            _draw_text(sheet, (x, y), _shortened(title, tile[0]))
            sheet.paste(picture, (x, y + _TITLE_HEIGHT))
    for number, line in enumerate(lines):
        _draw_legend_line(sheet, (corner[0], corner[1] + number * _LEGEND_LINE), line)
    return sheet


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a tile: the image's own, within _TILE_WIDTH and not higher than the widest tile."""
    scale = min(max(width, _TILE_WIDTH[0]), _TILE_WIDTH[1]) / width
    scale = min(scale, _TILE_WIDTH[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(picture: Picture, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    return Image.fromarray(picture).resize(size, method)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _draw_text(sheet: Image.Image, corner: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(sheet).text(corner, text, fill=_TEXT, font=_font())


def _shortened(text: str, width: int) -> str:
    """The text, cut so that it fits `width` pixels."""
    font = _font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _legend_lines(legend: Sequence[_LegendEntry], width: int) -> list[list[tuple[int, _LegendEntry]]]:
    """The entries with their x, broken into lines of at most `width` pixels."""
    font = _font()
    lines: list[list[tuple[int, _LegendEntry]]] = []
    x = width
    for name, color in legend:
        name = _shortened(name, width - _SWATCH - _SWATCH_GAP)
        needed = _SWATCH + _SWATCH_GAP + math.ceil(font.getlength(name))
        if not lines or x + needed > width:
            lines.append([])
            x = 0
        lines[-1].append((x, (name, color)))
        x += needed + _LEGEND_GAP
    return lines


def _draw_legend_line(sheet: Image.Image, corner: tuple[int, int], line: Sequence[tuple[int, _LegendEntry]]) -> None:
    draw = ImageDraw.Draw(sheet)
    for x, (name, color) in line:
        left, top = corner[0] + x, corner[1] + 3
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=color, outline=_TEXT)
        draw.text((left + _SWATCH + _SWATCH_GAP, corner[1]), name, fill=_TEXT, font=_font())
