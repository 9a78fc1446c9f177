"""The procedural scenes: a pure function of (seed, role, index), one layout generator, two styles."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data import scenes
from ssr_fast.data.scenes import (
    NAMES,
    ScenesConfig,
    draw_layout,
    draw_scene,
    generator,
    render,
    source_style,
    target_style,
    write_scenes,
)
from ssr_fast.errors import UserError

SMALL = ScenesConfig(source_count=2, target_count=1, evaluation_count=1, height=64, width=96)


def test_a_scene_depends_on_seed_role_and_index_only() -> None:
    image, layout = draw_scene(SMALL, "target", 3)
    again, _ = draw_scene(dataclasses.replace(SMALL, target_count=50), "target", 3)
    assert np.array_equal(image, again)
    others = [
        draw_scene(SMALL, "target", 4)[0],
        draw_scene(SMALL, "evaluation", 3)[0],
        draw_scene(dataclasses.replace(SMALL, seed=1), "target", 3)[0],
    ]
    assert not any(np.array_equal(image, other) for other in others)
    assert image.shape == (64, 96, 3) and image.dtype == np.uint8
    assert layout.label.shape == layout.region.shape == layout.depth.shape == (64, 96)


def test_labels_follow_the_regions() -> None:
    layout = draw_scene(SMALL, "source", 0)[1]
    assert np.array_equal(layout.label, np.asarray(layout.classes)[layout.region])
    assert layout.label.max() < len(NAMES)
    assert 0.0 <= layout.depth.min() and layout.depth.max() <= 1.0


def test_every_class_covers_at_least_half_a_percent() -> None:
    labels = np.stack([draw_scene(ScenesConfig(), "source", index)[1].label for index in range(16)])
    shares = np.bincount(labels.ravel(), minlength=len(NAMES)) / labels.size
    assert shares.shape == (len(NAMES),) and shares.min() > 0.005


def test_the_gap_moves_the_target_away_from_the_source() -> None:
    layout = draw_layout(generator(0, "target", 0), 64, 96)
    near, middle, far = (
        render(layout, style, np.random.default_rng(0)).astype(float)
        for style in (source_style(), target_style(0.4), target_style(1.0))
    )
    distances = [np.abs(other - near).mean() for other in (middle, far)]
    assert 5 < distances[0] < distances[1]
    style = target_style(0.0)
    assert np.array_equal(style.palette, source_style().palette) and style.cast == (1.0, 1.0, 1.0)
    assert (style.jitter, style.haze, style.blur, style.vignette) == (source_style().jitter, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("role", ["source", "target", "evaluation"])
def test_written_scenes_are_the_drawn_ones_and_the_target_has_no_labels(role: str, tmp_path: Path) -> None:
    write_scenes(tmp_path, SMALL)
    image, layout = draw_scene(SMALL, role, 0)
    files = sorted((tmp_path / role / "images").iterdir())
    with Image.open(files[0]) as written:
        assert np.array_equal(np.asarray(written), image)
    labels = tmp_path / role / "labels"
    if role == "target":
        assert not labels.exists() or not any(labels.iterdir())
    else:
        with Image.open(sorted(labels.iterdir())[0]) as written:
            assert np.array_equal(np.asarray(written), layout.label)


def test_a_set_whose_replacement_was_interrupted_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(tmp_path, SMALL)
    victim = sorted((tmp_path / "source" / "images").iterdir())[1]
    good, write_png, written = victim.read_bytes(), scenes._write_png, []

    def fails_later(path: Path, array: NDArray[np.uint8]) -> None:
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(path)
        write_png(path, array)

    monkeypatch.setattr(scenes, "_write_png", fails_later)
    with pytest.raises(UserError, match="No space left on device"):
        write_scenes(tmp_path, dataclasses.replace(SMALL, seed=5))
    monkeypatch.undo()
    assert victim.read_bytes() != good, "the interrupted set must have begun"
    write_scenes(tmp_path, SMALL)
    assert victim.read_bytes() == good
