"""A run that SIGTERM stops at a random step and that is resumed equals the run that never stopped, bit for bit."""

import json
import os
import random
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.trainer import Trainer
from ssr_fast.session import Session
from ssr_fast.train import main
from tests.methods.run_support import TINY, start

TIMED = ("time", "images_per_second", "data_share")


# the number of threads decides the order of sums; the processes that are started here have one
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing it takes longer than these trainings, and it has tests of its own."""
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)


def rows(folder, file="metrics.jsonl"):
    kept = []
    for line in (folder / file).read_text().splitlines():
        row = json.loads(line)
        kept.append({key: value for key, value in row.items() if key not in TIMED})
    return kept


def tensors(folder, checkpoints="checkpoints"):
    """All tensors of the newest checkpoint: student, teacher, regulariser, optimiser, window."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = folder / "flat.pt"
    dcp_to_torch_save(str(CheckpointStore(folder / checkpoints).latest()), str(target))
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", torch.load(target, weights_only=False))
    return flat


def check_equal(parts, whole):
    """Metrics, every tensor of the last checkpoint and the shipped model."""
    assert rows(parts) == rows(whole)
    one, two = tensors(whole), tensors(parts)
    assert one.keys() == two.keys() and any("teacher" in name for name in one)
    different = [name for name in one if not torch.equal(one[name], two[name]) and "rng" not in name]
    assert different == []
    shipped, again = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(shipped[name], again[name]) for name in shipped)


def test_sigterm_at_a_random_step_then_resume_is_bit_exact(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--run.dir", str(whole)]) == 0

    at = random.Random().randrange(0, 7)
    train_step = Trainer.train_step

    def interrupted(self, batch, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        assert main([*TINY, "--run.dir", str(parts)]) == 3
    assert f"stopped by SIGTERM: saved after step {at + 1}; continue with --resume" in capsys.readouterr().err
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


@pytest.mark.slow
def test_a_process_stopped_by_sigterm_resumes_is_bit_exact(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--run.dir", str(whole)]) == 0

    wait_for = random.Random().choice([2, 4, 6])
    print("SIGTERM after the log line of step", wait_for)
    process = start(*TINY, "--run.dir", str(parts), cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(rf"\b{wait_for}/8\b", line):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "SIGTERM" in err and "--resume" in err and "Traceback" not in err
    stopped = int(re.search(r"after step (\d+)", err).group(1))
    assert wait_for <= stopped < 8
    assert main(["--resume", str(parts)]) == 0

    check_equal(parts, whole)


@pytest.mark.slow
def test_kill_9_then_resume_is_bit_exact_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--run.dir", str(whole)]) == 0
    process = start(*TINY, "--run.dir", str(parts), cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"\b4/8\b", line):  # after the checkpoint of step 3 and a row beyond it
            process.kill()
            break
    process.communicate(timeout=120)
    assert main(["--resume", str(parts)]) == 0
    assert rows(parts) == rows(whole)


def test_source_only_that_shares_its_first_steps_equals_source_only_trained_alone(tmp_path, monkeypatch):
    """With rows of the metrics before, across and after the branch, and stopped at random on either side of it."""
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Session, "_in_processes", lambda self: False)
    common = [*(option for option in TINY[:-1] if "start_step" not in option), "--run.evaluate_every=4"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main([*common, "--method.name=supervised", "--run.dir", str(alone)]) == 0

    stops = [random.Random().randrange(0, 5), random.Random().randrange(5, 8)]
    print("SIGTERM in the steps", stops)
    train_step, trained = Trainer.train_step, []

    def interrupted(self, batch, step):
        trained.append((self.method.stage_name, step))
        if step in stops:
            stops.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    stages = ["--run.stages=[supervised,self_training]", "--self_training.start_step=5"]
    code = main([*common, *stages, "--run.dir", str(both)])
    while code == 3:
        code = main(["--resume", str(both)])
    assert code == 0 and not stops
    assert trained == [("self_training", step) for step in range(8)] + [("source_only", step) for step in range(5, 8)]
    assert rows(both, "metrics-source_only.jsonl") == rows(alone)
    one, two = tensors(alone), tensors(both, "checkpoints/source_only")
    assert one.keys() == two.keys() and [name for name in one if not torch.equal(one[name], two[name])] == []
    shipped, again = load_file(alone / "model.safetensors"), load_file(both / "models/source_only/model.safetensors")
    assert all(torch.equal(shipped[name], again[name]) for name in shipped)
    names = [row["name"] for row in json.loads((both / "summary.json").read_text())["stages"]]
    assert names == ["source_only", "self_training"]


def stage_rows(folder):
    return {path.name: rows(folder, path.name) for path in sorted(folder.glob("metrics-*.jsonl"))}


@pytest.mark.slow
def test_stages_side_by_side_stop_together_and_resume_bit_exact(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stages = [*TINY[:-1], "--run.stages=[supervised,self_training,ssr]"]
    assert main([*stages, "--run.dir", str(whole)]) == 0

    process = start(*stages, "--run.dir", str(parts), cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"\b4/8\b", line):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "SIGTERM" in err and "--resume" in err and "Traceback" not in err
    assert main(["--resume", str(parts)]) == 0

    assert set(stage_rows(whole)) == {f"metrics-{name}.jsonl" for name in ("source_only", "self_training", "ssr")}
    assert stage_rows(parts) == stage_rows(whole)
    for name in ("models/source_only/model.safetensors", "model.safetensors"):
        one, two = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    shipped, last = load_file(whole / "model.safetensors"), load_file(whole / "models/ssr/model.safetensors")
    assert all(torch.equal(shipped[key], last[key]) for key in last)
    names = [row["name"] for row in json.loads((parts / "summary.json").read_text())["stages"]]
    assert names == ["source_only", "self_training", "ssr"]
