"""Round trips of a run's state, retention, replacement and resume."""

import hashlib
import json
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssr_fast.engine import dcp_files
from ssr_fast.engine.checkpoint import CheckpointStore, verify
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.optim import OptimConfig, build_optimizer, optimizer_state, set_learning_rate
from ssr_fast.engine.state import compare, config_hash, rng_state, set_rng_state, split
from ssr_fast.errors import UserError


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Every bit pattern, NaNs with payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


def _tensors() -> dict[str, Tensor]:
    return {
        "fp32": _random_bits(torch.float32, 33, 7),
        "bf16": _random_bits(torch.bfloat16, 5, 3),
        "fp16": _random_bits(torch.float16, 5),
        "fp64": _random_bits(torch.float64, 2, 2),
        "int64": torch.randint(-(2**63), 2**63 - 1, (4,), dtype=torch.int64),
        "uint8": _random_bits(torch.uint8, 9),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(math.pi),
        "counter": torch.tensor(2**62 + 1),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": torch.arange(100.0)[10:20],
        "transposed": torch.randn(3, 4).t(),
    }


def _store(folder: Path, keep: int = 2, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, keep, **options)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path: Path, seed: int, background: bool) -> None:
    store = _store(tmp_path, background=background)
    saved = _tensors()
    store.save(3, {"nets": {"student": saved}, "step": 3})
    path = store.latest()
    assert path == tmp_path / "step-3"
    loaded = {name: torch.empty_like(tensor).fill_(1) for name, tensor in saved.items()}
    state: dict[str, Any] = {"nets": {"student": dict(loaded)}, "step": 0}
    restored = store.load(path, state)
    assert (restored.step, state["step"], restored.world_size, restored.missing) == (3, 3, 1, ())
    for name, tensor in saved.items():
        assert state["nets"]["student"][name] is loaded[name], f"{name} was not loaded in place"
        assert _bits(loaded[name]) == _bits(tensor), name
        assert loaded[name].stride() == tensor.stride() or name in ("view",), name


class _Run:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        head = nn.Conv2d(8, 4, 1)
        self.net = nn.ModuleDict({"backbone": backbone, "head": head})
        self.optimizer = build_optimizer({"backbone": backbone, "head": head}, OptimConfig(lr=0.01))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            set_learning_rate(self.optimizer, 0.01 / (step + 1))
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            self.net["head"](self.net["backbone"](x)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": optimizer_state(self.optimizer)}

    def tensors(self) -> dict[str, bytes]:
        return {name: _bits(tensor) for name, tensor in split(self.state())[0].items()}


@pytest.mark.parametrize("stopped", [0, 1, 3])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, stopped: int) -> None:
    whole, cut, resumed = _Run(1), _Run(1), _Run(2)
    whole.train(0, 5)
    cut.train(0, stopped)
    store = _store(tmp_path)
    store.save(stopped, cut.state())
    path = store.latest()
    assert path is not None
    assert resumed.tensors() != cut.tensors()
    resumed.train(0, 2)  # what it had before must not matter
    store.load(path, resumed.state())
    assert resumed.tensors() == cut.tensors()
    resumed.train(stopped, 5)
    assert resumed.tensors() == whole.tensors()
    names = whole.tensors().keys()
    assert {"optimizer.lr.0", "optimizer.params.head.weight.step", "net.backbone.1.num_batches_tracked"} <= names


def test_values_come_back_with_their_kind(tmp_path: Path) -> None:
    store = _store(tmp_path)
    values = {"a": 0.1, "b": True, "c": None, "d": "text", "e": [1, 2.5], "f": 2**60, "g": {"h": -math.inf}}
    store.save(1, {"values": values, "x": torch.ones(2)}, meta={"note": [1]}, config={"lr": 1e-3, "dir": Path("/x")})
    state: dict[str, Any] = {"values": {"a": 0.0, "extra": 5, "g": {}}, "x": torch.zeros(2)}
    restored = store.load(tmp_path / "step-1", state)
    assert state["values"] == {**values, "extra": 5}
    assert restored.missing == ("values.extra",)
    assert restored.meta == {"note": [1]} and restored.config == {"lr": 1e-3, "dir": "/x"}
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert manifest["config_hash"] == config_hash({"dir": Path("/x"), "lr": 1e-3})


def test_the_window_of_the_metrics_comes_back_into_an_empty_log(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 10)
    for step in (1, 2, 3):
        log.add(step, {"loss": torch.tensor(0.1) * step})
    store = _store(tmp_path / "checkpoints")
    store.save(3, {"log": log.state_dict()})
    state: dict[str, Any] = {"log": MetricLog(tmp_path, "ssr", 10).state_dict()}
    store.load(tmp_path / "checkpoints" / "step-3", state)
    assert state["log"] == log.state_dict() and state["log"]["count"] == 3


def _draw() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), np.random.rand(2).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)


def test_random_generators_continue(tmp_path: Path, seed: int) -> None:
    random.gauss(0, 1)  # leaves a second Gaussian in Python's generator, and below in NumPy's
    np.random.randn()
    store = _store(tmp_path)
    store.save(1, {"rng": {"0": rng_state()}})
    expected = [_draw() for _ in range(3)]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    state: dict[str, Any] = {"rng": {"0": rng_state()}}
    store.load(tmp_path / "step-1", state)
    set_rng_state(state["rng"]["0"])
    assert [_draw() for _ in range(3)] == expected


def test_more_ranks_than_were_saved_keep_their_own_generators(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(1, {"x": torch.ones(1), "rng": {"0": rng_state()}})
    own = rng_state()
    state: dict[str, Any] = {"x": torch.zeros(1), "rng": {"3": {k: t.clone() for k, t in own.items()}}}
    restored = store.load(tmp_path / "step-1", state)
    assert set(restored.missing) == {f"rng.3.{name}" for name in own}
    assert all(torch.equal(state["rng"]["3"][name], own[name]) for name in own)
    assert state["x"].item() == 1


def test_a_save_in_the_background_is_a_snapshot(tmp_path: Path) -> None:
    store = _store(tmp_path, background=True)
    x, net = torch.arange(1000.0), nn.Linear(3, 3)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    store.save(1, {"x": x, "net": net.state_dict()})
    with torch.no_grad():
        x.zero_()
        net.weight.zero_()
    state: dict[str, Any] = {"x": x, "net": net.state_dict()}
    path = store.latest()
    assert path is not None
    store.load(path, state)
    assert torch.equal(x, torch.arange(1000.0)) and torch.equal(net.weight, expected["weight"])


def test_what_overwrites_the_tensors_after_a_save_in_the_background_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Every kind of tensor, overwritten in place before the thread has read a byte of it."""
    overwritten, writing = threading.Event(), dcp_files.save_tensors

    def late(*arguments: Any) -> None:
        assert overwritten.wait(30)
        writing(*arguments)

    monkeypatch.setattr(dcp_files, "save_tensors", late)
    store = _store(tmp_path, background=True)
    tensors = {**_tensors(), "parameter": nn.Parameter(torch.randn(3)), "of_0": torch.tensor(0.5)}
    tensors["shared_a"], tensors["shared_b"] = torch.randn(6).view(2, 3)
    expected = {name: _bits(tensor) for name, tensor in tensors.items()}
    store.save(1, {"net": dict(tensors)})
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    overwritten.set()
    assert store.latest() == tmp_path / "step-1"
    with torch.no_grad():
        store.load(tmp_path / "step-1", {"net": tensors})
    assert {name: _bits(tensor) for name, tensor in tensors.items()} == expected


def test_a_save_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, writing, most = [0], dcp_files.save_tensors, [0]

    def slow(*arguments: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        writing(*arguments)
        running[0] -= 1

    monkeypatch.setattr(dcp_files, "save_tensors", slow)
    store = _store(tmp_path, background=True)
    for step in (1, 2, 3):
        store.save(step, {"x": torch.tensor(step)})
        assert store.written == (step - 1 or None)
    store.save(4, {"x": torch.tensor(4)}, final=True)
    assert store.written == 4 and most == [1] and _names(tmp_path) == ["step-3", "step-4"]


def test_a_config_that_does_not_match_its_hash_is_damage(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(1, {"x": torch.ones(1)}, config={"steps": 10, "by_number": {10: 1, 9: 2}})
    path = tmp_path / "step-1" / "manifest.json"
    assert verify(tmp_path / "step-1") is None
    for old, new, reason in (
        (b'"steps": 10', b'"steps": 11', "the config in manifest.json does not match its hash"),
        (b'"format": 1', b'"format": 7', "it has format 7, this version reads format 1"),
        (b'"files": {', b'"filed": {', "manifest.json is not one of ssr_fast's"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new))
        digest = path.with_name("manifest.sha256")
        digest.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.json\n")
        assert verify(tmp_path / "step-1") == reason
        path.write_bytes(whole)


@pytest.mark.gpu
def test_a_save_of_a_gpus_tensors_in_the_background_is_a_snapshot(tmp_path: Path) -> None:
    store = _store(tmp_path, background=True)
    tensors = [torch.full((1 << 20,), 1.0, device="cuda") for _ in range(16)]
    for step in range(1, 4):
        store.save(step, {str(number): tensor for number, tensor in enumerate(tensors)})
        for tensor in tensors:
            tensor.add_(1)
    state = {str(number): torch.zeros_like(tensor) for number, tensor in enumerate(tensors)}
    path = store.latest()
    assert path == tmp_path / "step-3"
    store.load(path, state)
    assert all(tensor.eq(3).all() for tensor in state.values())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=2)
    assert store.latest() is None and store.best() is None
    for step, score in enumerate([10.0, 50.0, 20.0, None, math.nan, 40.0], 1):
        store.save(step, {"x": torch.tensor(step)}, score=score)
        assert store.latest() == tmp_path / f"step-{step}"
    assert _names(tmp_path) == ["step-2", "step-5", "step-6"]
    assert store.best() == tmp_path / "step-2"
    store.save(7, {"x": torch.tensor(7)}, score=50.0)
    assert store.best() == tmp_path / "step-7"
    assert _names(tmp_path) == ["step-6", "step-7"]
    assert _store(tmp_path).best() == tmp_path / "step-7"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=3)
    for step in (9, 10, 100):
        store.save(step, {"x": torch.tensor(step)})
    assert store.latest() == tmp_path / "step-100"
    store.save(1000, {"x": torch.tensor(1000)})
    assert _names(tmp_path) == ["step-10", "step-100", "step-1000"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for value in (1.0, 2.0):
        store.save(5, {"x": torch.tensor(value)})
    state: dict[str, Any] = {"x": torch.tensor(0.0)}
    store.load(tmp_path / "step-5", state)
    assert state["x"].item() == 2.0 and _names(tmp_path) == ["step-5"]


def test_an_abandoned_continuation_is_removed_and_said(tmp_path: Path) -> None:
    told: list[str] = []
    store = _store(tmp_path, keep=3, report=told.append)
    for step in (10, 20, 30):
        store.save(step, {"x": torch.tensor(step)}, score=float(step))
    assert told == []
    store.save(15, {"x": torch.tensor(15)}, score=0.0)
    assert _names(tmp_path) == ["step-10", "step-15"] and len(told) == 1 and "[20, 30]" in told[0]
    assert store.latest() == tmp_path / "step-15"


def test_opening_settles_what_a_kill_left(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for step in (1, 2):
        store.save(step, {"x": torch.tensor(step)})
    (tmp_path / "step-1").rename(tmp_path / ".old-1")
    (tmp_path / ".old-2").mkdir()
    (tmp_path / ".tmp-3" / "deep").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    _store(tmp_path)
    assert _names(tmp_path) == ["notes.txt", "step-1", "step-2"]
    assert verify(tmp_path / "step-1") is None


def test_a_moved_checkpoint_loads(tmp_path: Path) -> None:
    _store(tmp_path / "run").save(1, {"x": torch.tensor(4.0)})
    moved = tmp_path / "elsewhere"
    (tmp_path / "run" / "step-1").rename(moved)
    state: dict[str, Any] = {"x": torch.tensor(0.0)}
    _store(tmp_path / "other").load(moved, state)
    assert state["x"].item() == 4.0
    assert str(tmp_path).encode() not in (moved / ".metadata").read_bytes()


def test_misuse_is_an_error(tmp_path: Path) -> None:
    store = _store(tmp_path)
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="a.b"):
        store.save(1, {"a.b": x, "a": {"b": x}})
    with pytest.raises(TypeError, match="not 1"):
        store.save(1, {"a": {1: x}})
    with pytest.raises(TypeError, match="JSON"):
        store.save(1, {"a": object()})
    with pytest.raises(ValueError, match="keep"):
        _store(tmp_path, keep=0)
    with pytest.raises(UserError, match="no such folder"):
        store.load(tmp_path / "step-9", {})
    assert _names(tmp_path) == []


def test_compare_names_what_changed() -> None:
    saved = {"run": {"dir": "a", "steps": 5}, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "old": 1, "t": math.nan}
    now = {"run": {"dir": "b", "steps": 6}, "optim": {"lr": 0.1, "betas": (0.9, 0.99)}, "new": Path("x"), "t": math.nan}
    assert compare(saved, now, ignore=["run.dir"]) == [
        "run.steps: 5 -> 6",
        "old: 1 -> (not set)",
        "new: (not set) -> x",
    ]
    assert compare(saved, now, ignore=["run", "old", "new"]) == []
    assert compare({"runner": 1}, {"runner": 2}, ignore=["run"]) == ["runner: 1 -> 2"]
    assert compare({"a": 1, "b": 1.0}, {"a": True, "b": 1}) == ["a: 1 -> True", "b: 1.0 -> 1"]
    assert config_hash({"a": 1, "b": (2,)}) == config_hash({"b": [2], "a": 1}) != config_hash({"a": 1, "b": [3]})
