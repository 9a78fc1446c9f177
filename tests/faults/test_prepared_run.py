"""Runs on prepared stores: the same run as on the original files, with any loader, resumed on any of them."""

import importlib.util
import json

import pytest

from ssr_fast import prepare
from ssr_fast.data.scenes import ScenesConfig, write_scenes
from ssr_fast.errors import UserError
from ssr_fast.train import main
from tests.faults.test_resume import check_equal, rows
from tests.faults.test_stored_features_run import interrupt_at, quick  # noqa: F401
from tests.methods.run_support import TINY

NAMES = ("source", "target", "evaluation")
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")


@pytest.fixture
def sets(tmp_path):
    """Scenes as folder data sets, and stores of source and target."""
    write_scenes(tmp_path / "s", ScenesConfig(source_count=4, target_count=4, evaluation_count=2, height=32, width=64))
    for image in ("raw", "jpeg"):
        for name in ("source", "target"):
            words = ["store", tmp_path / "s" / name, "--out", tmp_path / image / name, "--image", image]
            words += ["--split", "all", "--workers", "0", *["--unlabelled"] * (name == "target")]
            assert prepare.main([*map(str, words)]) == 0
    return tmp_path


def roots(sets, kind):
    found = {name: sets / "s" / name for name in NAMES}
    if kind != "folders":
        found |= {name: sets / kind / name for name in NAMES[:2]}
    return [f"--data.{name}.root={root}" for name, root in found.items()]


def options(sets, kind, *more):
    words = [word for word in TINY if "scenes" not in word] + ["--data.scenes=null", "--data.cache=false"]
    words += [f"--data.{name}.{option}" for name in NAMES for option in ("layout=folder", "split=all")]
    return [*words, "--sam.features=online", *roots(sets, kind), *more]


KINDS = [("raw", "torch", "0"), ("raw", "torch", "2"), pytest.param("raw", "dali", "1", marks=needs_dali)]


@pytest.mark.parametrize(("kind", "loader", "workers"), KINDS)
def test_a_run_does_not_depend_on_where_its_pixels_come_from(sets, kind, loader, workers, capsys):
    whole, run = sets / "whole", sets / "run"
    assert main([*options(sets, "folders", "--data.workers=0"), "--run.dir", str(whole)]) == 0
    capsys.readouterr()
    more = [f"--data.loader={loader}", f"--data.workers={workers}"]
    assert main([*options(sets, kind, *more), "--run.dir", str(run)]) == 0
    check_equal(run, whole)
    assert f"loader: {loader} (as asked for)" in capsys.readouterr().out
    assert all(0 <= row["data_share"] <= 1 for row in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in row)


@needs_dali
def test_a_run_goes_on_with_another_form_and_loader(sets, monkeypatch):
    whole, parts = sets / "whole", sets / "parts"
    assert main([*options(sets, "raw", "--data.workers=0"), "--run.dir", str(whole)]) == 0
    for at, more in (
        (2, options(sets, "folders", "--data.workers=1", "--run.dir", str(parts))),
        (5, ["--resume", str(parts), *roots(sets, "raw"), "--data.loader=dali", "--data.workers=0"]),
    ):
        with monkeypatch.context() as patched:
            interrupt_at(patched, at)
            assert main(more) == 3
    assert main(["--resume", str(parts), "--data.loader=torch", "--data.workers=2"]) == 0
    check_equal(parts, whole)


def test_other_pixels_than_the_run_began_with_are_refused(sets, monkeypatch):
    run = sets / "run"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert main([*options(sets, "raw"), "--run.dir", str(run)]) == 3
    with pytest.raises(UserError, match=r"^--data.source.root: .* began with the original files, .*jpeg.* new run"):
        main(["--resume", str(run), *roots(sets, "jpeg")])
    assert main(["--resume", str(run), *roots(sets, "raw")]) == 0
    other = sets / "other"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert main([*options(sets, "jpeg"), "--run.dir", str(other)]) == 3
    with pytest.raises(UserError, match=r"^--data.source.root: .* began with .*jpeg.*, and now there is none"):
        main(["--resume", str(other), *roots(sets, "folders")])
    assert main(["--resume", str(other)]) == 0
    assert rows(other) != rows(run)  # JPEG is lossy, and so would a change have been


def test_an_evaluation_on_resized_labels_is_refused(sets):
    small = sets / "small"
    words = ["store", sets / "s" / "evaluation", "--out", small, "--split", "all", "--resize", "32", "16"]
    assert prepare.main([*map(str, words)]) == 0
    with pytest.raises(UserError) as error:
        main(
            [
                *options(sets, "raw"),
                f"--data.evaluation.root={small}",
                "--data.evaluation.resize=[32,16]",
                "--run.dir",
                str(sets / "run"),
            ]
        )
    assert "--data.evaluation.root" in str(error.value) and "original" in str(error.value)
