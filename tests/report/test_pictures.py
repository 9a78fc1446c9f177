"""Overlays, comparison pictures and curves."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from ssr_fast.data.labels import CITYSCAPES, ClassSet
from ssr_fast.report.curves import curve_plot, stage_color
from ssr_fast.report.pictures import comparison, overlay

TWO = ClassSet("two", ("a", "b"), ((255, 0, 0), (0, 0, 255)))


def test_overlay_mixes_classes_and_leaves_ignored_pixels() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    label = np.full((4, 6), 255, np.uint8)
    label[1, 2], label[3, 5] = 0, 1
    picture = overlay(image, label, TWO, opacity=0.5)
    assert picture.dtype == np.uint8 and picture.shape == (4, 6, 3)
    assert picture[1, 2].tolist() == [178, 50, 50] and picture[3, 5].tolist() == [50, 50, 178]
    assert (picture[label == 255] == 100).all()
    assert (image == 100).all(), "the image itself is not painted"


def test_overlay_of_a_class_without_a_colour_shows_the_image() -> None:
    image = np.full((2, 2, 3), 9, np.uint8)
    assert (overlay(image, np.full((2, 2), 7, np.uint8), TWO) == 9).all()


def test_overlay_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), TWO)


def has_color(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(color)).all(-1).any())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("truth", [True, False])
def test_comparison_holds_every_tile_whole(count: int, truth: bool) -> None:
    """Each prediction has a class of its own; its tile must be there in full, wherever the layout puts it."""
    image = np.full((90, 160, 3), (10, 200, 30), np.uint8)
    predictions = [(f"stage {k}", np.full((90, 160), k, np.uint8)) for k in range(count)]
    true = np.full((90, 160), 18, np.uint8) if truth else None
    picture = comparison(image, true, predictions, CITYSCAPES)
    tile = 320 * 180
    assert (picture == (10, 200, 30)).all(-1).sum() >= tile
    for k in [*range(count), *([18] * truth)]:
        assert (picture == CITYSCAPES.colors[k]).all(-1).sum() >= tile
    unused = CITYSCAPES.colors[16]
    assert not has_color(picture, unused), "the legend names only what occurs"


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 3), (1024, 64)])
def test_comparison_takes_any_shape(size: tuple[int, int]) -> None:
    image, label = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    picture = comparison(image, label, [("p", label)], CITYSCAPES)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and max(picture.shape) < 2100


def test_comparison_survives_long_and_foreign_names_and_all_ignored() -> None:
    classes = ClassSet("odd", ("ein sehr langer Name " * 9, "道路", ""), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    label = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 3
    picture = comparison(np.zeros((64, 64, 3), np.uint8), label, [("a title " * 40, label)], classes)
    assert picture.shape[1] == 3 * (320 + 12) + 12
    ignored = np.full((64, 64), 255, np.uint8)
    comparison(np.zeros((64, 64, 3), np.uint8), ignored, [("x", ignored)], classes)


def test_comparison_refuses_another_size_and_names_the_tile() -> None:
    with pytest.raises(ValueError, match="SSR .*differ in size"):
        comparison(np.zeros((8, 8, 3), np.uint8), None, [("SSR", np.zeros((8, 9), np.uint8))], TWO)


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGBA"))


def test_curves_draw_each_line_in_its_colour_on_no_background() -> None:
    lines = {"Source only": [(0, 1.0), (10, 2.0)], "SSR": [(0, 1.0), (10, 3.0)]}
    picture = decoded(curve_plot("percent", lines, {"Source only": "#ff0000", "SSR": "#0000ff"}))
    assert picture[0, 0, 3] == 0
    solid = picture[picture[..., 3] == 255][:, :3].tolist()
    assert [255, 0, 0] in solid and [0, 0, 255] in solid


@pytest.mark.parametrize(
    "points",
    [[(5, 1.0)], [(0, math.nan), (1, math.nan)], [(0, 1.0), (1, math.inf), (2, 1.0)], [(k, 1.0) for k in range(9999)]],
)
def test_curves_survive_odd_lines(points: list[tuple[float, float]]) -> None:
    assert decoded(curve_plot("loss", {"x": points}, {"x": "#123456"})).size


def test_stages_have_colours_of_their_own() -> None:
    titles = ["Source only", "Self-training", "SSR", "Other", "More"]
    assert len({stage_color(title, number) for number, title in enumerate(titles)}) == 5
    assert stage_color("SSR", 0) == stage_color("SSR", 2), "a stage keeps its colour when it runs alone"
