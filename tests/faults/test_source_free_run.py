"""Source-free adaptation from a source model to the end, with the source data deleted before it starts."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssr_fast import prepare
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.models.segmentor import ModelConfig, build_segmentor
from ssr_fast.models.weights import save_model
from ssr_fast.train import main
from tests.faults.test_resume import check_equal

SIZES = (
    "--run.steps=6 --run.log_every=2 --run.evaluate_every=6 --run.save_every=3 --run.samples=1 --optim.warmup_steps=2 "
    "--data.batch_size=1"
).split()
SCENES = (
    "--data.scenes.source_count=4 --data.scenes.target_count=4 --data.scenes.evaluation_count=2 "
    "--data.scenes.height=32 --data.scenes.width=64 --data.crop=[32,64] --model.channels=16"
).split()
FREE = (
    "--source_free.segments=12 --source_free.pixels=4 --source_free.projection=8 --source_free.threshold=0.01 "
    "--source_free.contrast=0.3"
).split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """One thread, for the order of sums; no report, which has tests of its own."""
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_adapts_and_resumes_bit_exactly_without_the_source(tmp_path, monkeypatch):
    source, whole, parts = tmp_path / "source", tmp_path / "whole", tmp_path / "parts"
    assert main(["--method.name=supervised", *SIZES, *SCENES, "--run.dir", str(source)]) == 0
    shutil.rmtree(source / "scenes" / "source")
    scenes = source / "scenes"
    words = ["--layout", "folder", "--split", "all", "--generator", "superpixels", "--workers", "0"]
    options = ["demo-source-free", "--method.name=source_free", "--method.class_weight=none", "--data.scenes=null"]
    for domain in ("target", "evaluation"):
        options += [f"--data.{domain}.root={scenes / domain}", f"--data.{domain}.layout=folder"]
        options += [f"--data.{domain}.split=all"]
    options += [f"--source_free.model={source}", "--data.crop=[32,64]", *SIZES, *FREE]

    with pytest.raises(UserError, match="prepare masks"):  # there are no segment maps yet
        main([*options, "--run.dir", str(whole)])
    shutil.rmtree(whole)
    assert prepare.main(["masks", str(scenes / "target"), *words]) == 0

    assert main([*options, "--run.dir", str(whole)]) == 0
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss/target"] > 0 and row["images_per_second"] > 0
    summary = json.loads((whole / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["source_free"]
    start, end = load_file(source / "model.safetensors"), load_file(whole / "model.safetensors")
    assert start.keys() == end.keys()  # nothing of the projection is shipped
    assert any(not torch.equal(start[name], end[name]) for name in start)

    train_step = Trainer.train_step

    def interrupted(self, batch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        assert main([*options, "--run.dir", str(parts)]) == 3
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


def test_without_a_single_label(tmp_path, monkeypatch):
    """A source model of four classes and a folder of images: no source, no labels, no classes file."""
    from ssr_fast.report.page import write_report

    monkeypatch.setattr("ssr_fast.session.write_report", write_report)
    names, colors = ["road", "sky", "car", "tree"], [[10 * k, 0, 0] for k in range(1, 5)]
    model = ModelConfig(backbone="mit_tiny", head="segformer", channels=16)
    meta = {"classes": {"names": names, "colors": colors}}
    save_model(tmp_path / "source", build_segmentor(model, 4, 0), meta)
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        picture = generator.integers(0, 256, (4, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(picture).save(images / f"{name}.png")
    words = ["--split", "all", "--generator", "superpixels", "--workers", "0"]
    assert prepare.main(["masks", str(tmp_path / "set"), *words]) == 0
    options = ["demo-source-free", "--method.name=source_free", "--method.class_weight=none", "--data.scenes=null"]
    options += [f"--data.target.root={tmp_path / 'set'}", "--data.target.split=all", "--data.crop=[32,64]"]
    options += [f"--source_free.model={tmp_path / 'source'}", *SIZES, *FREE, "--run.dir", str(tmp_path / "run")]

    with pytest.raises(UserError, match="--data.evaluation null trains without"):
        main(options)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="--run.evaluate_every 6 has no effect with --data.evaluation null"):
        main([*options, "--data.evaluation=null"])
    options.remove("--run.evaluate_every=6")
    assert main([*options, "--data.evaluation=null"]) == 0

    (stage,) = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert stage["target_miou"] is None and stage["per_class"] == {}
    assert "eval/miou" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    shipped = json.loads((tmp_path / "run" / "config.json").read_text())
    assert shipped["classes"] == {"names": names, "colors": colors}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no labelled target images" in page and "Target mIoU" not in page and "truth" not in page
    with Image.open(tmp_path / "run" / "samples" / "source_free" / "00.png") as prediction:
        assert prediction.size == (64, 32)
    assert main(["--resume", str(tmp_path / "run")]) == 0  # nothing is left to train


def test_both_stages_of_the_preset_in_one_command(tmp_path):
    folder = tmp_path / "run"
    assert main(["demo-source-free", *SIZES, *SCENES, *FREE, "--run.dir", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["source_only", "source_free"]
    assert (folder / "scenes" / "target" / "segments" / "store.json").is_file()
    shipped = load_file(folder / "model.safetensors")
    adapted = load_file(folder / "models" / "source_free" / "model.safetensors")
    assert all(torch.equal(shipped[name], adapted[name]) for name in adapted)


def test_a_source_model_of_other_classes_is_refused(tmp_path):
    other = build_segmentor(ModelConfig(backbone="mit_tiny", head="segformer", channels=16), 5)
    save_model(tmp_path / "other", other, {})
    options = ["demo-source-free", "--method.name=source_free", "--method.class_weight=none", *SIZES, *SCENES[:-1]]
    with pytest.raises(UserError, match="tells 5 classes apart"):
        main([*options, f"--source_free.model={tmp_path / 'other'}", "--run.dir", str(tmp_path / "run")])
