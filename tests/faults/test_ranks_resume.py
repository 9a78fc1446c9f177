"""Several processes that are stopped and resumed: bit for bit by as many, and to rounding by more, fewer or other ones.

The stop comes inside a window of the metrics, so each process has to get its own part of the sums back.
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.manifest import read_manifest
from ssr_fast.engine.trainer import Trainer
from tests.methods.run_support import TINY
from tests.ranks import Ended, check, train

SMALL = [*TINY, "--run.device=cpu", "--run.log_every=3"]
LATE = "--self_training.start_step=7"  # a last bit can turn a pseudo-label over
UNTOLD = ("time", "images_per_second", "data_share")
STOPPED_AFTER = 5  # of 8 steps; a row is of 3
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def stop_in(rank: int, victim: int, step: int) -> None:
    """One rank gets SIGTERM in a step (counted from 1); nobody draws a report."""
    train_step: Callable[..., Any] = Trainer.train_step

    def interrupted(self: Trainer, batch: Any, number: int) -> Any:
        if rank == victim and number + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, number)

    Trainer.train_step = interrupted  # type: ignore[method-assign]
    no_report(rank)


def no_report(rank: int) -> None:
    """Drawing it takes longer than these trainings."""
    import ssr_fast.session

    ssr_fast.session.write_report = lambda folder: None  # type: ignore[assignment]


def trained(folder: Path, world: int, options: Sequence[str], code: int = 0) -> list[Ended]:
    ended = train(folder.parent, world, options, (no_report, ()))
    check(ended, code)
    return ended


def whole(folder: Path, world: int, options: Sequence[str]) -> Path:
    trained(folder, world, [*SMALL, *options, "--run.dir", str(folder)])
    return folder


def begun(folder: Path, world: int, options: Sequence[str]) -> Path:
    """A run that was stopped; several ranks hear of it a step later."""
    step = STOPPED_AFTER if world == 1 else STOPPED_AFTER - 1
    ended = train(folder.parent, world, [*SMALL, *options, "--run.dir", str(folder)], (stop_in, (world - 1, step)))
    check(ended, 3)
    assert f"stopped by SIGTERM: saved after step {STOPPED_AFTER}" in ended[0].err
    assert not any(rank.err for rank in ended[1:])
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in UNTOLD} for line in lines]


def tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    from ssr_fast.engine.dcp_files import load_tensors, saved_tensors

    path = CheckpointStore(run / "checkpoints").latest()
    assert path is not None
    state = {name: torch.empty(there.size, dtype=there.properties.dtype) for name, there in saved_tensors(path).items()}
    load_tensors(path, state, None)
    return state


def check_bits(parts: Path, uncut: Path) -> None:
    """Metrics, every tensor of the last checkpoint and the shipped model."""
    assert rows(parts) == rows(uncut)
    one, two = tensors(uncut), tensors(parts)
    assert one.keys() == two.keys()
    for kind in ("nets.student.", "nets.teacher.", "optimizer.params.", "guard.", "rng.0.", "rng.1.", "window."):
        assert any(name.startswith(kind) for name in one), kind
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    shipped, again = load_file(uncut / "model.safetensors"), load_file(parts / "model.safetensors")
    assert shipped.keys() == again.keys() and all(torch.equal(shipped[name], again[name]) for name in shipped)


def check_close(parts: Path, uncut: Path, bound: float) -> None:
    one, two = rows(uncut), rows(parts)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [3, 6, 8]
    for ours, theirs in zip(two[:2], one[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in ours if name.startswith("loss")):
            assert math.isclose(ours[name], theirs[name], rel_tol=bound, abs_tol=1e-9), (name, ours, theirs)


@pytest.mark.parametrize(
    ("mode", "world", "options"),
    [
        ("ddp", 2, ["--run.precision=bf16", "--optim.accumulate=2"]),
        ("fsdp", 2, []),
        pytest.param("ddp", 2, [], marks=slow),
        pytest.param("fsdp", 2, ["--run.precision=bf16", "--optim.accumulate=2"], marks=slow),
        pytest.param("hsdp", 2, ["--parallel.shard=1"], marks=slow),
        pytest.param("hsdp", 2, ["--run.precision=bf16", "--optim.accumulate=2"], marks=slow),
        pytest.param("ddp", 4, [], marks=slow),
        pytest.param("ddp", 4, ["--parallel.sync_batchnorm=true"], marks=slow),
        pytest.param("fsdp", 4, ["--optim.accumulate=2"], marks=slow),
        pytest.param("hsdp", 4, ["--parallel.shard=2", "--run.precision=bf16"], marks=slow),
    ],
)
def test_as_many_ranks_resume_bit_for_bit(mode: str, world: int, options: list[str], tmp_path: Path) -> None:
    options = [f"--parallel.mode={mode}", *options]
    uncut, parts = whole(tmp_path / "whole", world, options), begun(tmp_path / "parts", world, options)
    assert int(tensors(parts)["window.1"].count_nonzero()) > 0  # the stop cuts a window
    ended = trained(parts, world, ["--resume", str(parts)])
    assert f"resumed ssr after step {STOPPED_AFTER}" in ended[0].out and "changed since" not in ended[0].out
    assert "--optim.accumulate" not in ended[0].err and not any(rank.out or rank.err for rank in ended[1:])
    check_bits(parts, uncut)


class Runs:
    """Runs by (world, options) that tests share: uncut ones, and copies of stopped ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def whole(self, world: int, *options: str) -> Path:
        return self._made("whole", whole, world, options)

    def begun(self, copy: Path, world: int, *options: str) -> Path:
        return Path(shutil.copytree(self._made("begun", begun, world, options), copy))

    def _made(self, name: str, make: Callable[..., Path], world: int, options: tuple[str, ...]) -> Path:
        folder = self._folder / f"{name}-{world}{''.join(options).replace('--', '-')}"
        return folder if folder.exists() else make(folder, world, options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def told(ended: Sequence[Ended]) -> tuple[list[str], list[str]]:
    """Lines about the number of processes, and about changed options; the other ranks say nothing."""
    assert not any(rank.out or rank.err for rank in ended[1:])
    lines = ended[0].out.splitlines()
    changes = [line.partition(": ")[2] for line in lines if line.startswith("changed since that checkpoint")]
    return [line for line in ended[0].err.splitlines() if "--optim.accumulate" in line], changes


@pytest.mark.parametrize(
    ("before", "begins", "after", "continues"),
    [
        (2, ["--parallel.mode=fsdp"], 1, ["--parallel.mode=single"]),
        (1, ["--optim.accumulate=2"], 2, []),
        pytest.param(2, [], 1, [], marks=slow),
        pytest.param(2, ["--parallel.mode=fsdp"], 1, ["--parallel.mode=auto"], marks=slow),
        pytest.param(2, ["--parallel.mode=fsdp"], 1, [], marks=slow),
        pytest.param(1, ["--optim.accumulate=2"], 2, ["--parallel.mode=fsdp"], marks=slow),
        pytest.param(2, ["--optim.accumulate=2"], 4, [], marks=slow),
        pytest.param(4, [], 2, [], marks=slow),
        pytest.param(4, ["--parallel.mode=fsdp"], 2, ["--parallel.mode=ddp"], marks=slow),
        pytest.param(4, ["--parallel.mode=hsdp", "--parallel.shard=2"], 2, ["--parallel.mode=fsdp"], marks=slow),
        pytest.param(4, ["--parallel.mode=hsdp", "--parallel.shard=2"], 1, ["--parallel.mode=ddp"], marks=slow),
    ],
)
def test_another_number_of_ranks_keeps_the_micro_batches(
    before: int, begins: list[str], after: int, continues: list[str], tmp_path: Path, runs: Runs
) -> None:
    shares = before * (2 if "--optim.accumulate=2" in begins else 1)
    run = runs.begun(tmp_path / "run", before, LATE, *begins)
    ended = trained(run, after, ["--resume", str(run), *continues])
    lines, changes = told(ended)
    each = shares // after
    assert len(lines) == 1 and f"in place of {before}: --optim.accumulate is {each}, so that" in lines[0]
    wanted = {f"parallel.processes: {before} -> {after}"}
    if shares != before * each:
        wanted.add(f"optim.accumulate: {shares // before} -> {each}")
    for option in continues:
        mode = next((word[16:] for word in begins if "mode=" in word), "auto")
        wanted.add(f"parallel.mode: {mode} -> {option[16:]}")
        wanted |= {"parallel.shard: 2 -> 0"} if mode == "hsdp" else set()
    assert sorted(changes) == sorted(wanted)
    check_close(run, runs.whole(1, LATE, f"--optim.accumulate={shares}"), 1e-5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["parallel"]["processes"] == after and config["optim"]["accumulate"] == each


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("ddp", "fsdp", marks=slow),
        pytest.param("fsdp", "ddp", marks=slow),
        pytest.param("fsdp", "hsdp", marks=slow),
    ],
)
def test_another_mode_of_as_many_ranks(before: str, after: str, tmp_path: Path, runs: Runs) -> None:
    run = runs.begun(tmp_path / "run", 2, LATE, f"--parallel.mode={before}")
    lines, changes = told(trained(run, 2, ["--resume", str(run), f"--parallel.mode={after}"]))
    assert lines == [] and changes == [f"parallel.mode: {before} -> {after}"]
    check_close(run, runs.whole(1, LATE, "--optim.accumulate=2"), 1e-5)


@slow
def test_one_process_goes_on_with_the_pseudo_labels_of_two(tmp_path: Path, runs: Runs) -> None:
    run = runs.begun(tmp_path / "run", 2)
    trained(run, 1, ["--resume", str(run)])
    check_close(run, runs.whole(1, "--optim.accumulate=2"), 1e-4)


@slow
@pytest.mark.parametrize(("shares", "after"), [(1, 2), (2, 3)])
def test_micro_batches_that_cannot_be_shared_are_one_sentence(
    shares: int, after: int, tmp_path: Path, runs: Runs
) -> None:
    run = runs.begun(tmp_path / "run", 1, LATE, f"--optim.accumulate={shares}")
    kept = (run / "config.yaml").read_bytes()
    ended = train(tmp_path, after, ["--resume", str(run)])
    check(ended, 2)
    first, *others = ended  # each process finds out by itself, before they meet; the machine's first one tells it
    assert first.err.count("\n") == 1 and first.out == "" and not any(rank.err or rank.out for rank in others)
    assert f"{after} cannot share the {shares} micro-batches of a step evenly" in first.err
    assert f"start a divisor of {shares}, or give --optim.accumulate" in first.err
    assert (run / "config.yaml").read_bytes() == kept
    lines, changes = told(trained(run, after, ["--resume", str(run), "--optim.accumulate=1", "--optim.lr=1e-5"]))
    assert lines == []
    assert f"parallel.processes: 1 -> {after}" in changes and len(changes) == 2 + (shares == 2)
    assert ("optim.accumulate: 2 -> 1" in changes) == (shares == 2)
    assert sum(line.startswith("optim.lr: ") and line.endswith("-> 1e-05") for line in changes) == 1


def aged(run: Path) -> None:
    """Make its newest checkpoint and its configuration those of before guards, ranks and generators."""
    store = CheckpointStore(run / "checkpoints")
    path = store.latest()
    assert path is not None
    manifest, new = read_manifest(path), ("guard.", "rng.", "window.")
    state: dict[str, Any] = {name: value for name, value in tensors(run).items() if not name.startswith(new)}
    log, progress = manifest["values"]["log"], manifest["values"]["progress"]
    state["log"] = {name: log[name] for name in ("means", "sums", "count")}
    state["progress"] = {"step": progress["step"], "seconds": progress["seconds"], "skipped": 2}
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section in (manifest["config"], config):
        del section["guard"], section["parallel"]
    store.save(manifest["step"], state, config=manifest["config"], meta=manifest["meta"])
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@slow
def test_a_checkpoint_of_before_the_guard_is_resumed(tmp_path: Path, runs: Runs) -> None:
    """It counts the skipped steps of then; weights and metrics go on to the bit."""
    run, uncut = runs.begun(tmp_path / "run", 1, LATE), runs.whole(1, LATE)
    aged(run)
    ended = trained(run, 1, ["--resume", str(run)])
    assert f"resumed ssr after step {STOPPED_AFTER}" in ended[0].out
    shipped, again = load_file(uncut / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(shipped[name], again[name]) for name in shipped)
    one, two = rows(run), rows(uncut)
    assert [row.get("skipped") for row in one] == [0, 2, None]
    assert [{**row, "skipped": None} for row in one] == [{**row, "skipped": None} for row in two]
