"""`python -m ssr_fast.export`: models and checkpoints of runs, finished or not, whole or damaged."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssr_fast import commandline, export
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.dcp_files import read_tensors
from ssr_fast.engine.ranks import Ranks
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor
from ssr_fast.models.weights import load_backbone, load_model, save_model
from ssr_fast.shipped import open_model
from ssr_fast.train import main as train
from tests.engine.forked import run_ranks
from tests.methods.run_support import TINY

NETWORK = {"backbone": "mit_tiny", "head": "segformer", "channels": 16, "weights": "/gone/start.pth"}
META = {
    "classes": {"names": ["road", "car"], "colors": [[1, 2, 3], [4, 5, 6]]},
    "inference": {"mode": "slide", "crop": [32, 32], "stride": [16, 16], "batch": 2},
    "resize": [64, 32],
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(arguments) -> (exit code, stderr), through the same `run` as on the command line."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            commandline.run(export.main)
        return int(exit_.value.code or 0), capsys.readouterr().err

    return run


def sentence(result: tuple[int, str]) -> str:
    """The one sentence of a user's mistake."""
    code, err = result
    assert code == 2 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def student(seed: int = 0) -> Segmentor:
    net = build_segmentor(ModelConfig(**NETWORK), 2, seed)  # type: ignore[arg-type]
    for buffer in net.buffers():
        buffer.add_(1)  # as after training: BatchNorm's statistics are not those of a fresh net
    return net


def saved(folder: Path, *, config: dict[str, Any] | None = None, meta: Any = META, ranks: Ranks | None = None) -> Path:
    """A checkpoint of a run whose teacher has other weights."""
    state = {"nets": {"student": student().state_dict(), "teacher": student(1).state_dict()}, "progress": {"step": 7}}
    store = CheckpointStore(folder, ranks=ranks or Ranks())
    store.save(7, state, config={"model": NETWORK} if config is None else config, meta=meta)
    return folder / "step-7"


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]
    assert different == []


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drawing it takes longer than the training."""
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    yield


def test_a_checkpoint_of_a_run_is_exported_as_the_run_ships_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None, call: Any
) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    save = CheckpointStore.save

    def save_with_meta(self: CheckpointStore, step: int, state: Any, **options: Any) -> None:
        shipped = {"classes": {"names": [f"class {n}" for n in range(8)], "colors": [[n, n, n] for n in range(8)]}}
        save(self, step, state, **{"meta": shipped, **options})

    monkeypatch.setattr(CheckpointStore, "save", save_with_meta)
    assert train([*TINY, "--run.keep=9", "--run.dir", str(run)]) == 0
    monkeypatch.undo()
    for step in (3, 8):
        checkpoint = run / "checkpoints" / f"step-{step}"
        code, err = call(checkpoint, "--out", tmp_path / f"out-{step}")
        assert code == 0, err
        loaded = load_model(tmp_path / f"out-{step}")
        same(loaded.segmentor.state_dict(), read_tensors(checkpoint, "nets.student"))
    last, shipped = load_file(tmp_path / "out-8" / "model.safetensors"), load_file(run / "model.safetensors")
    same(last, shipped)
    middle = load_file(tmp_path / "out-3" / "model.safetensors")
    assert any(not torch.equal(middle[name], last[name]) for name in last)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out-8", run))
    for key in ("format", "model", "class_count"):
        assert ours[key] == theirs[key]


def test_the_settings_of_the_run_come_along(tmp_path: Path, call: Any) -> None:
    code, err = call(saved(tmp_path / "checkpoints"), "--out", tmp_path / "out")
    assert code == 0 and "name" not in err, err
    same(load_file(tmp_path / "out" / "model.safetensors"), student().state_dict())
    save_model(tmp_path / "wanted", student(), META)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "wanted" / "config.json").read_text()
    model = open_model(str(tmp_path / "out"), "cpu", lambda line: None)
    assert model.classes.names == ("road", "car") and model.resize == (64, 32) and model.inference.batch == 2


def test_a_checkpoint_of_two_ranks_is_exported_whole(tmp_path: Path, call: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def work(ranks: Ranks) -> None:
        mesh = init_device_mesh("cpu", (2,))
        whole = student().state_dict()
        cut = {name: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for name, x in whole.items()}
        store = CheckpointStore(tmp_path / "two", ranks=ranks)
        store.save(7, {"nets": {"student": cut}}, config={"model": NETWORK}, meta=META)

    run_ranks(tmp_path / "two", 2, work)
    code, err = call(tmp_path / "two" / "step-7", "--out", tmp_path / "out")
    assert code == 0, err
    same(load_file(tmp_path / "out" / "model.safetensors"), student().state_dict())


def test_every_format_is_read_again(tmp_path: Path, call: Any) -> None:
    checkpoint, whole = saved(tmp_path / "checkpoints"), student().state_dict()
    for name in export.FOLDERS:
        assert call(checkpoint, "--format", name, "--out", tmp_path / name)[0] == 0
        loaded = load_model(tmp_path / name)
        assert loaded.classes == META["classes"]
        got = loaded.segmentor.state_dict()
        same({key: got[key] for key in whole}, whole)
    for name in export.FILES:
        file = tmp_path / f"{name}.safetensors"
        assert call(checkpoint, "--format", name, "--out", file)[0] == 0
        fresh = student(5)
        assert load_backbone(fresh, file) == name
        same(fresh.backbone.state_dict(), student().backbone.state_dict())
    whole_again = load_model(tmp_path / "daformer.safetensors").segmentor.state_dict()
    same(whole_again, whole)


def test_a_shipped_model_is_exported_too(tmp_path: Path, call: Any) -> None:
    save_model(tmp_path / "run", student(), META)
    assert call(tmp_path / "run", "--format=hf", "--out", tmp_path / "hf")[0] == 0
    assert call(tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    same(load_model(tmp_path / "back").segmentor.state_dict(), student().state_dict())
    assert load_model(tmp_path / "back").classes == META["classes"]


def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path, call: Any) -> None:
    whole = saved(tmp_path / "checkpoints")
    for file in sorted(whole.iterdir()):
        for missing in (False, True):
            broken = tmp_path / "broken" / "step-7"
            shutil.rmtree(broken.parent, ignore_errors=True)
            shutil.copytree(whole, broken)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            (broken / file.name).write_bytes(content)
            if missing:
                (broken / file.name).unlink()
            line = sentence(call(broken, "--out", tmp_path / "out"))
            assert str(broken) in line and ("missing" in line if missing else "match" in line), line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_no_student_is_refused(tmp_path: Path, call: Any) -> None:
    def refused(path: Path) -> str:
        return sentence(call(path, "--out", tmp_path / "out"))

    other = {"model": {**NETWORK, "channels": 32}}
    assert "another network" in refused(saved(tmp_path / "a", config=other))
    assert "another version" in refused(saved(tmp_path / "b", config={"model": {**NETWORK, "wings": 2}}))
    assert "another version" in refused(saved(tmp_path / "c", config={}))
    CheckpointStore(tmp_path / "d").save(7, {"nets": {"teacher": student().state_dict()}}, config={"model": NETWORK})
    assert str(tmp_path / "d") in refused(tmp_path / "d" / "step-7")
    broken = student().state_dict()
    broken["decode_head.linear_pred.bias"][0] = torch.nan
    CheckpointStore(tmp_path / "e").save(7, {"nets": {"student": broken}}, config={"model": NETWORK})
    assert "decode_head.linear_pred.bias is not finite" in refused(tmp_path / "e" / "step-7")
    assert not (tmp_path / "out").exists()


def test_without_class_names_a_line_says_so(tmp_path: Path, call: Any) -> None:
    code, err = call(saved(tmp_path / "checkpoints", meta=None), "--out", tmp_path / "out")
    assert code == 0 and "does not name its 2 classes" in err
    assert load_model(tmp_path / "out").classes is None


def test_wrong_options_are_named(tmp_path: Path, call: Any) -> None:
    checkpoint = saved(tmp_path / "checkpoints")
    assert "--out is missing" in sentence(call(checkpoint))
    for name in (*export.FOLDERS, *export.FILES):
        assert name in sentence(call(checkpoint, "--format", "onnx", "--out", tmp_path / "out"))
    assert "must end in .safetensors" in sentence(call(checkpoint, "--format=mmseg", "--out", tmp_path / "out"))
    file = tmp_path / "no" / "a.safetensors"
    assert "its folder does not exist" in sentence(call(checkpoint, "--format=mmseg", "--out", file))
    (tmp_path / "file").write_text("")
    assert "cannot be made (File exists)" in sentence(call(checkpoint, "--out", tmp_path / "file"))
    assert "does not exist" in sentence(call(tmp_path / "step-9", "--out", tmp_path / "out"))
