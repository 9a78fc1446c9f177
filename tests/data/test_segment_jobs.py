"""Making the maps of a store: the same in one process and several, what is whole is kept, what is bad is an outcome."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ssr_fast.data.images import BadFile
from ssr_fast.data.segment_jobs import Task, make_maps
from ssr_fast.data.segments import Recipe, SegmentStore, create_store
from ssr_fast.data.superpixels import SuperpixelConfig, Superpixels
from tests.data.builders import picture, save

RECIPE = Recipe("test", {"scale": 2.0})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def store(root: Path) -> SegmentStore:
    return create_store(None, root, RECIPE, overwrite=False)


@pytest.fixture
def images(root: Path) -> list[Path]:
    return [save(root / "images" / f"{k}.png", picture(k, 40, 30)) for k in range(3)]


SUPERPIXELS = Superpixels(SuperpixelConfig())


def snapshot(store: SegmentStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.rglob("*.png")}


def test_one_process_and_several_make_the_same_maps(root: Path, images: list[Path], tmp_path: Path) -> None:
    tasks = [Task(image, SUPERPIXELS) for image in images]
    found = []
    for workers in (0, 2):
        store = create_store(tmp_path / str(workers), root, RECIPE, overwrite=False)
        outcomes = list(make_maps(store, tasks, workers))
        assert [(outcome.image, outcome.kind) for outcome in outcomes] == [(image, "made") for image in images]
        found.append((snapshot(store), outcomes))
    assert found[0] == found[1] and len(found[0][0]) == 3


def test_whole_maps_are_kept_and_damaged_ones_are_made_again(images: list[Path], store: SegmentStore) -> None:
    tasks = [Task(image, SUPERPIXELS) for image in images]
    list(make_maps(store, tasks, 0))
    before, times = snapshot(store), [store.path(image).stat().st_mtime_ns for image in images]
    damaged = store.path(images[1])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    seen: list[Path] = []
    outcomes = list(make_maps(store, tasks, 0, visit=lambda image, pixels, segments: seen.append(image)))
    assert [outcome.kind for outcome in outcomes] == ["kept", "made", "kept"] and seen == images
    assert str(damaged) in outcomes[1].message and "made again" in outcomes[1].message
    assert snapshot(store) == before
    now = [store.path(image).stat().st_mtime_ns for image in images]
    assert now[0] == times[0] and now[2] == times[2]
    assert [outcome.kind for outcome in make_maps(store, tasks, 0, overwrite=True)] == ["made"] * 3


def test_an_image_of_another_size_gets_a_new_map(images: list[Path], store: SegmentStore) -> None:
    tasks = [Task(image, SUPERPIXELS) for image in images]
    list(make_maps(store, tasks, 0))
    save(images[0], picture(9, 31, 17))
    assert [outcome.kind for outcome in make_maps(store, tasks, 0)] == ["made", "kept", "kept"]
    assert store.read(images[0]).shape == (17, 31)


def refuse(path: Path, image: NDArray[np.uint8]) -> NDArray[np.uint16]:
    raise BadFile(path, "is refused", "give another")


def test_a_bad_image_is_an_outcome_and_the_others_go_on(images: list[Path], store: SegmentStore) -> None:
    images[1].write_bytes(images[1].read_bytes()[:50])
    tasks = [Task(images[0], refuse), Task(images[1], SUPERPIXELS), Task(images[2], SUPERPIXELS)]
    outcomes = list(make_maps(store, tasks, 0))
    assert [outcome.kind for outcome in outcomes] == ["failed", "failed", "made"]
    assert "is refused; give another" in outcomes[0].message and str(images[1]) in outcomes[1].message
    assert list(snapshot(store)) == ["2.png.png"]


def test_superpixels_cover_everything_and_follow_edges() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:], image[30:, :40] = (200, 40, 40), (40, 200, 40)
    for config in (SuperpixelConfig(), SuperpixelConfig(algorithm="slic", count=20)):
        segments = Superpixels(config)(Path("x"), image)
        assert segments.dtype == np.uint16 and segments.shape == (60, 80)
        assert sorted(np.unique(segments)) == list(range(1, segments.max() + 1)) and segments.max() >= 3
        colors = [len(np.unique(image[segments == k], axis=0)) for k in np.unique(segments)]
        assert max(colors) == 1, config
