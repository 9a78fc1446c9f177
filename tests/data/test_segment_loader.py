"""Segments go through the loader exactly as labels do, and stay on their image's pixels."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_fast.data.geometry import crop_image, crop_label, fitted_size, resize_label
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.plan import Plan, SamplingConfig
from ssr_fast.data.segments import COMMAND, Recipe, SegmentStore, create_store
from ssr_fast.data.torch_loader import StepDataset
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence, save

RECIPE = Recipe("test", {"scale": 2.0})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def data_set(root: Path, sizes: list[tuple[int, int]]) -> tuple[Index, SegmentStore]:
    """Images whose red and green say which segment a pixel is in, and their store."""
    store = create_store(None, root, RECIPE, overwrite=False)
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate(sizes):
        cells = rng.integers(1, 65536, (-(-height // 7), -(-width // 5)))
        segments = np.kron(cells, np.ones((7, 5), int))[:height, :width].astype(np.uint16)
        segments[:4, :9] = 0
        image = np.dstack([segments & 255, segments >> 8, np.full_like(segments, 9)]).astype(np.uint8)
        store.write(save(root / "images" / f"{number}.png", image), segments)
    return build_index(DomainConfig(root=str(root), layout="folder"), False, "data.target", root / "cache"), store


def plan_of(index: Index, box: tuple[int, int] | None, crop: tuple[int, int] = (24, 32)) -> Plan:
    return Plan(5, index, index, box, box, crop, 3, SamplingConfig(rare_class=False))


def dataset_of(index: Index, plan: Plan, store: SegmentStore | None, cache: bool = False) -> StepDataset:
    dataset = StepDataset(plan, index, index, cache=cache, segments=store)
    nothing = {"source_image": np.zeros((*plan.crop, 3), np.uint8), "source_label": np.zeros(plan.crop, np.uint8)}
    dataset.source = lambda view: nothing  # type: ignore[method-assign]
    return dataset


def test_segments_stay_on_their_pixels(root: Path) -> None:
    index, store = data_set(root, [(60, 50), (33, 25), (20, 10)])
    dataset = dataset_of(index, plan_of(index, None), store)
    flips = set()
    for step in range(8):
        batch = dataset[step]
        assert batch.target_segments is not None and batch.target_segments.dtype == torch.int32
        assert batch.target_segments.shape == (3, 24, 32)
        pixels = batch.target_image.int()
        encoded = (pixels[..., 0] | pixels[..., 1] << 8) * batch.target_valid
        assert torch.equal(encoded, batch.target_segments)
        flips |= {view.flip for view in dataset.plan(step).target}
    assert flips == {False, True} and batch.target_segments.max() > 32767


@pytest.mark.parametrize("box", [(40, 30), (90, 75)])
def test_segments_are_resized_cut_and_flipped_as_labels_are(root: Path, box: tuple[int, int]) -> None:
    index, store = data_set(root, [(60, 50), (33, 25), (20, 10)])
    plan = plan_of(index, box)
    plain, cached = dataset_of(index, plan, store), dataset_of(index, plan, store, cache=True)
    for step in range(6):
        batch, again = plain[step], cached[step]
        assert batch.target_segments is not None and again.target_segments is not None
        assert torch.equal(batch.target_segments, again.target_segments)
        for number, view in enumerate(plan(step).target):
            sample = index.samples[view.index]
            assert view.size == fitted_size(sample.width, sample.height, box)
            parts = []
            for shift in (0, 8):  # the map as two labels of 8 bits
                label = (store.read(sample.image) >> shift & 255).astype(np.uint8)
                cut = crop_label(resize_label(label, view.size), view.corners[0], plan.crop, view.flip)
                parts.append(np.where(batch.target_valid[number].numpy(), cut, 0).astype(np.int32) << shift)
            assert (batch.target_segments[number].numpy() == parts[0] + parts[1]).all()
    assert cached._cache is not None and {key[1] for key in cached._cache} == {0, 2}


def test_labels_are_cut_and_resized_as_before() -> None:
    label = np.random.default_rng(0).integers(0, 256, (37, 53)).astype(np.uint8)
    for size in ((53, 37), (20, 20), (106, 74), (61, 90)):
        wide = resize_label(label.astype(np.uint16), size)
        assert resize_label(label, size).dtype == np.uint8 and wide.dtype == np.uint16
        assert (resize_label(label, size) == wide).all()
    assert (crop_label(label, (40, 30), (16, 24), True)[8:] == 255).all()
    assert crop_label(label.astype(np.uint16), (40, 30), (16, 24), True, outside=0)[8:].sum() == 0
    assert crop_image(np.dstack([label] * 3), (1, 2), (9, 9), False).dtype == np.uint8


def test_without_a_store_there_are_no_segments(root: Path) -> None:
    index, store = data_set(root, [(60, 50)])
    assert dataset_of(index, plan_of(index, None), None)[0].target_segments is None
    batch = pickle.loads(pickle.dumps(dataset_of(index, plan_of(index, None), store)[0]))
    moved = batch.to(torch.device("cpu"))
    assert moved.target_segments.shape == (3, 24, 32) and moved.source_features is None
    assert pickle.loads(pickle.dumps(store)) == store


def test_a_map_that_is_gone_stops_the_loader_with_a_sentence(root: Path) -> None:
    index, store = data_set(root, [(60, 50)])
    store.path(index.samples[0].image).unlink()
    with pytest.raises(UserError) as error:
        dataset_of(index, plan_of(index, None), store)[0]
    assert_sentence(error.value, "0.png.png is missing", f"{COMMAND} {root}`")
