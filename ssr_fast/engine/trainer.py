"""The training loop of one stage in one process: batch -> loss -> backward -> guarded step -> metrics, and around it
evaluation, checkpoints, resume and a clean stop."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from ssr_fast.data.advice import Advice
from ssr_fast.data.batch import Batch
from ssr_fast.data.workers import LoaderDied
from ssr_fast.engine import graphs
from ssr_fast.engine.attention import ATTENTIONS
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.compiling import CompiledStep, RunStep
from ssr_fast.engine.data_clock import DataClock
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.optim import OptimConfig, optimizer_state
from ssr_fast.engine.precision import PRECISIONS
from ssr_fast.engine.progress import Progress
from ssr_fast.engine.step import TrainStep
from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method


@dataclass(kw_only=True)
class RunConfig:
    """The run; the options `--run.*`."""

    dir: str = ""
    """Folder of everything that the run writes; unset: runs/<preset>, numbered if it exists."""
    steps: int = 40000
    """Optimiser steps of a stage."""
    seed: int = 0
    """Seed of the initial weights, the samples and all augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "auto"
    """bf16 (copies of the weights and activations; weights, losses and statistics stay float32), tf32 (a GPU's), fp32,
    or auto: bf16 on a GPU that has it, else fp32."""
    compile_blocks: bool = False
    """torch.compile of every block and head: fewer, larger kernels, for minutes of compilation at the first steps."""
    graph: str = "auto"
    """auto (on a GPU a step is captured in a CUDA graph; where that fails a line says why) or off (every kernel is
    launched by itself: for debugging and profiles)."""
    attention: str = "sdpa"
    """The MiT's attention in a step: sdpa (PyTorch's own) or xformers (memory_efficient_attention, on a GPU)."""
    recompute_blocks: bool = False
    """Keep of each block of the student its input alone, and compute the rest again in the backward pass: for crops
    that would not fit into the GPU's memory. Counted at 1024 with MiT-B5: 67 % fewer bytes, 16 % more arithmetic."""
    stages: tuple[str, ...] | None = None
    """Methods to train one after another from the same start, to compare them; null: only method.name."""
    log_every: int = 50
    """Steps in one row of the metrics; the device is read once for each."""
    evaluate_every: int = 4000
    """Steps between evaluations on the target, where it has labels; the last step is always evaluated."""
    save_every: int = 4000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints to keep."""
    samples: int = 4
    """Evaluation images (without any: target images) shown in the report."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        for name in ("steps", "log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                found.append(f"--{where}.{name} must be at least 1 (it is {getattr(self, name)})")
        for name in ("seed", "samples"):
            if getattr(self, name) < 0:
                found.append(f"--{where}.{name} must not be negative (it is {getattr(self, name)})")
        if self.precision not in PRECISIONS:
            found.append(f"--{where}.precision must be one of {', '.join(PRECISIONS)} (it is {self.precision})")
        if self.graph not in graphs.MODES:
            found.append(f"--{where}.graph must be {' or '.join(graphs.MODES)} (it is {self.graph})")
        if self.attention not in ATTENTIONS:
            found.append(f"--{where}.attention must be one of {', '.join(ATTENTIONS)} (it is {self.attention})")
        kind = self.device.partition(":")[0]
        if kind not in ("auto", "cpu", "cuda"):
            found.append(f"--{where}.device must be auto, cpu, cuda or cuda:N (it is {self.device})")
        if kind == "cuda" and not torch.cuda.is_available():
            found.append(f"--{where}.device {self.device} asks for a GPU and PyTorch finds none: use auto or cpu")
        return found


class Evaluation(Protocol):
    """What the trainer needs of an evaluation's result: mIoU in percent, IoU in percent by class name."""

    @property
    def miou(self) -> float: ...
    @property
    def per_class(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Branch:
    """A supervised stage whose first steps equal those of the stage in training, to be continued from there."""

    step: int
    """Number of the steps that both have."""
    store: CheckpointStore
    log: MetricLog


class Stopped(Exception):
    """The run was asked to stop and has saved; args: the signal's name and the number of finished steps."""


def pick_device(name: str) -> torch.device:
    """The device of an option's value: "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


class Trainer:
    """Trains one method.

    Args:
        method: the nets and their loss, on `device`.
        load: (first step, last step) -> batches of the steps in between, on the host; closed if it can be.
        evaluate: student -> scores on the target; None without labelled target images.
        run, optim: the options.
        store: checkpoints of this stage.
        log: metrics of this stage.
        stop: the flag that a signal sets.
        config: the run's resolved configuration, for the checkpoints' manifests.
        report, console: where one-line messages and the progress go.
        branch: a supervised stage that is given its checkpoint and metrics on the way.
        advice: what makes loading faster, for the warning that training waits for it.
    """

    def __init__(
        self,
        method: Method,
        load: Callable[[int, int], Iterator[Batch]],
        evaluate: Callable[[nn.Module], Evaluation] | None,
        *,
        run: RunConfig,
        optim: OptimConfig,
        store: CheckpointStore,
        log: MetricLog,
        stop: StopSignal,
        config: dict[str, Any],
        device: torch.device,
        report: Callable[[str], None] = print,
        console: Console | None = None,
        branch: Branch | None = None,
        advice: Advice | None = None,
    ) -> None:
        self.method, self.load, self.evaluate = method, load, evaluate
        self.run, self.optim, self.store, self.log, self.stop, self.config = run, optim, store, log, stop, config
        self.device, self.report, self.console, self.branch = device, report, console, branch
        self.advice = advice or Advice()
        self.step = TrainStep(method, optim, run.steps)
        self.optimizer, self.guard = self.step.optimizer, self.step.guard
        self._run_step: RunStep = self.step
        if device.type == "cuda" and run.graph == "auto":
            self._run_step = graphs.on_cuda(self.step, device, report)
        if run.compile_blocks:
            self._run_step = CompiledStep(self._run_step, report)
        self.done = self._saved = 0
        self.scores: Evaluation | None = None
        self.seconds = 0.0

    def resume(self) -> bool:
        """Continue after the newest checkpoint that verifies; False if there is none."""
        path = self.store.latest()
        if path is None:
            return False
        state = self._state()
        self.store.load(path, state)
        self.done, self.seconds = int(state["progress"]["step"]), float(state["progress"]["seconds"])
        self._saved = self.done
        self.guard.skipped.fill_(int(state["progress"]["skipped"]))
        self.method.refresh()
        self.log.load_state_dict(state["log"])
        self.log.truncate(self.done)
        self.report(f"resumed {self.method.stage_name} after step {self.done} from {path}")
        return True

    def fit(self) -> Evaluation | None:
        """Train to the last step and return its evaluation, if the run has any.

        Raises:
            Stopped: a signal asked for it; a checkpoint of the finished steps has been written.
            UserError: a sample cannot be read; the loss was not finite in a whole window of steps; or a process of
                the loader died, and the finished steps have been saved.
        """
        try:
            self._train()
        except LoaderDied as death:  # between two steps; the loader is closed, so its memory is free for saving
            raise self._end_of_loader(death) from None
        if self.scores is None:  # resumed after the last step
            self._evaluate()
        return self.scores

    def _train(self) -> None:
        started = time.perf_counter() - self.seconds
        with (
            Progress(self.run.steps, self.method.stage_name, self.done, self.console) as progress,
            contextlib.closing(DataClock(self.load(self.done, self.run.steps), self.advice, self.report)) as batches,
        ):
            self.log.restart_clock()
            for step, batch in enumerate(batches, self.done):
                terms = self.train_step(self.method.prepare(batch).to(self.device), step)
                self.done = step + 1
                images = batch.source_image.shape[0] + batch.target_image.shape[0]
                times = {"lr": self.step.rate, "images": images, "waited": batches.waited}
                row = self.log.add(self.done, {**terms, **times})
                progress.update(self.done, row)
                batches.judge(row)
                if row is not None and row["skipped"] >= self.done and self.done >= 2:
                    raise UserError(_never_finite(self.done, self.optim.lr))
                self.seconds = time.perf_counter() - started
                last = self.done == self.run.steps
                if last or self.done % self.run.evaluate_every == 0:
                    self._evaluate()
                if self.branch is not None and self.done == self.branch.step:
                    self._save_branch(self.branch)
                if last or self.done % self.run.save_every == 0 or self.stop.requested:
                    self.save()
                if self.stop.requested and not last:
                    raise Stopped(self.stop.requested, self.done)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on a batch on the device; returns the terms for the log, still on the device."""
        return self._run_step(batch, step)

    def save(self) -> None:
        """Write a checkpoint of the finished steps."""
        score = self.scores.miou if self.scores is not None else None
        self.store.save(self.done, self._state(), config=self.config, score=score)
        self._saved = self.done
        self.log.restart_clock()

    def _end_of_loader(self, death: LoaderDied) -> UserError:
        """Saves what no checkpoint holds yet; the sentence that ends the run."""
        resume, saved = f"--resume {self.run.dir}", self._saved
        if self.done == 0:
            return UserError(f"{death.what}; no step was done yet: {death.cure}, then start again with {resume}")
        try:
            if saved != self.done:
                self.save()
            self.store.wait()
        except (UserError, OSError) as error:
            return UserError(
                f"{death.what}; saving after step {self.done} failed too ({error}): {death.cure}, then continue with "
                f"{resume}, which starts from the last checkpoint (step {saved})"
            )
        return UserError(f"{death.what}; saved after step {self.done}: {death.cure}, then continue with {resume}")

    def _save_branch(self, branch: Branch) -> None:
        """The checkpoint and the metrics that the supervised method would have written itself by now."""
        self.log.copy_to(branch.log, self.method.own_metrics)
        state = self._state()
        state["nets"] = {"student": state["nets"]["student"]}
        state["log"] = branch.log.state_dict()
        branch.store.save(self.done, state, config=self.config)
        self.log.restart_clock()

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.scores = self.evaluate(self.method.student)
        self.log.evaluation(self.done, self.scores.miou, self.scores.per_class)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; loading writes into these very tensors."""
        return {
            "nets": {name: net.state_dict() for name, net in self.method.saved().items()},
            "optimizer": optimizer_state(self.optimizer),
            "log": self.log.state_dict(),
            "progress": {"step": self.done, "seconds": self.seconds, "skipped": int(self.guard.skipped)},
        }


def _never_finite(steps: int, lr: float) -> str:
    return f"the gradient was not finite in any of the first {steps} steps: lower --optim.lr (it is {lr})"
