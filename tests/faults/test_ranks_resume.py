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
