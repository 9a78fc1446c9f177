"""One plan, one result: folders, stores, PyTorch's loader and DALI give the same tensors, wherever a run resumes."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_fast import prepare
from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.batch import Batch
from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import FeatureStore, create_features
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.loader import Choice, DataConfig, Inputs, choose_loader, load
from ssr_fast.data.plan import Plan, SamplingConfig
from ssr_fast.data.residents import read_residents
from ssr_fast.data.stores import Recipe
from ssr_fast.data.torch_loader import StepDataset
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence, picture, save
from tests.data.test_store import odd, with_segments

CPU = torch.device("cpu")
BOX = (44, 36)
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A data set of odd sizes and modes with segments, and its stores."""
    with_segments(odd(tmp_path / "folders"))
    found = {"folders": tmp_path / "folders"}
    for image in ("raw", "jpeg"):
        found[image] = tmp_path / image
        words = ["store", found["folders"], "--out", found[image], "--image", image, "--segments", "--workers", "0"]
        assert prepare.main([*map(str, words), "--resize", *map(str, BOX)]) == 0
    return found


def config_of(root: Path, **options: object) -> DataConfig:
    domain = DomainConfig(root=str(root), resize=BOX)
    sampling = SamplingConfig(max_class_share=0.4)
    more = {"workers": 0, "crop": (24, 32), "batch_size": 3, "prefetch": 2, **options}
    return DataConfig(source=domain, target=domain, sampling=sampling, **more)  # type: ignore[arg-type]


def inputs_of(config: DataConfig, **more: object) -> Inputs:
    source, target = (build_index(config.source, labelled, "data.source") for labelled in (True, False))
    segments = target.layout.store
    if segments is None:
        from ssr_fast.data.segments import open_store

        return Inputs(source, target, open_store("", target.layout.root), **more)  # type: ignore[arg-type]
    return Inputs(source, target, segments, **more)  # type: ignore[arg-type]


def batches(config: DataConfig, name: str, first: int = 0, last: int = 9, inputs: Inputs | None = None) -> list[Batch]:
    said: list[str] = []
    found = load(config, inputs or inputs_of(config), Choice(name, "x"), 5, first, last, CPU, said.append)
    result = [normalised(batch) for batch in found]
    assert said and f"loader: {name} (x)" in said[0]
    return result


def normalised(batch: Batch) -> Batch:
    """With images as a step sees them."""
    return Batch(**{
        name: normalise_batch(part) if name.endswith("_image") else part for name, part in batch.parts().items()
    })  # fmt: skip


def same(one: list[Batch], two: list[Batch], levels: float = 0.0) -> None:
    """Equal, but for images, which may differ by so many grey levels."""
    assert len(one) == len(two) > 0
    for first, second in zip(one, two, strict=True):
        assert first.parts().keys() == second.parts().keys()
        for name, part in first.parts().items():
            other = second.parts()[name].to(part.device)
            assert part.dtype == other.dtype and part.shape == other.shape, name
            if name.endswith("_image"):
                assert part.stride() == other.stride() and ((part - other).abs() <= levels / 57).all(), name
            else:
                assert torch.equal(part, other), name


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_and_raw_store_are_bit_identical(folders: dict[str, Path], workers: int) -> None:
    config = config_of(folders["folders"])
    expected, inputs = batches(config, "torch"), inputs_of(config)
    plan = Plan(5, inputs.source, inputs.target, BOX, BOX, (24, 32), 3, config.sampling)
    dataset = StepDataset(plan, inputs.source, inputs.target, segments=inputs.segments)
    same(expected, [normalised(dataset[step]) for step in range(9)])
    same(expected, batches(config_of(folders["raw"], workers=workers), "torch"))
    assert any(bool((batch.source_label == 255).all(1).any()) for batch in expected)  # crops beyond the images


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_dali_is_bit_identical_to_the_folders(folders: dict[str, Path], workers: int) -> None:
    expected = batches(config_of(folders["folders"]), "torch")
    same(expected, batches(config_of(folders["raw"], workers=workers), "dali"))


@needs_dali
def test_dali_decodes_jpeg_as_the_torch_loader_does(folders: dict[str, Path]) -> None:
    expected = batches(config_of(folders["jpeg"]), "torch")
    same(expected, batches(config_of(folders["jpeg"]), "dali"))
    raw = batches(config_of(folders["raw"]), "torch")
    for one, two in zip(raw, expected, strict=True):
        for name, part in one.parts().items():
            assert name.endswith("_image") or torch.equal(part, two.parts()[name]), name


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("image", ["raw", "jpeg"])
def test_dali_on_a_gpu(folders: dict[str, Path], image: str) -> None:
    config, device = config_of(folders[image], workers=1), torch.device("cuda")
    expected = batches(config, "torch")
    found = list(load(config, inputs_of(config), Choice("dali", ""), 5, 0, 9, device, lambda line: None))
    assert all(batch.target_image.is_cuda for batch in found)
    same(expected, found, levels=0.0 if image == "raw" else 3.0)


LOADERS = [("torch", "folders"), ("torch", "raw"), pytest.param("dali", "raw", marks=needs_dali)]


@pytest.mark.parametrize(("name", "kind"), LOADERS)
def test_resume_at_any_step_and_with_other_workers(folders: dict[str, Path], name: str, kind: str) -> None:
    """Over the ends of several epochs: 6 images, 3 in a step."""
    whole = batches(config_of(folders[kind]), name)
    for first, workers in ((1, 0), (2, 1), (5, 3), (8, 2)):
        same(whole[first:], batches(config_of(folders[kind], workers=workers), name, first))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_samples_of_one_process(folders: dict[str, Path], world: int) -> None:
    """No sample twice and none left out, whatever the number of processes; epochs end for all at once."""
    config = config_of(folders["raw"], batch_size=1)
    index = inputs_of(config)
    assert index.source is not None

    def dataset(rank: int) -> StepDataset:
        plan = Plan(5, index.source, index.target, BOX, BOX, (24, 32), 1, config.sampling)
        return StepDataset(plan, index.source, index.target, rank, world)

    ranks = [dataset(rank) for rank in range(world)]
    alone = StepDataset(ranks[0].plan, index.source, index.target)
    steps = [[rank[step] for rank in ranks] for step in range(12 // world)]
    for position, batch in enumerate(batch for step in steps for batch in step):
        assert torch.equal(batch.target_image, alone[position].target_image)
        assert torch.equal(batch.source_label, alone[position].source_label)
    seen = [rank.views(step).target[0].index for step in range(12 // world) for rank in ranks]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]


@needs_dali
@pytest.mark.parametrize("resident", [False, True])
def test_features_come_with_their_images(folders: dict[str, Path], resident: bool) -> None:
    """Made for the original files, read beside the store."""
    config = config_of(folders["folders"])
    inputs = inputs_of(config)
    assert inputs.source is not None
    made = create_features(None, folders["folders"], Recipe("test", {"dtype": "int8"}), overwrite=False)
    rng = np.random.default_rng(2)
    for sample in inputs.source.samples:
        size = (sample.width, sample.height)
        shape = (-(-size[1] // 8), -(-size[0] // 8), 5)
        made.write(sample.image, rng.normal(size=shape).astype(np.float32), Geometry(size, size, 8))

    def features(index: Index) -> object:
        store = FeatureStore(made.folder, index.layout.root, made.recipe)
        return read_residents(store, index.samples)[0] if resident else store

    def run(kind: str, name: str) -> Iterator[Batch]:
        found = inputs_of(config_of(folders[kind]))
        assert found.source is not None
        more = {"source_features": features(found.source), "target_features": features(found.target)}
        whole = Inputs(found.source, found.target, found.segments, **more)  # type: ignore[arg-type]
        return batches(config_of(folders[kind]), name, 0, 4, whole)  # type: ignore[return-value]

    expected = list(run("folders", "torch"))
    name = "source_places" if resident else "source_features"
    assert expected[0].parts()[name] is not None
    same(expected, list(run("raw", "torch")))
    same(expected, list(run("raw", "dali")))


@needs_dali
def test_without_a_source(folders: dict[str, Path]) -> None:
    def run(kind: str, name: str) -> list[Batch]:
        found = inputs_of(config_of(folders[kind]))
        return batches(config_of(folders[kind]), name, 0, 3, Inputs(None, found.target, found.segments))

    expected = run("folders", "torch")
    assert expected[0].source_image.shape[0] == 0 and expected[0].source_label.shape == (0, 24, 32)
    same(expected, run("raw", "dali"))


@needs_dali
def test_a_file_damaged_meanwhile_is_named(folders: dict[str, Path]) -> None:
    config = config_of(folders["jpeg"])
    inputs = inputs_of(config)
    for path in folders["jpeg"].glob("images-*.npy"):
        data = bytearray(path.read_bytes())
        data[300::400] = bytes(byte ^ 1 for byte in data[300::400])
        path.write_bytes(data)
    for name, workers in (("torch", 0), ("torch", 1), ("dali", 0), ("dali", 1)):
        with pytest.raises(UserError) as error:
            list(load(config_of(folders["jpeg"], workers=workers), inputs, Choice(name, ""), 5, 0, 4, CPU, print))
        assert_sentence(error.value, "images-00000.npy", "checksum")


def choose(
    folders: dict[str, Path], kind: str, device: str = "cuda", pixels: bool = False, **options: object
) -> Choice:
    config = config_of(folders[kind], **options)
    inputs = inputs_of(config)
    return choose_loader(config, inputs.source, inputs.target, torch.device(device), pixels)


@needs_dali
def test_the_choice_says_why(folders: dict[str, Path]) -> None:
    assert choose(folders, "raw", "cpu").name == "torch" and "GPU" in choose(folders, "raw", "cpu").reason
    assert choose(folders, "raw").name == choose(folders, "jpeg").name == "dali"
    assert choose(folders, "folders").name == "torch" and "prepare store" in choose(folders, "folders").reason
    assert "cached_views" in choose(folders, "raw", pixels=True).reason
    assert "--data.cache" in choose(folders, "raw", cache=True).reason
    assert choose(folders, "raw", loader="torch") == Choice("torch", "as asked for")
    assert choose(folders, "raw", "cpu", loader="dali") == Choice("dali", "as asked for")
    for kind, options, parts in (
        ("folders", {}, ["--data.source.root", "--data.target.root", "prepare store"]),
        ("raw", {"cache": True}, ["--data.cache"]),
    ):
        with pytest.raises(UserError) as error:
            choose(folders, kind, "cpu", loader="dali", **options)  # type: ignore[arg-type]
        assert_sentence(error.value, "--data.loader dali", "--data.loader torch", *parts)


def test_a_jpeg_store_of_other_sizes_is_no_work_for_dali(tmp_path: Path) -> None:
    """It would have to resize as OpenCV does."""
    save(tmp_path / "set" / "images" / "a.png", picture(1, 60, 50))
    save(tmp_path / "set" / "labels" / "a.png", np.zeros((50, 60), np.uint8))
    (tmp_path / "set" / "classes.json").write_text('["x", "y"]')
    words = ["store", tmp_path / "set", "--out", tmp_path / "jpeg", "--image", "jpeg", "--no-resize"]
    assert prepare.main([*map(str, words), "--workers", "0"]) == 0
    config = config_of(tmp_path / "jpeg", loader="dali")
    index = build_index(config.source, True, "data.source")
    with pytest.raises(UserError) as error:
        choose_loader(config, index, index, CPU, False)
    assert_sentence(error.value, "--data.source.resize", "another size")
