import json
from pathlib import Path

import pytest

from ssr_fast.data.class_file import read_class_file
from ssr_fast.data.labels import IGNORE, UNKNOWN
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence

TWO = {"names": ["a", "b"]}


def write(tmp_path: Path, content: object, name: str = "classes.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.json", '["Straße", "car"]'),
        ("classes.json", '{"names": ["Straße", "car"]}'),
        ("classes.yaml", "- Straße\n- car\n"),
        ("classes.yml", "names: [Straße, car]\n"),
        ("classes.txt", "\ufeffStraße\n\n  car  \n"),
    ],
)
def test_names_only_means_ids_from_zero(tmp_path: Path, name: str, content: str) -> None:
    read = read_class_file(write(tmp_path, content, name))
    assert read.classes.names == ("Straße", "car") and not read.color_coded
    assert (
        read.table[0] == 0 and read.table[1] == 1 and read.table[255] == IGNORE and (read.table[2:255] == UNKNOWN).all()
    )


def test_colors_ids_and_things(tmp_path: Path) -> None:
    content = {**TWO, "colors": [[1, 2, 3], [4, 5, 6]], "ids": {"7": 1, "0": 255, "9": 0}, "things": [1]}
    read = read_class_file(write(tmp_path, content))
    assert read.classes.colors == ((1, 2, 3), (4, 5, 6)) and read.color_coded and read.classes.things == (1,)
    assert [read.table[k] for k in (7, 0, 9, 255, 1)] == [1, IGNORE, 0, IGNORE, UNKNOWN]


def test_ids_may_map_255_and_values_beyond_a_byte(tmp_path: Path) -> None:
    read = read_class_file(write(tmp_path, {**TWO, "ids": {"0": 0, "255": 1, "1000": 1}}))
    assert read.table[255] == 1 and read.table[1000] == 1 and read.table[999] == UNKNOWN


def test_yaml_ids_may_be_integers(tmp_path: Path) -> None:
    assert read_class_file(write(tmp_path, "names: [a, b]\nids: {3: 1}\n", "classes.yaml")).table[3] == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "classes.json"),
        ("3", "list of class names"),
        ({"ids": {}}, "names"),
        ([], "at least 2"),
        (["only"], "at least 2"),
        (["a", "a"], '"a"'),
        (["a", 3], "names"),
        (["a", " "], "names"),
        ([str(k) for k in range(255)], "254"),
        ({**TWO, "colours": []}, '"colours"'),
        ({**TWO, "colors": [[1, 2, 3]]}, "colors"),
        ({**TWO, "colors": [[1, 2, 3], [1, 2, 3]]}, "[1, 2, 3]"),
        ({**TWO, "colors": [[1, 2, 3], [1, 2, 256]]}, "256"),
        ({**TWO, "colors": [[1, 2, 3], [1, 2]]}, "[1, 2]"),
        ({**TWO, "ids": {"0": 2}}, "maps 0 to 2"),
        ({**TWO, "ids": {"-1": 0}}, '"-1"'),
        ({**TWO, "ids": {"70000": 0}}, '"70000"'),
        ({**TWO, "ids": {"0": True}}, "True"),
        ({**TWO, "ids": {}}, "ids"),
        ({**TWO, "things": [2]}, "things"),
    ],
)
def test_impossible_contents_are_refused_in_one_sentence(tmp_path: Path, content: object, part: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_class_file(path)
    assert_sentence(error.value, path, part)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_class_file(tmp_path / "nothing.json")
    assert_sentence(error.value, tmp_path / "nothing.json")


def test_lists_nested_without_end_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[" * 200_000)
    with pytest.raises(UserError) as error:
        read_class_file(path)
    assert_sentence(error.value, path, "not valid json")
