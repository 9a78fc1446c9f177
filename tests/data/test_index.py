import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ssr_fast.data.index import Diagnosis, DomainConfig, Index, Problem, build_index, diagnose
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.data.layouts import LAYOUTS
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence, ids, picture, save, save_palette


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSR_FAST_CACHE", str(folder))
    return folder / "index"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def config(root: Path, **fields: object) -> DomainConfig:
    return dataclasses.replace(DomainConfig(root=str(root)), **fields)


def build(root: Path, labelled: bool = True, **fields: object) -> tuple[Index, list[str]]:
    lines: list[str] = []
    return build_index(config(root, **fields), labelled, "data.source", report=lines.append), lines


def refused(root: Path, labelled: bool = True, **fields: object) -> str:
    with pytest.raises(UserError) as error:
        build(root, labelled, **fields)
    assert_sentence(error.value, root, "--data.source.")
    return str(error.value)


def only_row(root: Path, **fields: object) -> Problem:
    """The one problem of a data set; its sentence is what training refuses with, if it is fatal."""
    (row,) = diagnose(config(root, **fields), labelled=True).rows
    assert_sentence(row, row.path, row.problem, row.advice)
    if row.fatal:
        assert str(row) in refused(root, **fields)
    return row


SPLIT = {"cityscapes": "val", "acdc": "val", "darkzurich": "val", "bdd100k": "val", "mapillary": "val", "camvid": "val"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_indexed_with_sizes_and_counts(root: Path, name: str) -> None:
    getattr(builders, name)(root)
    index, _ = build(root, split=SPLIT.get(name, "train"))
    assert index.layout.name == name and index.samples
    for sample in index.samples:
        assert (sample.width, sample.height) == (16, 8)
        assert sample.label is not None and Path(sample.label).is_file() and Path(sample.image).is_file()
        label = index.layout.read_label(sample.label)
        assert sample.counts == tuple(int((label == k).sum()) for k in range(index.classes.count))
        assert all(isinstance(count, int) for count in sample.counts)


def test_an_unlabelled_index_never_opens_labels(root: Path) -> None:
    builders.cityscapes(root)
    for path in root.rglob("*_labelIds.png"):
        path.write_text("no image")
    index, _ = build(root, labelled=False)
    assert [(sample.label, sample.counts) for sample in index.samples] == [(None, None)] * 2
    assert index.classes == CITYSCAPES


def test_an_unlabelled_folder_needs_no_classes(root: Path) -> None:
    save(root / "images" / "a.png", picture())
    index, _ = build(root, labelled=False)
    assert index.classes.count == 0 and len(index.samples) == 1
    assert "classes.json" in refused(root)


def test_samples_are_sorted_and_names_may_be_anything(root: Path) -> None:
    stems = ("z", "ä ö", "日本", "a[b]", "x'y")
    index, _ = build(builders.folder(root, stems))
    assert [sample.name for sample in index.samples] == sorted(stems)


def test_names_that_are_not_utf8_do_not_break_the_index(root: Path, cache: Path) -> None:
    builders.folder(root, ("a",))
    for kind in ("images", "labels"):
        os.rename(os.fsencode(root / kind / "a.png"), os.fsencode(root / kind) + b"/\xff.png")
    one, _ = build(root)
    two, lines = build(root)
    assert len(one.samples) == 1 and one.digest == two.digest and lines == []
    assert len(list(cache.iterdir())) == 1


# mistakes in the configuration


def test_config_problems_are_sentences_with_the_option() -> None:
    bad = DomainConfig(layout="kitti", split="", resize=(0, 3), classes="x.json")
    assert [sentence.split()[0] for sentence in bad.problems("data.source")] == [
        "--data.source.layout", "--data.source.split", "--data.source.resize", "--data.source.classes",
    ]  # fmt: skip
    assert "'kitti'" in bad.problems("data.source")[0]
    assert DomainConfig(root="x", resize=(1280, 720), layout="folder", classes="c.json").problems("data.source") == []


def test_a_missing_root_names_option_and_value(root: Path) -> None:
    assert "does not exist" in refused(root)
    with pytest.raises(UserError) as error:
        build_index(DomainConfig(), True, "data.target")
    assert_sentence(error.value, "--data.target.root")


def test_an_empty_folder_is_named(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "classes.json").write_text('["a", "b"]')
    assert "no images" in refused(root)


# bad files


def test_an_image_without_label(root: Path) -> None:
    builders.folder(root)
    (root / "labels" / "a.png").unlink()
    row = only_row(root)
    assert row.path == root / "images" / "a.png" and "has no label" in row.problem


def test_no_labels_at_all_is_one_problem(root: Path) -> None:
    builders.darkzurich(root)
    row = only_row(root, split="train")
    assert row.path == root and "no labels at all" in row.problem and "3 images" in row.problem


def test_a_label_without_image_is_left_out(root: Path) -> None:
    builders.folder(root)
    (root / "images" / "a.png").unlink()
    row = only_row(root)
    assert row.path == root / "labels" / "a.png" and not row.fatal
    index, lines = build(root)
    assert [sample.name for sample in index.samples] == ["b"]
    assert sum("left out" in line and "a.png" in line for line in lines) == 1


def test_two_images_with_the_same_stem(root: Path) -> None:
    builders.folder(root)
    save(root / "images" / "a.jpg", picture())
    row = only_row(root)
    assert row.path.name == "a.png" and "a.jpg" in row.problem
    assert len(diagnose(config(root), True).samples) == 2


def test_two_labels_for_one_image(root: Path) -> None:
    builders.folder(root)
    save(root / "labels" / "a_label.png", ids(0))
    row = only_row(root)
    assert row.path.name == "a_label.png" and "a.png" in row.problem


def test_a_size_mismatch_is_an_error_outside_gta5(root: Path) -> None:
    builders.folder(root)
    save(root / "labels" / "b.png", ids(0, 1, width=15))
    row = only_row(root)
    assert row.path == root / "labels" / "b.png" and "15x8" in row.problem and "16x8" in row.problem
    assert "b.png" in row.problem


def test_a_size_mismatch_in_gta5_is_left_out_with_one_line(root: Path) -> None:
    builders.gta5(root, 3)
    save_palette(root / "labels" / "00002.png", ids(7, 8, width=15))
    row = only_row(root)
    assert row.path == root / "labels" / "00002.png" and not row.fatal
    index, lines = build(root)
    assert [sample.name for sample in index.samples] == ["00001", "00003"]
    (line,) = [line for line in lines if "left out" in line]
    assert line.startswith("1 file(s)") and "00002.png" in line


def test_an_unknown_value_names_file_value_and_place(root: Path) -> None:
    builders.folder(root)
    save(root / "labels" / "b.png", ids(0, 9))
    row = only_row(root)
    assert row.path == root / "labels" / "b.png" and "value 9 at column 8, row 0" in row.problem


def test_a_colour_coded_label(root: Path) -> None:
    builders.folder(root)
    save(root / "labels" / "b.png", picture())
    assert "colour-coded" in only_row(root).problem


def test_a_label_that_is_ignored_everywhere_stops_training(root: Path) -> None:
    builders.folder(root)
    save(root / "labels" / "b.png", ids(255))
    row = only_row(root)
    assert row.path == root / "labels" / "b.png" and "ignored everywhere" in row.problem and row.fatal
    assert "b.png is ignored everywhere" in refused(root)


def test_nothing_usable_is_left(root: Path) -> None:
    builders.gta5(root, 1)
    save_palette(root / "labels" / "00001.png", ids(7, 8, width=15))
    rows = diagnose(config(root), True).rows
    assert [row.fatal for row in rows] == [True, False] and rows[0].path == root
    assert "no usable image" in refused(root)


def test_a_mask_of_0_and_255_is_not_read_as_background_only(root: Path) -> None:
    builders.folder(root, classes=["background", "object"])
    for stem in "ab":
        save(root / "labels" / f"{stem}.png", ids(0, 255))
    row = only_row(root)
    assert row.path == root and "no pixel of the class object" in row.problem and '"255": 1' in row.advice
    (root / "classes.json").write_text(json.dumps({"names": ["background", "object"], "ids": {"0": 0, "255": 1}}))
    assert build(root)[0].samples[0].counts == (64, 64)


@pytest.mark.parametrize("which", ["images", "labels"])
def test_a_truncated_png(root: Path, which: str) -> None:
    builders.folder(root)
    path = root / which / "b.png"
    save(root / "images" / "b.png", picture(width=200, height=100))
    save(root / "labels" / "b.png", np.random.default_rng(0).integers(0, 3, (100, 200)).astype(np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    row = only_row(root)
    assert row.path == path and "cannot be decoded" in row.problem


@pytest.mark.parametrize("which", ["images", "labels"])
def test_text_renamed_png(root: Path, which: str) -> None:
    builders.folder(root)
    (root / which / "a.png").write_text("hello")
    row = only_row(root)
    assert row.path == root / which / "a.png" and "is not an image" in row.problem


def test_a_link_to_itself(root: Path) -> None:
    builders.folder(root)
    (root / "images" / "a.png").unlink()
    (root / "images" / "a.png").symlink_to(root / "images" / "a.png")
    row = only_row(root)
    assert row.path == root / "images" / "a.png" and "symbolic links" in row.problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(root: Path) -> None:
    builders.folder(root)
    (root / "images" / "a.png").chmod(0)
    assert "permission" in only_row(root).problem


def test_the_first_of_several_is_named_and_the_others_are_counted(root: Path) -> None:
    builders.folder(root, tuple("abcde"))
    for stem in "bcd":
        (root / "images" / f"{stem}.png").write_text("x")
    message = refused(root, split="all")
    assert str(root / "images" / "b.png") in message and "2 more" in message and "c.png" not in message
    assert f"python -m ssr_fast.prepare check {root} --split all" in message
    rows = diagnose(config(root), True).rows
    assert [row.path.name for row in rows] == ["b.png", "c.png", "d.png"]


def test_unusual_images_are_used_and_noted(root: Path) -> None:
    builders.folder(root, tuple("abcdef"))
    save(root / "images" / "b.png", picture()[..., 0])
    save(root / "images" / "c.png", np.dstack([picture(), picture()[..., 0]]))
    save(root / "images" / "d.png", picture()[..., 0].astype(np.uint16) * 256)
    save(root / "images" / "e.png", picture() * 0)
    index, lines = build(root)
    assert len(index.samples) == 6
    notes = diagnose(config(root), True).notes  # from the cache, and the same
    assert set(notes) <= set(lines)
    by_word = {word: [n for n in notes if word in n] for word in ("greyscale", "alpha", "16-bit", "all black")}
    assert [len(found) for found in by_word.values()] == [1, 1, 1, 1]
    assert by_word["greyscale"][0].startswith("2 of 6 images: ") and "b.png" in by_word["greyscale"][0]


def test_classes_that_never_occur_are_noted(root: Path) -> None:
    builders.folder(root, classes=["road", "car", "sky", "unicorn"])
    assert diagnose(config(root), True).notes == ("no label holds the class unicorn",)


# digest


def test_the_digest_depends_on_content_and_not_on_the_place(root: Path, tmp_path: Path) -> None:
    one = build(builders.folder(root))[0].digest
    assert one == build(builders.folder(tmp_path / "other place"))[0].digest
    assert one != build(builders.folder(tmp_path / "two", ("a",)))[0].digest
    assert one != build(builders.folder(tmp_path / "three", classes=["road", "car", "cloud"]))[0].digest
    save(root / "labels" / "a.png", ids(0, 1, 1, 255))
    assert one != build(root)[0].digest


def test_diagnosis_counts_files(root: Path) -> None:
    builders.folder(root, tuple("abc"))
    (root / "labels" / "c.png").unlink()
    diagnosis = diagnose(config(root), True)
    assert isinstance(diagnosis, Diagnosis)
    assert (diagnosis.images, diagnosis.labels, len(diagnosis.samples)) == (3, 2, 2)
    assert diagnosis.index().samples == diagnosis.samples
