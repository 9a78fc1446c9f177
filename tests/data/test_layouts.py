import json
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from ssr_fast.data.images import BadFile
from ssr_fast.data.labels import CAMVID, CITYSCAPES
from ssr_fast.data.layouts import LAYOUTS, Layout, find_layout
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence, ids, picture, save, save_palette, save_synthia

Build = Callable[[Path], Path]


def names(layout: Layout, split: str, condition: str = "") -> list[str]:
    return [entry.name for entry in layout.entries(split, condition)]


def stripes(label: np.ndarray) -> list[int]:
    """The values of a striped label from left to right."""
    assert (label == label[:1]).all() and label.dtype == np.uint8 and label.shape == (8, 16)
    row = label[0].tolist()
    return [value for k, value in enumerate(row) if k == 0 or row[k - 1] != value]


EXPECTED = {
    "gta5": ("train", "00001", [0, 1, 255]),
    "synthia": ("train", "0000000", [0, 3, 255]),
    "cityscapes": ("val", "lindau/lindau_000000_000019", [0, 18, 255, 2]),
    "acdc": ("val", "fog/GOPR1/fog_frame_1", [0, 18, 255]),
    "darkzurich": ("val", "night/GOPR2/frame", [0, 10, 255]),
    "bdd100k": ("val", "val-1", [0, 18, 255]),
    "mapillary": ("val", "validation_x", [0, 1, 255, 8]),
    "camvid": ("val", "0016E5_07959", [0, 3, 10, 255]),
    "folder": ("train", "a", [0, 1, 2, 255]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found_from_its_root(tmp_path: Path, name: str) -> None:
    split, first, values = EXPECTED[name]
    root = getattr(builders, name)(tmp_path)
    layout = pickle.loads(pickle.dumps(find_layout(root)))  # loader processes get it by pickle
    assert layout.name == name
    entries = layout.entries(split)
    assert entries[0].name == first
    assert entries[0].label is not None and stripes(layout.read_label(str(entries[0].label))) == values
    if name not in ("camvid", "folder"):
        assert layout.classes == CITYSCAPES


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_named_layout_is_the_same_as_the_detected_one(tmp_path: Path, name: str) -> None:
    root = getattr(builders, name)(tmp_path)
    split = EXPECTED[name][0]
    assert find_layout(root, name).entries(split) == find_layout(root).entries(split)


@pytest.mark.parametrize("name", LAYOUTS)
def test_unknown_splits_and_conditions_are_refused(tmp_path: Path, name: str) -> None:
    layout = find_layout(getattr(builders, name)(tmp_path))
    with pytest.raises(UserError) as error:
        layout.listing("training-set", "", "data.source")
    assert_sentence(error.value, "--data.source.split", "'training-set'", "train")
    with pytest.raises(UserError) as error:
        layout.listing("train", "foggy", "data.source")
    assert_sentence(error.value, "--data.source.condition", "'foggy'")


# gta5


def test_gta5_prefers_converted_labels_and_reads_them_as_train_ids(tmp_path: Path) -> None:
    root = builders.gta5(tmp_path)
    save(root / "labels" / "00001_labelTrainIds.png", ids(7, 18, 255))
    layout = find_layout(root)
    one, two = layout.entries("train")
    assert one.label == root / "labels" / "00001_labelTrainIds.png" and stripes(layout.read_label(one.label)) == [
        7,
        18,
        255,
    ]
    assert two.label == root / "labels" / "00002.png" and stripes(layout.read_label(two.label)) == [0, 1, 255]
    listing = layout.listing("train")
    assert listing.orphans == () and listing.rivals == ()


def test_numbered_files_of_ones_own_are_not_taken_for_gta5(tmp_path: Path) -> None:
    save(tmp_path / "images" / "00001.png", picture())
    save(tmp_path / "labels" / "00001.png", ids(7, 8))
    assert find_layout(tmp_path).name == "folder"
    builders.gta5(tmp_path)
    assert find_layout(tmp_path).name == "gta5"
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert find_layout(tmp_path).name == "folder"


def test_converted_gta5_without_palette_files_is_found(tmp_path: Path) -> None:
    save(tmp_path / "images" / "00001.png", picture())
    save(tmp_path / "labels" / "00001_labelTrainIds.png", ids(0, 18))
    assert find_layout(tmp_path).name == "gta5"


# synthia


def test_synthia_accepts_converted_labels(tmp_path: Path) -> None:
    root = builders.synthia(tmp_path)
    converted = save(root / "GT" / "LABELS" / "0000000_labelTrainIds.png", ids(3, 18))
    layout = find_layout(root)
    assert layout.entries("train")[0].label == converted and stripes(layout.read_label(converted)) == [3, 18]
    assert stripes(layout.read_label(root / "GT" / "LABELS" / "0000001.png")) == [0, 3, 255]


def test_synthia_value_beyond_a_byte_is_unknown(tmp_path: Path) -> None:
    root = builders.synthia(tmp_path)
    path = root / "GT" / "LABELS" / "0000000.png"
    wrong = np.zeros((8, 16, 3), np.uint16)
    wrong[2, 5, 2] = 256 + 3  # the low byte alone would be road
    cv2.imwrite(str(path), wrong)
    with pytest.raises(BadFile) as error:
        find_layout(root).read_label(path)
    assert_sentence(error.value, path, "value 259", "column 5, row 2", "0..22, 255")


# cityscapes, acdc, dark zurich


def test_cityscapes_prefers_train_ids_and_does_not_see_other_files(tmp_path: Path) -> None:
    root = builders.cityscapes(tmp_path)
    builders.cityscapes(tmp_path, "labelTrainIds")
    layout = find_layout(root)
    listing = layout.listing("train")
    assert [entry.name for entry in listing.entries] == ["aachen/aachen_000000_000019", "bochum/bochum_000000_000019"]
    assert all(str(entry.label).endswith("_gtFine_labelTrainIds.png") for entry in listing.entries)
    assert listing.orphans == () and listing.rivals == ()


def test_a_missing_split_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_layout(builders.cityscapes(tmp_path)).listing("test", option="data.target")
    assert_sentence(error.value, "--data.target.split test", tmp_path / "leftImg8bit" / "test", "cityscapes")


@pytest.mark.parametrize("condition", ["fog", "night", "rain", "snow"])
def test_acdc_condition_selects(tmp_path: Path, condition: str) -> None:
    layout = find_layout(builders.acdc(tmp_path))
    assert names(layout, "val", condition) == [f"GOPR1/{condition}_frame_1"]
    assert len(names(layout, "val", "all")) == len(set(names(layout, "val"))) == 4
    assert len(set(names(layout, "all"))) == 8


def test_dark_zurich_conditions(tmp_path: Path) -> None:
    layout = find_layout(builders.darkzurich(tmp_path))
    assert names(layout, "train", "twilight") == ["GOPR1/twilight_1"]
    assert len(names(layout, "train")) == 3
    assert layout.entries("train", "day")[0].label is None


# mapillary


def test_mapillary_label_folders_and_split_names(tmp_path: Path) -> None:
    root = builders.mapillary(tmp_path, "v1.2/labels")
    layout = find_layout(root)
    assert names(layout, "train") == names(layout, "training") == ["training_x"]
    label = layout.entries("train")[0].label
    assert label == root / "training" / "v1.2" / "labels" / "training_x.png"


def test_mapillary_labels_of_version_2_are_refused(tmp_path: Path) -> None:
    root = builders.mapillary(tmp_path)
    path = save_palette(root / "training" / "labels" / "training_x.png", ids(13, 123))
    with pytest.raises(BadFile) as error:
        find_layout(root).read_label(path)
    assert_sentence(error.value, path, "value 123", "column 8, row 0", "0..65, 255")


# camvid


@pytest.mark.parametrize("above", [False, True])
def test_camvid_day_and_dusk_from_the_folder_or_the_one_above(tmp_path: Path, above: bool) -> None:
    builders.camvid(tmp_path / "CamVid")
    layout = find_layout(tmp_path if above else tmp_path / "CamVid")
    assert layout.name == "camvid" and layout.root == tmp_path / "CamVid" and layout.classes is CAMVID
    assert names(layout, "train", "dusk") == ["0001TP_006690"]
    assert names(layout, "train", "day") == ["0006R0_f00930", "0016E5_00390"]
    assert len(names(layout, "train")) == 3
    assert names(layout, "all", "dusk") == ["test/0001TP_008550", "train/0001TP_006690"]
    assert layout.listing("train", "day").orphans == ()


# folder


@pytest.mark.parametrize("suffix", ["", "_gtFine_labelTrainIds", "_labelTrainIds", "_mask", "_label"])
def test_folder_pairs_by_stem_with_the_usual_suffixes(tmp_path: Path, suffix: str) -> None:
    builders.folder(tmp_path, ())
    save(tmp_path / "images" / "sub" / "münchen 1.2.JPG", picture())
    label = save(tmp_path / "labels" / "sub" / f"münchen 1.2{suffix}.png", ids(0, 1))
    (entry,) = find_layout(tmp_path).entries("train")
    assert entry.name == "sub/münchen 1.2" and entry.label == label


def test_folder_prefers_no_guess_when_two_labels_fit(tmp_path: Path) -> None:
    builders.folder(tmp_path)
    save(tmp_path / "labels" / "a_mask.png", ids(0, 1))
    (rival,) = find_layout(tmp_path).listing("train").rivals
    assert [path.name for path in rival] == ["a.png", "a_mask.png"]


def test_folder_image_may_itself_be_called_mask(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("a_mask",))
    listing = find_layout(tmp_path).listing("train")
    assert listing.entries[0].label == tmp_path / "labels" / "a_mask.png" and listing.orphans == ()


def test_folder_with_splits(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("train/a", "val/b"))
    layout = find_layout(tmp_path)
    assert names(layout, "train") == ["a"] and names(layout, "val") == ["b"]
    assert names(layout, "all") == ["train/a", "val/b"]
    assert layout.entries("val")[0].label == tmp_path / "labels" / "val" / "b.png"


def test_folder_without_splits_has_no_val(tmp_path: Path) -> None:
    layout = find_layout(builders.folder(tmp_path))
    assert names(layout, "train") == names(layout, "all") == ["a", "b"]
    with pytest.raises(UserError) as error:
        layout.entries("val")
    assert_sentence(error.value, "--split", "'val'", tmp_path)


def test_folder_ids_map_the_values(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("a",), {"names": ["ground", "thing"], "ids": {"0": 255, "100": 0, "255": 1}})
    layout = find_layout(tmp_path)
    path = save(tmp_path / "labels" / "a.png", ids(0, 100, 255))
    assert stripes(layout.read_label(path)) == [255, 0, 1]
    save(path, ids(0, 100, 3))
    with pytest.raises(BadFile) as error:
        layout.read_label(path)
    assert_sentence(error.value, path, "value 3", "column 11, row 0", "ids")


def test_folder_reads_16_bit_values(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("a",), {"names": ["x", "y"], "ids": {"1000": 0, "1001": 1}})
    path = save(tmp_path / "labels" / "a.png", ids(0, 1).astype(np.uint16) + 1000)
    assert stripes(find_layout(tmp_path).read_label(path)) == [0, 1]


def test_folder_palette_labels_are_indices(tmp_path: Path) -> None:
    builders.folder(tmp_path)
    assert stripes(find_layout(tmp_path).read_label(save_palette(tmp_path / "labels" / "a.png", ids(2, 0)))) == [2, 0]


def color_label(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.asarray(colors, np.uint8)[ids(*range(len(colors)))]


def test_folder_converts_colours(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("a",), {"names": ["x", "y"], "colors": [[200, 10, 9], [9, 9, 9]]})
    path = save(tmp_path / "labels" / "a.png", color_label((9, 9, 9), (0, 0, 0), (200, 10, 9)))
    assert stripes(find_layout(tmp_path).read_label(path)) == [1, 255, 0]
    save(path, color_label((9, 9, 9), (200, 10, 8)))
    with pytest.raises(BadFile) as error:
        find_layout(tmp_path).read_label(path)
    assert_sentence(error.value, path, "(200, 10, 8)", "column 8, row 0")


def test_folder_black_may_be_a_class(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("a",), {"names": ["x", "y"], "colors": [[255, 255, 255], [0, 0, 0]]})
    path = save(tmp_path / "labels" / "a.png", color_label((0, 0, 0), (255, 255, 255)))
    assert stripes(find_layout(tmp_path).read_label(path)) == [1, 0]


@pytest.mark.parametrize("name", ["folder", "gta5", "cityscapes", "bdd100k", "camvid"])
def test_colour_coded_labels_are_refused_where_ids_are_expected(tmp_path: Path, name: str) -> None:
    layout = find_layout(getattr(builders, name)(tmp_path))
    path = layout.entries("train")[0].label
    assert path is not None
    save(path, color_label((128, 64, 128), (0, 0, 142)))
    with pytest.raises(BadFile) as error:
        layout.read_label(path)
    assert_sentence(error.value, path, "colour-coded")


def test_ids_saved_as_grey_rgb_are_ids(tmp_path: Path) -> None:
    layout = find_layout(builders.folder(tmp_path))
    path = save(tmp_path / "labels" / "a.png", color_label((0, 0, 0), (2, 2, 2)))
    assert stripes(layout.read_label(path)) == [0, 2]


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"synthia"}))
def test_an_unknown_value_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    layout = find_layout(getattr(builders, name)(tmp_path))
    path = layout.entries(EXPECTED[name][0])[0].label
    assert path is not None
    label = np.zeros((8, 16), np.uint8)
    label[3:5, 6] = 77
    save(path, label)
    with pytest.raises(BadFile) as error:
        layout.read_label(path)
    assert_sentence(error.value, path, "value 77", "column 6, row 3", "2 pixel(s)")


def test_synthia_unknown_value(tmp_path: Path) -> None:
    path = save_synthia(builders.synthia(tmp_path) / "GT" / "LABELS" / "0000000.png", ids(3, 23))
    with pytest.raises(BadFile) as error:
        find_layout(tmp_path).read_label(path)
    assert_sentence(error.value, path, "value 23")


# roots


def test_a_missing_root_names_option_and_value(tmp_path: Path) -> None:
    for root, part in ((tmp_path / "no", "does not exist"), (save(tmp_path / "x.png", picture()), "is a file")):
        with pytest.raises(UserError) as error:
            find_layout(root, option="data.source")
        assert_sentence(error.value, f"--data.source.root {root}", part)


def test_an_empty_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_layout(tmp_path)
    assert_sentence(error.value, f"ROOT {tmp_path}", "empty")


def test_a_root_without_a_layout_lists_the_layouts(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError) as error:
        find_layout(tmp_path)
    assert_sentence(error.value, tmp_path, *LAYOUTS)


def test_a_layout_that_does_not_fit_names_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_layout(builders.gta5(tmp_path), "acdc")
    assert_sentence(error.value, tmp_path, "rgb_anon/fog", "acdc")
    with pytest.raises(UserError) as error:
        find_layout(tmp_path, "kitti", option="data.source")
    assert_sentence(error.value, "--data.source.layout", "'kitti'", "folder")


def test_a_classes_file_has_no_effect_with_fixed_classes_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_layout(builders.gta5(tmp_path), "gta5", "classes.json", "data.source")
    assert_sentence(error.value, "--data.source.classes", "gta5")


def test_a_given_classes_file_wins_over_the_one_in_the_root(tmp_path: Path) -> None:
    root = builders.folder(tmp_path / "set")
    (tmp_path / "other.json").write_text(json.dumps(["p", "q"]))
    assert find_layout(root).classes.names == ("road", "car", "sky")
    assert find_layout(root, classes=str(tmp_path / "other.json")).classes.names == ("p", "q")


def test_one_class_is_refused(tmp_path: Path) -> None:
    builders.folder(tmp_path, classes=["only"])
    with pytest.raises(UserError) as error:
        find_layout(tmp_path)
    assert_sentence(error.value, tmp_path / "classes.json", "at least 2")


# odd folders


def test_a_circle_of_links_ends_and_links_are_followed(tmp_path: Path) -> None:
    builders.folder(tmp_path / "set")
    (tmp_path / "set" / "images" / "again").symlink_to(tmp_path / "set" / "images")
    save(tmp_path / "elsewhere" / "c.png", picture())
    (tmp_path / "set" / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "images" / "twice").symlink_to(tmp_path / "elsewhere")
    assert names(find_layout(tmp_path / "set"), "train") == ["a", "b", "linked/c", "twice/c"]


def test_hidden_files_and_other_files_are_not_images(tmp_path: Path) -> None:
    builders.folder(tmp_path)
    (tmp_path / "images" / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"x")
    assert names(find_layout(tmp_path), "train") == ["a", "b"]


def test_a_link_that_leads_to_itself_is_listed_as_a_file(tmp_path: Path) -> None:
    builders.folder(tmp_path)
    (tmp_path / "images" / "c.png").symlink_to(tmp_path / "images" / "c.png")
    assert names(find_layout(tmp_path), "train") == ["a", "b", "c"]
