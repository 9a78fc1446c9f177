"""Runs with `cached_full`: bit-exact resume, any number of workers, no encoder where none is needed, wrong stores."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from ssr_fast import prepare
from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import create_features
from ssr_fast.data.images import read_image
from ssr_fast.data.scenes import ScenesConfig, write_scenes
from ssr_fast.data.stores import Recipe
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.models import feature_maps, sam
from ssr_fast.train import main
from tests.faults.test_resume import check_equal, rows
from tests.methods.run_support import TINY

COMPOSED = ["--sam.features=cached_full", "--sam.mixed=composed"]
MODES = {
    "composed": COMPOSED,
    "mixed online": ["--sam.features=cached_full"],
    "source alone": ["--sam.features=cached_full", "--ssr.domains=source"],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """One thread, for the order of sums; no report, which has tests of its own."""
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupt_at(monkeypatch, at):
    train_step = Trainer.train_step

    def interrupted(self, batch, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_exact_on_scenes(mode, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, *MODES[mode], "--run.dir", str(whole)]) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, random.Random().randrange(0, 7))
        assert main([*TINY, *MODES[mode], "--run.dir", str(parts)]) == 3
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)
    stores = {name for name in ("source", "target", "evaluation") if (whole / "scenes" / name / "features").exists()}
    assert stores == ({"source", "target"} if mode == "composed" else {"source"})


@pytest.fixture
def folders(tmp_path):
    """Scenes as folder data sets, and the options that train on them."""
    write_scenes(tmp_path / "s", ScenesConfig(source_count=4, target_count=4, evaluation_count=2, height=32, width=64))
    options = [word for word in TINY if "scenes" not in word]
    options += ["--data.scenes=null", "--data.cache=false"]
    for name in ("source", "target", "evaluation"):
        options += [f"--data.{name}.root={tmp_path / 's' / name}", f"--data.{name}.layout=folder"]
        options += [f"--data.{name}.split=all"]
    return tmp_path / "s", options


def prepare_features(root, *options):
    return prepare.main(["features", str(root), "--layout=folder", "--split=all", *options])


def test_from_folders_with_any_number_of_workers_and_resumed(folders, tmp_path, monkeypatch):
    scenes, options = folders
    options += [*COMPOSED, f"--data.target_features={tmp_path / 'store'}"]
    with pytest.raises(
        UserError, match=f"--data.source_features: {scenes / 'source' / 'features'} is no feature store"
    ):
        main([*options, "--run.dir", str(tmp_path / "none")])
    assert prepare_features(scenes / "source", "--sam.encoder=small") == 0
    assert (
        prepare_features(scenes / "target", "--sam.encoder=small", "--dtype=fp16", "--out", str(tmp_path / "store"))
        == 0
    )

    def built(*_):
        raise AssertionError("the encoder is built")

    monkeypatch.setattr(sam, "SamEncoder", built)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options, "--data.workers=0", "--run.dir", str(whole)]) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        assert main([*options, "--data.workers=2", "--run.dir", str(parts)]) == 3
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)
    assert all(np.isfinite(row["loss"]) for row in rows(whole) if "loss" in row)


def test_a_store_that_was_made_anew_with_other_options_is_noticed_at_resume(folders, tmp_path, monkeypatch, capsys):
    scenes, options = folders
    for name in ("source", "target"):
        assert prepare_features(scenes / name, "--sam.encoder=small", "--dtype=int8") == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        assert main([*options, *COMPOSED, "--run.dir", str(run)]) == 3
    assert prepare_features(scenes / "target", "--sam.encoder=small", "--dtype=fp16", "--overwrite") == 0
    with pytest.raises(
        UserError, match=r"^--data.target_features: .+ dtype int8.+ now there is .+ dtype fp16.+ new run"
    ):
        main(["--resume", str(run)])
    assert prepare_features(scenes / "target", "--sam.encoder=small", "--dtype=int8", "--overwrite") == 0
    assert main(["--resume", str(run)]) == 0


def fabricate(root, weights="w", size=1024, encoder="vit_b", channels=256):
    """A store as SAM would leave it, for images 64 x 32: longest side 1024, 16 pixels a token."""
    options = {"encoder": encoder, "weights_sha256": weights, "size": size, "dtype": "int8", "precision": "fp32"}
    store = create_features(None, root, Recipe("cached_full", {**options, "format": 1}), overwrite=True)
    rng = np.random.default_rng(0)
    for image in sorted((root / "images").iterdir()):
        assert read_image(image).shape == (32, 64, 3)
        features = rng.normal(size=(32, 64, channels)).astype(np.float32)
        store.write(image, features, Geometry((64, 32), (1024, 512), 16))


def test_sams_checkpoint_is_not_needed_to_train(folders, tmp_path, monkeypatch):
    scenes, options = folders
    for name in ("source", "target"):
        fabricate(scenes / name)

    def built(*_):
        raise AssertionError("the encoder is built")

    monkeypatch.setattr(sam, "SamEncoder", built)
    monkeypatch.setattr(feature_maps, "weights_digest", built)
    assert main([*options, *COMPOSED, "--sam.encoder=vit_b", "--run.dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("changes", "more", "parts"),
    [
        ({"encoder": "vit_l"}, [], ["--data.source_features", "vit_l", "vit_b", "--sam.encoder vit_l"]),
        ({"size": 512}, [], ["--data.source_features", "512", "1024"]),
        ({"weights": "other"}, [], ["source/features", "target/features", "different encoders"]),
        ({"channels": 128}, [], ["source/features", "target/features", "different encoders"]),
    ],
)
def test_stores_that_do_not_fit_are_refused(folders, tmp_path, changes, more, parts):
    scenes, options = folders
    fabricate(scenes / "source", **changes)
    fabricate(scenes / "target")
    with pytest.raises(UserError) as error:
        main([*options, *COMPOSED, "--sam.encoder=vit_b", *more, "--run.dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


def test_other_weights_than_the_runs_are_refused_where_it_encodes_too(folders, tmp_path):
    scenes, options = folders
    fabricate(scenes / "source", encoder="small", size=None, channels=64)
    with pytest.raises(UserError) as error:
        main([*options, "--sam.features=cached_full", "--run.dir", str(tmp_path / "run")])
    assert "other weights than small" in str(error.value) and "--sam.mixed composed" in str(error.value)


def test_a_missing_file_is_named_before_training(folders, tmp_path, monkeypatch):
    scenes, options = folders
    for name in ("source", "target"):
        fabricate(scenes / name)
    gone = sorted((scenes / "target" / "features").rglob("*.features"))[1]
    gone.unlink()
    monkeypatch.setattr("ssr_fast.session.build_method", None)
    with pytest.raises(UserError) as error:
        main([*options, *COMPOSED, "--sam.encoder=vit_b", "--run.dir", str(tmp_path / "run")])
    assert str(gone) in str(error.value) and "prepare features" in str(error.value)
