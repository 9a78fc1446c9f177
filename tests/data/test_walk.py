import os
from pathlib import Path

import pytest

from ssr_fast.data import walk
from ssr_fast.data.index import DomainConfig, diagnose
from ssr_fast.data.walk import files_below, leads_nowhere
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence, ids, picture, save


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def relative(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_below(root)]


def test_links_to_folders_are_followed_once_on_each_way(root: Path) -> None:
    for name in ("a/x.png", "b/y.png"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "a" / "to b").symlink_to(root / "b")
    (root / "b" / "to a").symlink_to(root / "a")
    (root / "here").symlink_to(root)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "z.png").touch()
    assert relative(root) == ["a/to b/y.png", "a/x.png", "b/to a/x.png", "b/y.png"]


def test_a_label_folder_may_be_linked_more_than_once(root: Path) -> None:
    """Two weathers of one scene share their labels."""
    builders.folder(root, ("fog/a", "rain/a"))
    for name in ("labels/fog/a.png", "labels/rain/a.png"):
        (root / name).unlink()
    (root / "labels" / "rain").rmdir()
    (root / "labels" / "rain").symlink_to("fog")
    save(root / "labels" / "fog" / "a.png", ids(0, 1, 2))
    diagnosis = diagnose(DomainConfig(root=str(root)), True)
    assert [sample.name for sample in diagnosis.samples] == ["fog/a", "rain/a"] and diagnosis.rows == ()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["images", "labels"])
def test_links_that_multiply_stop_with_a_sentence(root: Path, side: str) -> None:
    """Each folder has two links to the next one: 2^30 ways, without any circle."""
    builders.folder(root)
    for level in range(30):
        (root / side / f"l{level}").mkdir()
        for name in ("left", "right"):
            (root / side / f"l{level}" / name).symlink_to(root / side / f"l{level + 1}")
    with pytest.raises(UserError) as error:
        diagnose(DomainConfig(root=str(root)), True)
    assert_sentence(error.value, root / side, "links", "remove")


@pytest.mark.timeout(60)
def test_folders_that_all_lead_to_each_other_stop_with_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_MAX_REPEATS", 1000)  # the whole number takes seconds
    builders.folder(root)
    folders = [root / "images" / f"m{k}" for k in range(8)]
    for folder in folders:
        folder.mkdir()
        for other in folders:
            (folder / f"to {other.name}").symlink_to(other)
    with pytest.raises(UserError) as error:
        diagnose(DomainConfig(root=str(root)), True)
    assert_sentence(error.value, root / "images", "links")


@pytest.mark.parametrize("target", ["gone", "lost", "/gone/disk"])
def test_a_folder_link_that_leads_nowhere_is_named(root: Path, target: str) -> None:
    builders.folder(root)
    (root / "images" / "lost").symlink_to(target)
    (root / "images" / "README.txt").symlink_to("gone")
    assert leads_nowhere(root / "images" / "lost") and not leads_nowhere(root / "images" / "a.png")
    (row,) = diagnose(DomainConfig(root=str(root)), True).rows
    assert row.path == root / "images" / "lost" and row.fatal
    assert_sentence(row, row.path, "leads nowhere")


def test_a_path_that_is_too_long_is_named(root: Path) -> None:
    builders.folder(root)
    deepest = os.open(root / "images", os.O_RDONLY)
    for _ in range(25):  # 25 x 200 characters are more than a path may have
        os.mkdir("d" * 200, dir_fd=deepest)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=deepest)
        os.close(deepest)
        deepest = below
    os.close(deepest)
    with pytest.raises(UserError) as error:
        diagnose(DomainConfig(root=str(root)), True)
    assert_sentence(error.value, "ddd", "too long")


def test_an_empty_folder_with_an_images_name_counts_as_a_file(root: Path) -> None:
    save(root / "seq.png" / "a.png", picture())
    (root / "b.PNG").mkdir()
    (root / "empty").mkdir()
    assert relative(root) == ["b.PNG", "seq.png/a.png"]


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_a_root_that_no_file_system_has(text: str) -> None:
    with pytest.raises(UserError) as error:
        diagnose(DomainConfig(root=text), True, "data.source")
    assert_sentence(error.value, "--data.source.root", "does not exist")
