import json
import os
from pathlib import Path

import pytest

from ssr_fast.data import index as index_module
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import ids, save


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSR_FAST_CACHE", str(folder))
    return folder / "index"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def build(root: Path, labelled: bool = True) -> tuple[Index, list[str]]:
    lines: list[str] = []
    return build_index(DomainConfig(root=str(root)), labelled, "data.source", report=lines.append), lines


class Counting:
    """Counts the files that are opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        check = index_module._check

        def counted(entry, *rest):
            self.names.append(entry.name)
            return check(entry, *rest)

        monkeypatch.setattr(index_module, "_check", counted)

    def take(self) -> list[str]:
        taken, self.names = sorted(self.names), []
        return taken


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def test_files_are_opened_once_and_again_when_they_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders.folder(root, tuple("abc"))
    opened = Counting(monkeypatch)
    first, _ = build(root)
    assert opened.take() == ["a", "b", "c"]
    again, lines = build(root)
    assert opened.take() == [] and again.samples == first.samples and again.digest == first.digest
    assert not any("checking" in line for line in lines)
    touch(root / "images" / "b.png")
    touch(root / "labels" / "c.png")
    build(root)
    assert opened.take() == ["b", "c"]
    builders.folder(root, ("d",))
    build(root)
    assert opened.take() == ["d"]
    (root / "images" / "a.png").unlink()
    (root / "labels" / "a.png").unlink()
    assert [sample.name for sample in build(root)[0].samples] == ["b", "c", "d"] and opened.take() == []


def test_a_file_that_goes_bad_is_found_although_it_was_good(root: Path) -> None:
    builders.folder(root)
    build(root)
    (root / "images" / "a.png").write_text("overwritten")
    with pytest.raises(UserError, match="a.png is not an image"):
        build(root)


def test_a_preferred_label_that_appears_is_read(root: Path) -> None:
    builders.gta5(root, 1)
    before, _ = build(root)
    save(root / "labels" / "00001_labelTrainIds.png", ids(5))
    after, _ = build(root)
    assert before.samples[0].counts[5] == 0 and after.samples[0].counts[5] == 128


def test_another_classes_file_is_another_cache(root: Path) -> None:
    builders.folder(root)
    build(root)
    (root / "classes.json").write_text(json.dumps({"names": ["road", "car", "sky"], "ids": {"0": 2, "1": 1, "2": 0}}))
    assert build(root)[0].samples[0].counts == (32, 32, 32)
    (root / "classes.json").write_text(json.dumps({"names": ["x", "y"], "ids": {"0": 1, "1": 1, "2": 0}}))
    assert build(root)[0].samples[0].counts == (32, 64)


def test_labelled_and_unlabelled_do_not_share_results(root: Path) -> None:
    builders.folder(root)
    build(root, labelled=False)
    assert build(root)[0].samples[0].counts == (32, 32, 32)
    assert build(root, labelled=False)[0].samples[0].counts is None


DAMAGED = ["", "{", "[]", '{"a": 1}', "null", '{"a": {"stamp": {}, "width": 1}}', '{"a": {}}', "\xff\xfe"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_built_anew_with_one_line(root: Path, cache: Path, content: str) -> None:
    builders.folder(root)
    good, _ = build(root)
    (file,) = cache.iterdir()
    intact = file.read_text()
    file.write_text(content, encoding="latin-1")
    index, lines = build(root)
    assert index.samples == good.samples and file.read_text() == intact
    assert sum(str(file) in line and "damaged" in line and "\n" not in line for line in lines) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("counts", [1, 2]), ("counts", ["1", 2, 3]), ("width", 0), ("height", "8")]
)
def test_a_cache_row_that_makes_no_sense_is_not_believed(root: Path, cache: Path, field: str, value: object) -> None:
    good, _ = build(builders.folder(root))
    (file,) = cache.iterdir()
    rows = json.loads(file.read_text())
    rows["a"][field] = value
    file.write_text(json.dumps(rows))
    index, lines = build(root)
    assert index.samples == good.samples and any("damaged" in line for line in lines)


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path) -> None:
    builders.folder(root)
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    index = build_index(
        DomainConfig(root=str(root)), True, "data.source", cache=tmp_path / "file" / "below", report=lines.append
    )
    assert len(index.samples) == 2 and sum("cannot be written" in line for line in lines) == 1


def test_the_cache_leaves_no_temporary_files(root: Path, cache: Path) -> None:
    build(builders.folder(root))
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_an_interrupted_check_keeps_what_is_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders.folder(root, tuple("abc"))
    check = index_module._check

    def interrupted(entry, *rest):
        if entry.name == "c":
            raise KeyboardInterrupt
        return check(entry, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(root)
    opened = Counting(monkeypatch)
    build(root)
    assert opened.take() == ["c"]
