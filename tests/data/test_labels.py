import numpy as np
import pytest
from cityscapesscripts.helpers import labels as official

from ssr_fast.data.labels import (
    CAMVID,
    CAMVID_IDS,
    CITYSCAPES,
    CITYSCAPES_IDS,
    GTA5_IDS,
    IGNORE,
    MAPILLARY_IDS,
    MAPILLARY_NAMES,
    SYNTHIA_IDS,
    UNKNOWN,
    ClassSet,
    distinct_colors,
    id_table,
    train_id_table,
)

COUNTED = [label for label in official.labels if 0 <= label.trainId < 255]


def test_cityscapes_is_the_official_class_set() -> None:
    by_train_id = sorted(COUNTED, key=lambda label: label.trainId)
    assert CITYSCAPES.names == tuple(label.name for label in by_train_id)
    assert CITYSCAPES.colors == tuple(tuple(label.color) for label in by_train_id)
    assert CITYSCAPES_IDS == {label.id: label.trainId for label in COUNTED}
    with_instances = {label.trainId for label in COUNTED if label.hasInstances}
    assert set(CITYSCAPES.things) == with_instances | {6, 7}  # and lights and signs, as the feature distance has it


def test_gta5_uses_cityscapes_ids() -> None:
    assert GTA5_IDS == {label.id: label.trainId for label in COUNTED}


def test_synthia_ids_by_name() -> None:
    # class numbers of the README of SYNTHIA-RAND-CITYSCAPES
    numbers = {
        "sky": 1, "building": 2, "road": 3, "sidewalk": 4, "fence": 5, "vegetation": 6, "pole": 7, "car": 8,
        "traffic sign": 9, "person": 10, "bicycle": 11, "motorcycle": 12, "traffic light": 15, "terrain": 16,
        "rider": 17, "truck": 18, "bus": 19, "train": 20, "wall": 21,
    }  # fmt: skip
    assert {CITYSCAPES.names[train_id]: value for value, train_id in SYNTHIA_IDS.items()} == numbers


def test_mapillary_ids_by_number_and_by_name() -> None:
    assert len(MAPILLARY_NAMES) == len(set(MAPILLARY_NAMES)) == 66
    # positions in config_v1.2.json of the release
    expected = {
        2: "Curb", 13: "Road", 15: "Sidewalk", 17: "Building", 19: "Person", 27: "Sky", 45: "Pole",
        48: "Traffic Light", 50: "Traffic Sign (Front)", 55: "Car", 65: "Unlabeled",
    }  # fmt: skip
    for value, name in expected.items():
        assert MAPILLARY_NAMES[value] == name
    assert MAPILLARY_IDS == {
        13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10, 19: 11,
        20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
    }  # fmt: skip
    same_word = [k for k, name in enumerate(MAPILLARY_NAMES) if name.lower() in CITYSCAPES.names]
    assert len(same_word) >= 13
    for k in same_word:
        assert CITYSCAPES.names[MAPILLARY_IDS[k]] == MAPILLARY_NAMES[k].lower()


def test_camvid_has_11_classes_and_void_is_none_of_them() -> None:
    assert " ".join(CAMVID.names) == "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert CAMVID_IDS == {k: k for k in range(11)}
    assert [CAMVID.names[k] for k in CAMVID.things] == ["sign", "car", "pedestrian", "bicyclist"]


@pytest.mark.parametrize("classes", [CITYSCAPES, CAMVID])
def test_colorize_gives_each_class_its_colour_and_black_to_the_rest(classes: ClassSet) -> None:
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = classes.colorize(label)
    assert rgb.shape == (16, 16, 3) and rgb.dtype == np.uint8
    assert [tuple(c) for c in rgb.reshape(-1, 3)[: classes.count].tolist()] == list(classes.colors)
    assert not rgb.reshape(-1, 3)[classes.count :].any()


def test_colorize_without_classes_is_black() -> None:
    assert not ClassSet("none", (), ()).colorize(np.zeros((2, 2), np.uint8)).any()


def test_class_set_needs_a_colour_a_name() -> None:
    with pytest.raises(ValueError, match="2 names and 1"):
        ClassSet("x", ("a", "b"), ((1, 2, 3),))


def test_distinct_colors_are_distinct_and_not_black() -> None:
    colors = distinct_colors(254)
    assert len(set(colors)) == 254 and (0, 0, 0) not in colors
    assert all(0 <= channel <= 255 for color in colors for channel in color)


def test_id_table_ignores_what_is_unmapped_or_marks_it_unknown() -> None:
    loose = id_table({7: 0, 11: 2})
    assert loose[7] == 0 and loose[11] == 2 and (np.delete(loose, [7, 11]) == IGNORE).all() and loose.shape == (256,)
    strict = id_table({300: 1}, size=301, known=(0, 255))
    assert strict[300] == 1 and strict[0] == strict[255] == IGNORE
    assert (np.delete(strict, [0, 255, 300]) == UNKNOWN).all()


def test_train_id_table_knows_its_classes_and_255_only() -> None:
    table = train_id_table(3)
    assert table[:3].tolist() == [0, 1, 2] and table[255] == IGNORE and (table[3:255] == UNKNOWN).all()
