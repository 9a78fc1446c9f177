import json
from pathlib import Path

import pytest

from ssr_fast.data.class_stats import read_rcs_files, write_rcs_files
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence


@pytest.fixture
def index(tmp_path: Path) -> Index:
    root = builders.gta5(tmp_path / "gta")
    return build_index(DomainConfig(root=str(root)), True, "data.source", cache=tmp_path / "cache")


def load(folder: Path, name: str) -> object:
    return json.loads((folder / name).read_text())


def test_the_files_have_daformers_structure(index: Index, tmp_path: Path) -> None:
    write_rcs_files(index, tmp_path / "out")
    labels = [str(tmp_path / "gta" / "labels" / f"0000{k}_labelTrainIds.png") for k in (1, 2)]
    counts = {"0": 32, "1": 32}  # the stripes 7 and 8; 0 and 34 are ignored
    assert load(tmp_path / "out", "sample_class_stats.json") == [{**counts, "file": label} for label in labels]
    assert load(tmp_path / "out", "sample_class_stats_dict.json") == {label: counts for label in labels}
    pairs = [[label, 32] for label in labels]
    assert load(tmp_path / "out", "samples_with_class.json") == {"0": pairs, "1": pairs}


def test_they_are_read_back(index: Index, tmp_path: Path) -> None:
    write_rcs_files(index, tmp_path)
    assert read_rcs_files(tmp_path, index) == tuple(sample.counts for sample in index.samples)


def test_files_written_elsewhere_match_by_label_name(index: Index, tmp_path: Path) -> None:
    rows = [{"file": f"data/gta/labels/0000{k}_labelTrainIds.png", "1": 32, "0": 32} for k in (2, 1)]
    (tmp_path / "sample_class_stats.json").write_text(json.dumps(rows))
    assert read_rcs_files(tmp_path, index) == tuple(sample.counts for sample in index.samples)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not a list"),
        ('{"a": 1}', "not a list"),
        ("[{}]", "not a list"),
        ('[{"file": "00001_labelTrainIds.png", "0": 32, "1": 32}]', "00002.png"),
        ('[{"file": "00001_labelTrainIds.png", "19": 32}]', "19: 32"),
        ('[{"file": "00001_labelTrainIds.png", "0": "many"}]', "many"),
        ('[{"file": "00001_labelTrainIds.png", "0": 31, "1": 32}]', "contradicts"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(index: Index, tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "sample_class_stats.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_rcs_files(tmp_path, index)
    assert_sentence(error.value, tmp_path / "sample_class_stats.json", part)


def test_a_missing_file_and_a_folder_that_cannot_be_written_are_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_rcs_files(tmp_path, index)
    assert_sentence(error.value, tmp_path / "sample_class_stats.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_rcs_files(index, tmp_path / "file")
    assert_sentence(error.value, tmp_path / "file")


def test_an_unlabelled_index_has_no_statistics(tmp_path: Path) -> None:
    root = builders.gta5(tmp_path / "gta")
    index = build_index(DomainConfig(root=str(root)), False, "data.target", cache=tmp_path / "cache")
    with pytest.raises(UserError):
        write_rcs_files(index, tmp_path / "out")
    assert not (tmp_path / "out").exists()
