"""Stored features go through the loader with their image: same crop, same mirror, any number of workers."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssr_fast.data.batch import Batch
from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import COMMAND, FeatureStore, create_features
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.plan import Plan, SamplingConfig
from ssr_fast.data.stores import Recipe
from ssr_fast.data.torch_loader import StepDataset, load_steps
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence, save

CELL = 8  # pixels a token


def write(store: FeatureStore, index: Index, sign: int = 1) -> None:
    """Tokens that hold the colour of their cell, as an encoder that only averages would."""
    for sample in index.samples:
        image = np.asarray(pixels(sample.image))[::CELL, ::CELL].astype(np.float32)
        size = (sample.width, sample.height)
        store.write(sample.image, sign * image, Geometry(size, size, CELL))


def pixels(path: str) -> NDArray[np.uint8]:
    from ssr_fast.data.images import read_image

    return read_image(path)


def data_set(root: Path, sizes: list[tuple[int, int]], dtype: str = "fp16") -> tuple[Index, FeatureStore]:
    """Images of flat cells with labels, and a store of the cells' colours."""
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate(sizes):
        shape = (-(-height // CELL), -(-width // CELL))
        image = np.kron(rng.integers(0, 256, (*shape, 3)), np.ones((CELL, CELL, 1), int))[:height, :width]
        save(root / "images" / f"{number}.png", image.astype(np.uint8))
        save(root / "labels" / f"{number}.png", (image[..., 0] // 128).astype(np.uint8))
    (root / "classes.json").write_text('{"names": ["a", "b"]}')
    index = build_index(DomainConfig(root=str(root), layout="folder"), True, "data.source", root / "cache")
    store = create_features(None, root, Recipe("test", {"dtype": dtype}), overwrite=False)
    write(store, index)
    return index, store


def dataset_of(
    index: Index, store: FeatureStore, box: tuple[int, int] | None = None, cache: bool = False, **options: float
) -> StepDataset:
    sampling = SamplingConfig(**{"rare_class": False, **options})  # type: ignore[arg-type]
    plan = Plan(5, index, index, box, box, (24, 32), 3, sampling)
    return StepDataset(plan, index, index, cache=cache, source_features=store, target_features=store)


def aligned(dataset: StepDataset) -> StepDataset:
    """The same with corners on tokens."""
    plan = dataset.plan

    def views(step: int, rank: int, world: int):  # type: ignore[no-untyped-def]
        found = Plan.__call__(plan, step, rank, world)
        return dataclasses.replace(found, **{
            name: tuple(
                dataclasses.replace(view, corners=tuple((x // CELL * CELL, y // CELL * CELL) for x, y in view.corners))
                for view in getattr(found, name)
            )
            for name in ("source", "target")
        })  # fmt: skip

    dataset.plan = views  # type: ignore[assignment]
    views.crop, views.sampling = plan.crop, plan.sampling  # type: ignore[attr-defined]
    return dataset


def averages(images: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] -> the colours of its cells [B, 3, h, w]."""
    return images[:, CELL // 2 :: CELL, CELL // 2 :: CELL].permute(0, 3, 1, 2).to(torch.float32)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_features_stay_on_their_pixels(tmp_path: Path, dtype: str) -> None:
    """Exactly, with odd sizes, crops that the label's conditions move, and mirrors; int8 to half a step."""
    index, store = data_set(tmp_path, [(60, 50), (97, 41), (40, 24)], dtype)
    dataset = aligned(dataset_of(index, store, max_class_share=0.55))
    tolerance = 0.0 if dtype == "fp16" else 255 / 254 * 1.001
    corners = set()
    for step in range(12):
        batch = dataset[step]
        for images, features in (
            (batch.source_image, batch.source_features),
            (batch.target_image, batch.target_features),
        ):
            assert features is not None and features.dtype == torch.float32 and features.shape == (3, 3, 3, 4)
            assert (features - averages(images)).abs().max() <= tolerance
            assert features.permute(0, 2, 3, 1).is_contiguous()
        for view in dataset.plan(step, 0, 1).source:
            label = dataset.source(view)["source_label"]
            alone = [dataset.source(dataclasses.replace(view, corners=(corner,))) for corner in view.corners]
            corners.add(next(k for k, parts in enumerate(alone) if (parts["source_label"] == label).all()))
    assert len(corners) > 1, "the first candidate was always taken"


def test_beyond_the_image_its_edge_is_repeated(tmp_path: Path) -> None:
    index, store = data_set(tmp_path, [(16, 16)])
    dataset = dataset_of(index, store)
    flips = set()
    for step in range(8):
        batch, views = dataset[step], dataset.plan(step).target
        assert batch.target_features is not None
        for number, view in enumerate(views):
            flips.add(view.flip)
            found = batch.target_features[number]
            image = batch.target_image[number].flip(1) if view.flip else batch.target_image[number]
            found = found.flip(2) if view.flip else found
            cells = averages(image[None])[0]
            assert torch.equal(found[:, :2, :2], cells[:, :2, :2])
            assert torch.equal(found[:, 2], found[:, 1]) and torch.equal(found[:, :, 3], found[:, :, 1])
    assert flips == {False, True}


@pytest.mark.parametrize("box", [None, (40, 30), (90, 75)])
def test_the_sample_alone_decides(tmp_path: Path, box: tuple[int, int] | None) -> None:
    """Whatever the number of workers, the cache and where a run resumes."""
    index, store = data_set(tmp_path, [(60, 50), (33, 25), (97, 41)], "int8")
    plain = [dataset_of(index, store, box)[step] for step in range(6)]
    cached = dataset_of(index, store, box, cache=True)
    for workers in (0, 2):
        for step, batch in enumerate(load_steps(cached, 0, 6, workers, pin=False)):
            same(batch, plain[step])
    for step, batch in enumerate(load_steps(dataset_of(index, store, box), 4, 6, 1, pin=False), 4):
        same(batch, plain[step])
    sample = index.samples[0]
    view = dataclasses.replace(dataset_of(index, store, box).plan(0).target[0], index=0)
    found = dataset_of(index, store, box).target(view)["target_features"]
    whole = store.read(sample.image)
    assert (found == whole.cut(view.size, view.corners[0], (24, 32), view.flip)).all()


def same(one: Batch, two: Batch) -> None:
    for field in dataclasses.fields(Batch):
        first, second = getattr(one, field.name), getattr(two, field.name)
        assert (first is None and second is None) or torch.equal(first, second), field.name


def test_two_stores_of_one_data_set_are_kept_apart(tmp_path: Path) -> None:
    index, store = data_set(tmp_path, [(60, 50)])
    other = create_features(tmp_path / "other", tmp_path, Recipe("test", {"dtype": "fp16", "x": 1}), False)
    write(other, index, sign=-1)
    dataset = dataset_of(index, store, cache=True)
    dataset.target_features = other
    batch = dataset[0]
    assert batch.source_features is not None and batch.target_features is not None
    assert (batch.source_features >= 0).all() and (batch.target_features <= 0).all()
    moved = pickle.loads(pickle.dumps(batch)).to(torch.device("cpu"))
    assert torch.equal(moved.target_features, batch.target_features)
    assert StepDataset(dataset.plan, index, index, source_features=store)[0].target_features is None


def test_a_file_that_is_damaged_meanwhile_stops_the_loader_with_a_sentence(tmp_path: Path) -> None:
    index, store = data_set(tmp_path, [(60, 50)])
    path = store.path(index.samples[0].image)
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(load_steps(dataset_of(index, store), 0, 2, workers, pin=False))
        assert_sentence(error.value, path, "checksum", f"{COMMAND} {tmp_path}`")
