"""Prepared stores: what one does not hold is refused in one sentence, and so are mistakes on the command line."""

from pathlib import Path

import pytest

from ssr_fast import prepare
from ssr_fast.data import store_writer
from ssr_fast.data.store_index import require_originals
from ssr_fast.errors import UserError
from tests.data import builders
from tests.data.builders import assert_sentence
from tests.data.test_store import index_of, make, odd, said


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))


REFUSED = {
    "another size": (dict(resize=(30, 30)), True, ["--data.source.resize", "40 30", "30 30"]),
    "own size": (dict(), True, ["--data.source.resize", "null", "40 30"]),
    "another split": (dict(resize=(40, 30), split="val"), True, ["--data.source.split", "val", "train"]),
    "another layout": (dict(resize=(40, 30), layout="gta5"), True, ["--data.source.layout", "gta5", "folder"]),
    "a condition": (dict(resize=(40, 30), condition="night"), True, ["--data.source.condition", "night"]),
    "a classes file": (dict(resize=(40, 30), classes="x.json"), True, ["--data.source.classes", "x.json"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_it_does_not_hold_is_refused(tmp_path: Path, case: str) -> None:
    options, labelled, parts = REFUSED[case]
    store = make(odd(tmp_path / "set"), tmp_path / "store", "--resize", "40", "30")
    with pytest.raises(UserError) as error:
        index_of(store, labelled, **options)
    assert_sentence(error.value, store, *parts)


def test_labels_that_it_does_not_have_are_refused(tmp_path: Path) -> None:
    store = make(odd(tmp_path / "set"), tmp_path / "store", "--unlabelled")
    assert not list(store.glob("labels-*")) and not list(store.glob("sample*"))
    assert all(sample.label is None and sample.counts is None for sample in index_of(store, False).samples)
    with pytest.raises(UserError) as error:
        index_of(store)
    assert_sentence(error.value, store, "--unlabelled")


def test_scores_need_labels_of_their_own_size(tmp_path: Path) -> None:
    resized = make(odd(tmp_path / "set"), tmp_path / "resized", "--resize", "40", "30")
    with pytest.raises(UserError) as error:
        require_originals(index_of(resized, resize=(40, 30)), "data.evaluation")
    assert_sentence(error.value, resized, "--data.evaluation.root", "--resize")
    require_originals(index_of(make(tmp_path / "set", tmp_path / "own")), "data.evaluation")


def test_an_unlabelled_reader_of_a_labelled_store_sees_no_labels(tmp_path: Path) -> None:
    store = make(odd(tmp_path / "set"), tmp_path / "store")
    prepared, original = index_of(store, False), index_of(tmp_path / "set", False)
    assert prepared.digest == original.digest
    assert all(sample.label is None and sample.counts is None for sample in prepared.samples)


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = odd(tmp_path / "set")
    store = make(root, tmp_path / "store")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for arguments, parts in {
        ("store", store, "--out", tmp_path / "x"): ["prepared store", "original"],
        ("masks", store, "--generator", "superpixels"): ["prepared store", "original"],
        ("store", root, "--out", root / "images" / "x"): ["--out", "among the images"],
        ("store", root, "--out", tmp_path / "full"): ["full", "other files"],
        ("store", root, "--out", store, "--image", "jpeg"): ["other", "jpeg", "--overwrite"],
        ("store", root, "--out", tmp_path / "x", "--segments"): ["segment", "prepare masks"],
        ("store", root, "--out", tmp_path / "x", "--resize", "0", "4"): ["--resize", "0 4"],
        ("store", root, "--out", tmp_path / "x", "--workers", "-1"): ["--workers", "-1"],
        ("store", root, "--out", tmp_path / "x", "--rank", "3", "--world", "3"): ["--rank 3", "--world 3"],
        ("store", root): ["--out"],
    }.items():
        assert_sentence(said(capsys, *arguments), *parts)
    (root / "images" / "a.png").write_bytes(b"no image")
    assert "a.png" in said(capsys, "store", root, "--out", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_an_unfinished_store_says_how_to_finish_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_SMALLEST", 12000)
    make(odd(tmp_path / "set"), tmp_path / "store", "--resize", "40", "30", "--rank", "0", "--world", "2")
    with pytest.raises(UserError) as error:
        index_of(tmp_path / "store", resize=(40, 30))
    assert_sentence(error.value, tmp_path / "store", "not finished", "prepare store", "--resize 40 30", "--out")


def test_check_takes_a_store_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own split need not be given; another one is refused, and so is training on it by another name."""
    store = make(builders.camvid(tmp_path / "set"), tmp_path / "store", "--split", "all", "--condition", "day")
    assert prepare.main(["check", str(store)]) == prepare.main(["check", str(store), "--split", "all"]) == 0
    assert_sentence(said(capsys, "check", store, "--split", "val"), "--split is val", "split all")
    assert_sentence(said(capsys, "check", store, "--condition", "dusk"), "--condition is dusk", "condition day")
    with pytest.raises(UserError) as error:
        index_of(store, condition="day")
    assert_sentence(error.value, "--data.source.split is train", "split all")
