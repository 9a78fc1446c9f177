"""The training loop of one stage: batch -> loss -> backward -> guarded step -> metrics, and around it evaluation,
checkpoints, resume and a clean stop, at the same step on every rank."""

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
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.compiling import CompiledStep, RunStep
from ssr_fast.engine.data_clock import DataClock
from ssr_fast.engine.deterministic import prepare_deterministic
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.memory import MemoryUse, begin_measuring, out_of_memory
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.optim import OptimConfig, optimizer_state
from ssr_fast.engine.parallel import Wrapped
from ssr_fast.engine.progress import Progress
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.state import OPTIONAL, compare, rng_state, set_rng_state
from ssr_fast.engine.step import TrainStep
from ssr_fast.engine.step_guard import GuardConfig
from ssr_fast.engine.vote import Vote
from ssr_fast.engine.watch import At, nowhere
from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method


class Evaluation(Protocol):
    """What the trainer needs of an evaluation's result: mIoU in percent, IoU in percent by class name."""

    @property
    def miou(self) -> float: ...
    @property
    def per_class(self) -> dict[str, float]: ...


IGNORED = ("run.dir",)
"""Options whose change between a checkpoint and the run that continues it need not be told."""


@dataclass(frozen=True)
class Branch:
    """A supervised stage whose first steps equal those of the stage in training, to be continued from there."""

    step: int
    """Number of the steps that both have."""
    store: CheckpointStore
    log: MetricLog


class Stopped(Exception):
    """The run was asked to stop and has saved; args: the signal's name and the number of finished steps."""


class _StopHere(Exception):
    """All ranks have agreed to stop, in the middle of an evaluation; args: the signal's name."""


class Trainer:
    """Trains one method.

    Args:
        method: the nets and their loss, on `device`; or as `wrap` has given it.
        load: (first step, last step) -> batches of the steps in between, on the host; closed if it can be. A batch
            holds all micro-batches of this rank's step.
        evaluate: (student, called after each image) -> scores on the target; None without labelled target images.
        run, optim, guard: the options.
        store: checkpoints of this stage.
        log: metrics of this stage.
        stop: the flag that a signal sets.
        config: the run's resolved configuration, for the checkpoints' manifests.
        meta: what the shipped model's config.json will say, for the same.
        report, console: where one-line messages and the progress go.
        branch: a supervised stage that is given its checkpoint and metrics on the way.
        advice: what makes loading faster, for the warning that training waits for it.
        ranks: the processes that train together.
        at: told what the main thread is about to do, for the watch.
    """

    def __init__(
        self,
        method: Method | Wrapped,
        load: Callable[[int, int], Iterator[Batch]],
        evaluate: Callable[[nn.Module, Callable[[], None]], Evaluation] | None,
        *,
        run: RunConfig,
        optim: OptimConfig,
        store: CheckpointStore,
        log: MetricLog,
        stop: StopSignal,
        config: dict[str, Any],
        device: torch.device,
        guard: GuardConfig | None = None,
        meta: dict[str, Any] | None = None,
        report: Callable[[str], None] = print,
        console: Console | None = None,
        branch: Branch | None = None,
        advice: Advice | None = None,
        ranks: Ranks | None = None,
        at: At = nowhere,
    ) -> None:
        self.load, self.evaluate, self.ranks, self.at = load, evaluate, ranks or Ranks(), at
        self.run, self.optim, self.store, self.log, self.config, self.meta = run, optim, store, log, config, meta
        self.device, self.report, self.console, self.branch = device, report, console, branch
        self.advice, self.guarded, self.vote = advice or Advice(), guard or GuardConfig(), Vote(stop, self.ranks)
        exactly = prepare_deterministic(run.deterministic, device)
        self.step = TrainStep(method, optim, run.steps, guard, self.ranks, exactly)
        self.wrapped, self.method = self.step.wrapped, self.step.method
        self.optimizer, self.guard = self.step.optimizer, self.step.guard
        self._run_step: RunStep = self.step
        if device.type == "cuda" and run.graph == "auto":
            if self.wrapped.sharded:
                report("no CUDA graph, every step is launched kernel by kernel: fully_shard frees what it has gathered")
            else:
                self._run_step = graphs.on_cuda(self.step, device, report)
        if run.compile_blocks:
            self._run_step = CompiledStep(self._run_step, report)
        self.done = self._saved = self._evaluated = 0
        self.scores: Evaluation | None = None
        self.seconds = 0.0

    def resume(self) -> bool:
        """Continue after the newest checkpoint that verifies; False if there is none."""
        path = self.store.latest()
        if path is None:
            return False
        state = self._state()
        state["progress"]["evaluated"] = None
        # the guard's state is missing in checkpoints of before 2026-11-23, which count the skipped steps elsewhere
        restored = self.store.load(path, state, (*OPTIONAL, "window", "guard"))
        self._take(state)
        self.report(f"resumed {self.method.stage_name} after step {self.done} from {path}")
        for change in compare(restored.config, self.config, IGNORED):
            self.report(f"changed since that checkpoint: {change}")
        return True

    def fit(self) -> Evaluation | None:
        """Train to the last step and return its evaluation, if the run has any.

        Raises:
            Stopped: a signal asked for it; a checkpoint of the finished steps has been written.
            UserError: a sample cannot be read; steps were skipped too often; a checkpoint could not be written; or a
                process of the loader died, and the finished steps have been saved.
        """
        try:
            self._train()
        except LoaderDied as death:  # between two steps; the loader is closed, so its memory is free for saving
            raise self._end_of_loader(death) from None
        finally:
            self.vote.close()
        if self.scores is None and self.evaluate is not None:  # resumed after the last step, whose scores are logged
            self.scores = self.evaluate(self.wrapped.student(), lambda: None)
        self.store.wait()
        return self.scores

    def _train(self) -> None:
        started = time.perf_counter() - self.seconds
        with (
            Progress(self.run.steps, self.method.stage_name, self.done, self.console) as progress,
            contextlib.closing(DataClock(self.load(self.done, self.run.steps), self.advice, self.report)) as batches,
        ):
            self.log.restart_clock()
            if self._evaluated < self.done:
                self._between_steps()  # where a stop came in the evaluation
            self.at(f"reading the batch of step {self.done + 1}")
            for step, batch in enumerate(batches, self.done):
                self.at(f"step {step + 1}")
                terms = self.train_step(self.method.prepare(batch).to(self.device), step)
                self.done = step + 1
                images = batch.source_image.shape[0] + batch.target_image.shape[0]
                times = {"lr": self.step.rate, "images": images, "waited": batches.waited}
                row = self.log.add(self.done, {**terms, **times})
                progress.update(self.done, row)
                batches.judge(row)
                if row is not None:
                    self._judge(row)
                self.seconds = time.perf_counter() - started
                self._between_steps()
                self.at(f"reading the batch of step {self.done + 1}")

    def _between_steps(self) -> None:
        """Evaluation and checkpoint where they are due, and the stop that was asked for."""
        last = self.done == self.run.steps
        try:
            if last or self.done % self.run.evaluate_every == 0:
                self._evaluate()
            self._evaluated = self.done
            if self.branch is not None and self.done == self.branch.step:
                self._save_branch(self.branch)
            if last or self.done % self.run.save_every == 0:
                self.save(final=last)
            name = self.vote()
        except _StopHere as stop:
            name, last = stop.args[0], False
        if name is not None and not last:
            if self._saved != self.done:
                self.save(final=True)
            self.store.wait()
            raise Stopped(name, self.done)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on a batch on the device; returns the terms for the log, still on the device.

        Raises:
            UserError: it does not fit into the GPU's memory.
        """
        held = begin_measuring(self.device)
        try:
            return self._run_step(batch, step)
        except torch.OutOfMemoryError as error:
            if self.device.type != "cuda":
                raise
            height, width = batch.target_valid.shape[1:]
            raise out_of_memory(
                error,
                used=MemoryUse.read(error, self.device, held),
                batch_size=len(batch.target_valid) // self.optim.accumulate,
                accumulate=self.optim.accumulate,
                crop=(height, width),
                recompute=self.run.recompute_blocks,
                where=f"step {step + 1} on {self.device}",
            ) from error

    def save(self, final: bool = False) -> None:
        """Write a checkpoint of the finished steps; a final one must succeed, whatever the options."""
        self.at(f"saving step {self.done}")
        score = self.scores.miou if self.scores is not None else None
        self.store.save(self.done, self._state(), config=self.config, meta=self.meta, score=score, final=final)
        self._saved = self.done
        self.log.restart_clock()

    def _judge(self, row: dict[str, Any]) -> None:
        """End a run whose steps are skipped again and again; the same on every rank."""
        if row["skipped"] >= self.done and self.done >= 2:
            raise self.ranks.common(
                UserError(
                    f"the gradient was not finite in any of the first {self.done} steps: lower --optim.lr (it is "
                    f"{self.optim.lr})"
                )
            )
        if 0 < self.guarded.abort_after <= row["skipped_in_row"]:
            good = self.store.latest()
            follow = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise self.ranks.common(
                UserError(
                    f"{row['skipped_in_row']} steps in a row were skipped (--guard.abort_after "
                    f"{self.guarded.abort_after}), up to step {self.done}, because their loss or gradient was not "
                    f"finite or a spike: {follow}; lower --optim.lr (it is {self.optim.lr}) or look at the data, then "
                    f"continue with --resume {self.run.dir}"
                )
            )

    def _end_of_loader(self, death: LoaderDied) -> UserError:
        """Saves what no checkpoint holds yet; the sentence that ends the run."""
        resume, saved = f"--resume {self.run.dir}", self._saved
        if self.done == 0:
            return UserError(f"{death.what}; no step was done yet: {death.cure}, then start again with {resume}")
        if self.ranks.world > 1:  # the others have begun the next step, and a checkpoint needs them
            return UserError(
                f"{death.what}: {death.cure}, then continue with {resume}, which starts from the last checkpoint "
                f"(step {saved})"
            )
        try:
            if saved != self.done:
                self.save(final=True)
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
        if "window" in state:
            state["window"] = {str(self.ranks.rank): branch.log.window()}
        branch.store.save(self.done, state, config=self.config, meta=self.meta, final=True)
        branch.store.wait()
        self.log.restart_clock()

    def _evaluate(self) -> None:
        """Scores of the student; every rank judges its share of the images.

        Raises:
            _StopHere: a stop was agreed on meanwhile; nothing has been written.
        """
        if self.evaluate is None:
            return
        self.at(f"evaluation after step {self.done}")
        self.scores = self.evaluate(self.wrapped.student(), self._after_image)
        self.log.evaluation(self.done, self.scores.miou, self.scores.per_class)

    def _after_image(self) -> None:
        self.at(f"evaluation after step {self.done}")
        name = self.vote()
        if name is not None:
            raise _StopHere(name)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; loading writes into these very tensors."""
        rank, several = str(self.ranks.rank), self.ranks.world > 1
        return {
            "nets": {name: net.state_dict() for name, net in self.method.saved().items()},
            "optimizer": optimizer_state(self.optimizer),
            "guard": self.guard.state(),
            "log": self.log.state_dict(),
            "progress": {"step": self.done, "seconds": self.seconds, "evaluated": self._evaluated},
            "rng": {rank: rng_state(self.device)},
            **({"window": {rank: self.log.window()}} if several else {}),
        }

    def _take(self, state: dict[str, Any]) -> None:
        """Go on from a state whose tensors have been loaded in place."""
        rank, progress = str(self.ranks.rank), state["progress"]
        self.done, self.seconds = int(progress["step"]), float(progress["seconds"])
        self._evaluated = self.done if progress["evaluated"] is None else int(progress["evaluated"])
        self._saved = self.done
        if "skipped" in progress:
            self.guard.skipped.fill_(int(progress["skipped"]))
        set_rng_state(state["rng"][rank], self.device)
        self.method.refresh()
        self.log.load_state_dict(state["log"], state.get("window", {}).get(rank))
        self.log.truncate(self.done)
