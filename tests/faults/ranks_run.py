"""Runs of several ranks to which something happens: the deeds, when they are done, and what a run leaves behind."""

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssr_fast.session
from ssr_fast.data.samples import StepSamples
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.optim import optimizer_state
from ssr_fast.engine.parallel import Wrapped
from ssr_fast.engine.step import TrainStep, statistics
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.evaluator import Evaluator
from ssr_fast.session import Session
from tests.faults.test_resume import rows, tensors
from tests.methods.run_support import TINY, children
from tests.ranks import Ended, train

RUN = [*TINY, "--run.device=cpu", "--run.log_every=5", "--run.evaluate_every=4", "--data.scenes.evaluation_count=5"]
"""8 steps, a row after the fifth (so a window is open at every checkpoint), a checkpoint every 3, an evaluation
every 4, of 3 images on rank 0 and 2 on rank 1."""
STOP_S = 20.0
DEATH_S = 60.0

PLACES: dict[str, tuple[Any, str]] = {
    "data": (ssr_fast.session, "open_domains"),
    "reading": (StepSamples, "views"),
    "step": (Trainer, "train_step"),
    "backward": (TrainStep, "backward"),
    "evaluation": (Evaluator, "scores"),
    "image": (Trainer, "_after_image"),
    "saving": (CheckpointStore, "save"),
    "writing": (CheckpointStore, "_write"),
    "branch": (Trainer, "_save_branch"),
    "finishing": (Session, "_finish"),
}
"""What a rank is about to do when the deed is done, as the owner and the name of a function."""


def at_call(
    rank: int, who: Sequence[int], place: str, number: int, deed: Callable[..., None], folder: Path, *more: Any
) -> None:
    """Of the ranks `who`, do `deed(folder, *more)` before the call `number`, from 1, of a place; once."""
    if rank not in who:
        return
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), [0]

    def broken(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            (folder / f"done-{rank}").write_text(str(time.monotonic()))
            deed(folder, *more)
        return real(*args, **named)

    setattr(owner, name, broken)


def send_self(folder: Path, name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def kill_worker(folder: Path) -> None:
    os.kill(children(os.getpid())[0], signal.SIGKILL)
    time.sleep(0.3)


def sleep_for_ever(folder: Path) -> None:
    while True:
        time.sleep(1)


def damaged_file(folder: Path) -> None:
    raise UserError("street.png cannot be read (truncated): repair the file")


def internal_error(folder: Path) -> None:
    raise RuntimeError("the shapes do not fit")


def done_at(folder: Path) -> float:
    """When the (first) deed was done."""
    return min(float(file.read_text()) for file in folder.glob("done-*"))


def spoil(rank: int, who: Sequence[int], factor: float, shares: Sequence[int], folder: Path) -> None:
    """Of the ranks `who`, multiply the loss of some micro-batches (counted from 0 over the run) by a factor. Every rank
    writes down the state before and after each step."""
    forward, compute, count, step = Wrapped.__call__, TrainStep.compute, [-1], [-1]

    def spoiled(self: Wrapped, *args: Any) -> dict[str, Tensor]:
        terms = forward(self, *args)
        count[0] += 1
        if rank in who and count[0] in shares:
            terms = {**terms, "loss": terms["loss"] * factor}
        return terms

    def written(self: TrainStep, *args: Any) -> dict[str, Tensor]:
        before = digests(self)  # the teacher has taken the student of the step before into its average
        terms = compute(self, *args)
        step[0] += 1
        with (folder / f"states-{rank}").open("a") as stream:
            stream.write(json.dumps({"step": step[0], "before": before, "after": digests(self)}) + "\n")
        return terms

    Wrapped.__call__ = spoiled  # type: ignore[method-assign]
    TrainStep.compute = written  # type: ignore[method-assign]


def digests(step: TrainStep) -> dict[str, str]:
    """This rank's part of student, teacher, moments and step counts, and the BatchNorm buffers, as sha256 by name."""
    found = {
        f"{net}.{name}": value
        for net, module in step.method.saved().items()
        for name, value in module.state_dict().items()
    }
    for parameter, values in optimizer_state(step.optimizer)["params"].items():
        found |= {f"optimizer.{parameter}.{key}": value for key, value in values.items()}
    found |= {f"statistics.{number}": value for number, value in enumerate(statistics(step.method))}
    return {name: _digest(value) for name, value in found.items() if isinstance(value, Tensor)}


def _digest(value: Tensor) -> str:
    local = value.to_local() if hasattr(value, "to_local") else value
    return hashlib.sha256(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def states(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"states-{rank}").read_text().splitlines()]


def note_workers(rank: int, folder: Path, *then: Any) -> None:
    """Write down the ids of the loader's processes at each step; then at_call(rank, *then)."""
    real = Trainer.train_step

    def noted(self: Trainer, *args: Any) -> Any:
        (folder / f"workers-{rank}").write_text(" ".join(map(str, children(os.getpid()))))
        return real(self, *args)

    Trainer.train_step = noted  # type: ignore[method-assign]
    at_call(rank, *then)


def workers_left(folder: Path, patience: float = 10.0) -> list[int]:
    """Of the noted loader's processes those that still live."""
    pids = [int(text) for file in folder.glob("workers-*") for text in file.read_text().split()]
    assert pids, "no process was noted"
    until = time.monotonic() + patience
    while left := [pid for pid in pids if _lives(pid)]:
        if time.monotonic() > until:
            return left
        time.sleep(0.1)
    return []


def _lives(pid: int) -> bool:
    try:
        head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return False
    return "pt_data_worker" in head and rest.split()[0] != "Z"


def errors(ended: Ended) -> list[str]:
    """The lines on stderr that say something."""
    return [line for line in ended.err.splitlines() if line.strip()]


def check_stopped(ended: Sequence[Ended], name: str, since: float, folder: Path) -> int:
    """All stopped in good order within 20 s, and rank 0 has said so; the step."""
    assert [rank.code for rank in ended] == [3] * len(ended), [rank.err for rank in ended]
    (line,) = errors(ended[0])
    found = re.fullmatch(rf"stopped by {name}: saved after step (\d+); continue with --resume {folder}", line)
    assert found, line
    assert not any(errors(rank) for rank in ended[1:]), [rank.err for rank in ended]
    seconds = max(rank.at for rank in ended) - since
    print(f"stopped {seconds:.1f} s after {name}, after step {found[1]}")
    assert seconds < STOP_S
    return int(found[1])


def check_told(ended: Sequence[Ended], alone: int, pattern: str, since: float) -> None:
    """All but the rank `alone` have ended with one sentence of this pattern and a code that says so."""
    seconds = max(rank.at for rank in ended) - since
    print(f"ended after {seconds:.1f} s, codes {[rank.code for rank in ended]}")
    for number, rank in enumerate(ended):
        assert rank.code != 0
        if number != alone:
            assert "Traceback" not in rank.err
            said = [line.removeprefix("error: ") for line in errors(rank) if re.match(r"error: |rank \d", line)]
            assert len(said) == 1 and re.fullmatch(rf"rank {number}: {pattern}", said[0]), (number, rank.err)
    assert seconds < DEATH_S


def resume(folder: Path, run: Path, world: int = 2) -> list[Ended]:
    """`--resume` by so many ranks."""
    return train(folder, world, ["--resume", str(run)])


def check_same(parts: Path, whole: Path, stages: Sequence[str] = ()) -> None:
    """The rows, every tensor of the newest checkpoint, random generators and window too, and the shipped model."""
    assert len(list(whole.glob("metrics*.jsonl"))) == max(1, len(stages))
    for file in whole.glob("metrics*.jsonl"):
        assert rows(parts, file.name) == rows(whole, file.name), file.name
    for stage in stages or ("",):
        one, two = (tensors(run, f"checkpoints/{stage}") for run in (whole, parts))
        assert one.keys() == two.keys()
        assert any(".rng.1." in name for name in one) and any(".window.1" in name for name in one)
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    shipped, again = (run / "model.safetensors" for run in (whole, parts))
    assert shipped.read_bytes() == again.read_bytes()


def check_windows(run: Path) -> None:
    """The newest checkpoint holds each rank's own sums of the steps after the last row."""
    windows = {name: value for name, value in tensors(run).items() if name.startswith(".window.")}
    assert len(windows) > 1 and all(window.any() for window in windows.values())
    assert len({tuple(window.tolist()) for window in windows.values()}) == len(windows)
