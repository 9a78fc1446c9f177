"""Prepared stores: the same samples as from the original files, readable without us, and every damage named."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ssr_fast import prepare
from ssr_fast.data import geometry, store_writer, verified
from ssr_fast.data.images import read_image
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.plan import Plan, SamplingConfig
from ssr_fast.data.segments import SegmentStore, create_store
from ssr_fast.data.store import ImageStore
from ssr_fast.data.stores import Recipe
from ssr_fast.data.torch_loader import StepDataset
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence, picture, save


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))


def make(root: Path, out: Path, *options: str, workers: int = 0) -> Path:
    assert prepare.main(["store", str(root), "--out", str(out), "--workers", str(workers), *options]) == 0
    return out


def index_of(root: Path, labelled: bool = True, **options: object) -> Index:
    return build_index(DomainConfig(root=str(root), **options), labelled, "data.source")  # type: ignore[arg-type]


def odd(root: Path) -> Path:
    """A folder data set of odd sizes and modes: RGB, grey, palette, 16-bit grey, RGBA, JPEG; two kinds of labels."""
    rng = np.random.default_rng(4)
    sizes = [(61, 47), (33, 90), (100, 40), (17, 13), (64, 64), (50, 31)]
    pictures = [picture(k, *size) for k, size in enumerate(sizes)]
    save(root / "images" / "a.png", pictures[0])
    save(root / "images" / "b.png", pictures[1][..., 0])
    builders.save_palette(root / "images" / "c.png", pictures[2][..., 1])
    save(root / "images" / "d.png", pictures[3][..., 0].astype(np.uint16) * 257)
    save(root / "images" / "e é\n.png", np.concatenate([pictures[4], pictures[4][..., :1]], 2))
    save(root / "images" / "sub" / "f.jpg", pictures[5])
    for name, size in zip(["a", "b", "c", "d", "e é\n", "sub/f"], sizes, strict=True):
        label = rng.choice([0, 1, 2, 255], size[::-1]).astype(np.uint8)
        if name == "c":
            builders.save_palette(root / "labels" / f"{name}.png", label)
        else:
            save(root / "labels" / f"{name}.png", label.astype(np.uint16) if name == "d" else label)
    (root / "classes.json").write_text('["x", "y", "z"]')
    return root


LAYOUTS = {
    "gta5": (builders.gta5, "train", True),
    "synthia": (builders.synthia, "train", True),
    "cityscapes": (builders.cityscapes, "train", True),
    "acdc": (builders.acdc, "train", True),
    "darkzurich": (builders.darkzurich, "train", False),
    "bdd100k": (builders.bdd100k, "train", True),
    "mapillary": (builders.mapillary, "val", True),
    "camvid": (builders.camvid, "all", True),
    "folder": (odd, "train", True),
}


@pytest.mark.parametrize("resize", [None, (24, 20)])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str, resize: tuple[int, int] | None) -> None:
    build, split, labelled = LAYOUTS[layout]
    original = index_of(build(tmp_path / "set"), labelled, split=split, resize=resize)
    size = ["--no-resize"] if resize is None else ["--resize", *map(str, resize)]
    store = make(tmp_path / "set", tmp_path / "store", "--split", split, *size, *["--unlabelled"] * (not labelled))
    prepared = index_of(store, labelled, split=split, resize=resize)
    assert prepared.digest == original.digest and prepared.classes == original.classes
    assert len(prepared.samples) == len(original.samples) > 0
    for one, two in zip(original.samples, prepared.samples, strict=True):
        fitted = geometry.fitted_size(one.width, one.height, resize)
        expected = geometry.resize_image(read_image(one.image), fitted)
        np.testing.assert_array_equal(prepared.layout.read_image(two.image), expected)
        assert (two.label is None) == (one.label is None) == (not labelled)
        if one.label is not None and two.label is not None:
            label = geometry.resize_label(original.layout.read_label(one.label), fitted)
            np.testing.assert_array_equal(prepared.layout.read_label(two.label), label)
        assert (one.name, one.width, one.height, one.counts) == (two.name, two.width, two.height, two.counts)


def test_the_recipes_size_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make(builders.gta5(tmp_path / "set"), tmp_path / "store")
    assert "1280x720" in capsys.readouterr().err
    assert index_of(store, resize=(1280, 720)).layout.store.box == (1280, 720)  # type: ignore[union-attr]


def with_segments(root: Path) -> SegmentStore:
    """A segment store of the data set."""
    store = create_store(None, root, Recipe("test", {}), overwrite=False)
    rng = np.random.default_rng(9)
    for path in sorted((root / "images").rglob("*.*")):
        height, width = read_image(path).shape[:2]
        store.write(path, rng.integers(0, 65536, (height, width)).astype(np.uint16))
    return store


def steps(index: Index, box: tuple[int, int] | None, segments: object, count: int = 10, **options: object) -> list:
    plan = Plan(3, index, index, box, box, (24, 32), 3, SamplingConfig(max_class_share=0.4))
    dataset = StepDataset(plan, index, index, segments=segments, **options)  # type: ignore[arg-type]
    return [dataset[step] for step in range(count)]


def same(one: object, two: object, tolerance: dict[str, int] | None = None) -> None:
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        first, second = getattr(one, field.name), getattr(two, field.name)
        if first is None:
            assert second is None
            continue
        assert first.dtype == second.dtype and first.shape == second.shape
        assert (first.int() - second.int()).abs().max() <= (tolerance or {}).get(field.name, 0), field.name


@pytest.mark.parametrize("box", [None, (40, 30)])
@pytest.mark.parametrize("cache", [False, True])
def test_a_raw_store_gives_the_batches_of_the_folders(tmp_path: Path, box: tuple[int, int] | None, cache: bool) -> None:
    """Images, labels, validity and segments, with every mode and odd size, and crops beyond the images."""
    original = index_of(odd(tmp_path / "set"))
    segments = with_segments(tmp_path / "set")
    size = ["--no-resize"] if box is None else ["--resize", *map(str, box)]
    prepared = index_of(make(tmp_path / "set", tmp_path / "store", *size, "--segments"), resize=box)
    expected = steps(original, box, segments)
    found = steps(prepared, box, prepared.layout.store, cache=cache)
    assert any(bool((batch.target_segments > 32767).any()) for batch in expected)
    for one, two in zip(expected, found, strict=True):
        same(one, two)
    if box is None:  # what is stored at its own size may be asked for at another
        for one, two in zip(
            steps(original, (40, 30), segments), steps(prepared, (40, 30), prepared.layout.store), strict=True
        ):
            same(one, two)


def test_a_jpeg_store_has_the_same_labels_and_nearly_the_same_images(tmp_path: Path) -> None:
    for number in range(4):
        rows, columns = np.mgrid[:50, : 60 + number]
        image = np.stack([2 * rows + columns, 255 - 3 * rows, 2 * columns], 2).astype(np.uint8)
        save(tmp_path / "set" / "images" / f"{number}.png", image)
        save(tmp_path / "set" / "labels" / f"{number}.png", (rows // 20).astype(np.uint8))
    (tmp_path / "set" / "classes.json").write_text('["x", "y", "z"]')
    original = index_of(tmp_path / "set")
    store = make(tmp_path / "set", tmp_path / "store", "--image", "jpeg", "--segments", str(with_segments(
        tmp_path / "set").folder))  # fmt: skip
    prepared = index_of(store)
    expected = steps(original, None, SegmentStore(tmp_path / "set" / "segments", tmp_path / "set", Recipe("test", {})))
    found = steps(prepared, None, prepared.layout.store)
    for one, two in zip(expected, found, strict=True):
        same(one, two, {"source_image": 6, "target_image": 6})
    content = prepared.layout.store.jpeg(prepared.samples[0].image)  # type: ignore[union-attr]
    (tmp_path / "one.jpg").write_bytes(content.tobytes())
    with Image.open(tmp_path / "one.jpg") as picture_file:
        assert picture_file.format == "JPEG" and picture_file.layer[0][1:3] == picture_file.layer[1][1:3] == (1, 1)
        assert max(picture_file.quantization[0]) <= 12  # quality 95: the standard table's 121 becomes 12
    decoded = cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(decoded.astype(int) - prepared.layout.read_image(prepared.samples[0].image)).max() <= 1


def test_numpy_and_json_are_enough_to_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    original = index_of(odd(tmp_path / "set"))
    with_segments(tmp_path / "set")
    store = make(tmp_path / "set", tmp_path / "store", "--segments")
    rows = json.loads((store / "index.json").read_text())["samples"]
    assert len({row["shard"] for row in rows}) > 2
    for row, sample in zip(rows, original.samples, strict=True):
        width, height = row["stored"]
        part = {kind: np.load(store / f"{kind}-{row['shard']:05d}.npy", mmap_mode="r") for kind in row["sums"]}
        image = part["images"][row["start"] : row["stop"]].reshape(height, width, 3)
        label, segments = (
            part[kind][row["first"] : row["first"] + width * height].reshape(height, width)
            for kind in ("labels", "segments")
        )
        np.testing.assert_array_equal(image, read_image(sample.image))
        np.testing.assert_array_equal(label, original.layout.read_label(sample.label or ""))
        assert label.dtype == np.uint8 and segments.dtype == np.uint16 and row["counts"] == list(sample.counts or ())


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert prepare.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_bytes_do_not_depend_on_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    root = odd(tmp_path / "set")
    one = content(make(root, tmp_path / "one"))
    assert content(make(root, tmp_path / "two", workers=2)) == one
    for rank in (2, 0, 1):
        assert not (tmp_path / "three" / "index.json").exists()
        make(root, tmp_path / "three", "--rank", str(rank), "--world", "3")
    assert content(tmp_path / "three") == one
    assert sorted(path.name for path in (tmp_path / "three").iterdir() if path.is_dir()) == [".tmp"]


def test_a_second_run_keeps_what_is_there_and_mends_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    root, store = odd(tmp_path / "set"), tmp_path / "store"
    whole = content(make(root, store))
    stamp = (store / "images-00001.npy").stat().st_mtime_ns
    make(root, store)
    assert "0 images made, 6 kept" in capsys.readouterr().out and content(store) == whole
    for name in ("images-00002.npy", "labels-00000.npy", "sample_class_stats.json", "index.json"):
        assert (store / "images-00001.npy").stat().st_mtime_ns == stamp, name
        (store / name).write_bytes(whole[name][:-1] + b"!")
        make(root, store)
        assert content(store) == whole, name
    (store / "store.json").write_bytes(whole["store.json"][:-1] + b"!")
    assert_sentence(said(capsys, "store", root, "--out", store), store / "store.json", "--overwrite")
    assert content(make(root, store, "--overwrite")) == whole


def test_overwriting_keeps_nothing_of_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished or not: parts of both look alike."""
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    root = odd(tmp_path / "set")
    with_segments(root)
    for before, after in ((["--segments"], ["--image", "jpeg", "--unlabelled"]), ([], ["--image", "jpeg"])):
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        fresh = content(make(root, tmp_path / "fresh", *after))
        for rank in (["--rank", "0", "--world", "2"], []):
            make(root, tmp_path / "store", "--overwrite", *before, *rank)
            make(root, tmp_path / "store", "--overwrite", *after)
            assert content(tmp_path / "store") == fresh


def test_a_rank_that_comes_late_keeps_what_the_others_have_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank has written the index, and so removed the parts, before this one finds its own damaged."""
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    make(odd(tmp_path / "set"), tmp_path / "store")
    whole, plans = content(tmp_path / "store"), []
    make_store = store_writer.make_store

    def late(plan: store_writer.Plan, workers: int, rank: int, world: int) -> Iterator[store_writer.Done]:
        plans.append(plan)
        return make_store(plan, workers, rank, world)

    monkeypatch.setattr("ssr_fast.prepare_store.make_store", late)
    make(tmp_path / "set", tmp_path / "store", "--rank", "0", "--world", "2")
    assert not (tmp_path / "store" / "parts").exists()
    (tmp_path / "store" / "labels-00001.npy").write_bytes(b"damaged")
    assert not store_writer._Job(plans[0])(1).kept
    assert not (tmp_path / "store" / "index.json").exists()
    store_writer._finish(plans[0])
    assert content(tmp_path / "store") == whole


def test_changed_originals_are_stored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    root, store = odd(tmp_path / "set"), make(odd(tmp_path / "set"), tmp_path / "store")
    save(root / "images" / "a.png", picture(77, 61, 47))
    os.remove(root / "images" / "sub" / "f.jpg")
    os.remove(root / "labels" / "sub" / "f.png")
    make(root, store)
    assert content(store) == content(make(root, tmp_path / "fresh"))
    prepared = index_of(store)
    np.testing.assert_array_equal(prepared.layout.read_image(prepared.samples[0].image), picture(77, 61, 47))


def test_every_flipped_byte_and_every_truncation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every file, headers too; and the command that is named mends it."""
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    with_segments(odd(tmp_path / "set"))
    store = make(tmp_path / "set", tmp_path / "store", "--segments")
    whole, rng = content(store), np.random.default_rng(1)
    index_of(store)
    for name, data in whole.items():
        places = {0, 7, len(data) - 1, *map(int, rng.integers(0, len(data), 6))}
        broken = [
            data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :] for place in places
        ]
        for damaged in [*broken, data[:-1], data[: len(data) // 2], b"", data + b"x", None]:
            (store / name).unlink() if damaged is None else (store / name).write_bytes(damaged)
            if name == "store.json" and damaged is None:
                continue  # then it is no store
            with pytest.raises(UserError) as error:
                index_of(store)
            assert_sentence(error.value, store)
            assert name in str(error.value) or name == "index.json", error.value
            listed = tmp_path / "check.json"
            listed.unlink(missing_ok=True)
            assert prepare.main(["check", str(store), "--json", str(listed)]) == 2
            printed = capsys.readouterr().err
            if listed.exists():
                problems = json.loads(listed.read_text())["problems"]
                assert [problem["path"] for problem in problems] == [str(store / name)]
            else:
                assert name in printed or name == "index.json", printed
            (store / name).write_bytes(data)
        (store / name).write_bytes(data)
    index_of(store)
    assert content(store) == whole


def test_whole_files_are_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    monkeypatch.setattr(verified, "_TICK", 0)
    store, read = make(odd(tmp_path / "set"), tmp_path / "store"), []
    check = ImageStore.check_shard

    def counted(self: ImageStore, path: Path, rows: object) -> object:
        read.append(path.name)
        return check(self, path, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageStore, "check_shard", counted)
    index_of(store)
    assert len(read) == len(set(read)) == len(list(store.glob("*.npy")))
    index_of(store)
    assert len(read) == len(set(read))
    os.utime(store / "labels-00001.npy")
    read.clear()
    index_of(store)
    assert read == ["labels-00001.npy"]
    assert prepare.main(["check", str(store)]) == 0  # which was asked for, and so reads all
    assert len(read) == 1 + len(list(store.glob("*.npy")))


def test_a_damaged_jpeg_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Though it was whole when the store was opened."""
    store = make(odd(tmp_path / "set"), tmp_path / "store", "--image", "jpeg")
    prepared = index_of(store)
    path = store / "images-00000.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        prepared.layout.read_image(prepared.samples[0].image)
    assert_sentence(error.value, path, repr(prepared.samples[0].name), "prepare store")


def test_daformers_files_are_written_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = builders.gta5(tmp_path / "set")
    store = make(root, tmp_path / "store")
    rows = json.loads((store / "sample_class_stats.json").read_text())
    assert [row["file"].rsplit("/", 1)[1] for row in rows] == ["00001_labelTrainIds.png", "00002_labelTrainIds.png"]
    assert rows[0]["0"] == rows[0]["1"] == 32
    capsys.readouterr()
    assert prepare.main(["check", str(store)]) == 0
    assert "sample_class_stats.json agrees" in capsys.readouterr().out
    shutil.copy(store / "sample_class_stats.json", root)
    make(root, tmp_path / "again")
    assert "sample_class_stats.json agrees" in capsys.readouterr().err
    rows[0]["0"] += 1
    (root / "sample_class_stats.json").write_text(json.dumps(rows))
    make(root, tmp_path / "third")
    assert "contradicts" in capsys.readouterr().err


def test_images_are_read_only(tmp_path: Path) -> None:
    """A write would go into nobody's memory but the file's pages."""
    prepared = index_of(make(odd(tmp_path / "set"), tmp_path / "store"))
    image = prepared.layout.read_image(prepared.samples[0].image)
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0
    batch = steps(prepared, None, None, 1)[0]
    batch.target_image.fill_(0)  # a batch is the caller's own
    assert torch.equal(batch.target_image, torch.zeros_like(batch.target_image)) and image.any()
