"""One setting of `python -m bench overhead` in processes of its own: `python -m bench.overhead_run RESULT < JOB`.

Started once a rank, with torchrun's variables for several. Rank 0 writes what it measured, or what went wrong, to the
file RESULT. Job and result are JSON.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch.optim import AdamW

from bench.harness import describe
from ssr_fast.config import TrainConfig, problems
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.ranks import Ranks, join
from ssr_fast.engine.step_guard import StepGuard, _Averaged
from ssr_fast.engine.trainer import Trainer
from ssr_fast.engine.vote import Vote
from ssr_fast.engine.watch import At, Watch, nowhere
from ssr_fast.presets import demo
from ssr_fast.session import Session

Changes = dict[tuple[type, str], Callable[..., Any]]
"""New methods by class and name."""
WARM_UP = 3
"""Steps at the begin of each training that do not count."""
SAVES = 5
"""Saves in a training whose parts are timed; the first one, which imports and allocates, is not counted in."""
EACH_STEP = {
    "guard: buffers remembered": (StepGuard, "before_forward"),
    "guard: buffers between shares": (StepGuard, "next_share"),
    "guard: norm of the gradient": (StepGuard, "_norm"),
    "guard: means over shares and ranks": (_Averaged, "finish"),
    "guard: buffers put back": (StepGuard, "_put_back"),
    "guard: the rest of its step": (StepGuard, "step"),
    "vote on a stop": (Vote, "__call__"),
    "optimiser": (AdamW, "step"),
    "log": (MetricLog, "add"),
}
"""Parts of a step by the method that does them; none counts what another one does inside of it."""
EACH_SAVE = {"save: state gathered": (Trainer, "_state"), "save: copied, handed over": (CheckpointStore, "save")}
WATCHED, WATCHING, WRITING = "watch: told where it is", "watch: its threads' CPU time", "save: its thread's CPU time"
NOT_COUNTED = ("optimiser", "log")


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        steps: of each training.
        rounds: trainings with and without.
        save_every: steps between checkpoints.
        shares: micro-batches of a step; its images stay the same.
        spikes: whether the guard judges spikes.
        scene: height and width of a few scenes instead of the demo's own; None: those.
        folder: for the run directory.
    """

    steps: int
    rounds: int
    save_every: int
    shares: int
    spikes: bool
    scene: tuple[int, int] | None
    folder: str

    def config(self) -> TrainConfig:
        """The demo, its method ssr, evaluated once.

        Raises:
            ValueError: the options do not fit.
        """
        config = demo()
        start = config.self_training.start_step * self.steps // config.run.steps
        config.self_training = dataclasses.replace(config.self_training, start_step=start)
        config.run.stages, config.run.steps, config.run.dir = None, self.steps, self.folder
        config.run.evaluate_every, config.run.save_every, config.run.samples = self.steps, self.save_every, 1
        config.run.device, config.run.precision = "cpu", "fp32"
        assert config.data.scenes is not None
        config.data.scenes = dataclasses.replace(config.data.scenes, evaluation_count=1)
        if self.scene is not None:
            height, width = config.data.crop = self.scene
            few = {"height": height, "width": width, "source_count": 8, "target_count": 8}
            config.data.scenes = dataclasses.replace(config.data.scenes, **few)
        config.optim.warmup_steps = min(config.optim.warmup_steps, self.steps - 1)
        config.optim.accumulate = self.shares
        config.data.batch_size //= self.shares
        config.guard.spike_sigmas = 6.0 if self.spikes else 0.0
        if found := problems(config):
            raise ValueError("; ".join(found))
        return config


class Clock:
    """Seconds of the main thread by part, each without the parts inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """Of each part: one sum a step."""
        self.background: list[float] = []
        """CPU seconds of a part that ran in another thread, of each of its runs."""
        self._now: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as the part."""

        @functools.wraps(function)  # torch wraps what lacks the mark of its hooks
        def call(*arguments: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter() - started
                self._now[name] += elapsed - self._inside.pop()
                self._inside[-1] += elapsed

        return call

    def elsewhere(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose CPU time counts where it does not run in the main thread."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                if threading.current_thread() is not threading.main_thread():
                    self.background.append(time.thread_time() - started)

        return call

    def next_step(self) -> None:
        """A step begins."""
        for name in (*EACH_STEP, *EACH_SAVE, WATCHED):
            self.seconds[name].append(self._now[name])
        self._now.clear()


class Loop:
    """When each step of a training began, by the wall and by the CPU clocks: of all threads, the main, the watch's."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.main: list[float] = []
        self.watch: list[float] = []

    def next_step(self) -> None:
        """A step begins."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.main.append(time.thread_time())
        self.watch.append(_watch_seconds())

    def per_step(self, marks: list[float]) -> float:
        """Mean seconds of a step, from the first that counts to the begin of the last."""
        return (marks[-1] - marks[WARM_UP]) / (len(marks) - 1 - WARM_UP)


def _watch_seconds() -> float:
    """CPU seconds so far of the threads of the watch."""
    clocks = [thread.ident for thread in threading.enumerate() if thread.name.startswith("watch")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in clocks if ident is not None)


@contextlib.contextmanager
def _replaced(changes: Changes) -> Iterator[None]:
    """Methods replaced in their classes while the body runs."""
    with contextlib.ExitStack() as stack:
        for (owner, name), function in changes.items():
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def bare() -> Changes:
    """What makes a training loop of ours one without guard, vote and checkpoints but the last."""
    save = Trainer.save

    def step(guard: StepGuard, loss: Any = None) -> None:
        optimizer: Any = guard._optimizer
        optimizer.found_inf = optimizer.grad_scale = None
        optimizer.step()

    return {
        (StepGuard, "before_forward"): lambda guard: None,
        (StepGuard, "next_share"): lambda guard: None,
        (StepGuard, "step"): step,
        (Vote, "__call__"): lambda vote: None,
        (Trainer, "save"): lambda trainer, final=False: save(trainer, final) if final else None,
    }


def clocked(clock: Clock) -> Changes:
    """What times the parts of a training."""
    AdamW([torch.zeros(1)])  # the first one wraps its class's step with hooks, which are part of the optimiser
    changes = {place: clock.timed(name, getattr(*place)) for name, place in {**EACH_STEP, **EACH_SAVE}.items()}
    return {**changes, (CheckpointStore, "_write"): clock.elsewhere(CheckpointStore._write)}


class Measurement:
    """The trainings of a job, in a process that has joined the others."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self.session = Session(job.config(), "demo", False, [], report=lambda line: None, ranks=ranks)
        self.session.say, self.session.console = self.session.report, Console(quiet=True)

    def train(self, name: str, changes: Changes, clock: Clock | None) -> Loop:
        """One training; `name` is its folder. Without a watch if it is the bare one."""
        loop, train_step = Loop(), Trainer.train_step

        def begin(trainer: Trainer, *arguments: Any) -> Any:
            loop.next_step()
            if clock is not None:
                clock.next_step()
            return train_step(trainer, *arguments)

        session, timeout = self.session, self.session.config.parallel.hang_timeout
        watch = Watch(self.ranks, timeout=timeout, resume="") if name.startswith(("with-", "clocked")) else None
        session.folder = Path(self.job.folder, name)
        with (
            _replaced({**changes, (Trainer, "train_step"): begin}),
            StopSignal() as stop,
            watch or contextlib.nullcontext(),
        ):
            at: At = watch.at if watch is not None else nowhere
            session.at = at if clock is None else clock.timed(WATCHED, at)
            session.train_stage("ssr", stop)
        gc.collect()
        return loop

    def parts(self) -> dict[str, Any]:
        """A training whose parts are timed: seconds by part of each step, and of each save."""
        clock, run = Clock(), self.session.config.run
        run.save_every = min(self.job.save_every, max(1, self.job.steps // (SAVES + 1)))
        loop = self.train("clocked", clocked(clock), clock)
        run.save_every = self.job.save_every
        counted = slice(WARM_UP + 1, None)  # what is noted at the begin of a step is that of the step before
        # the last save comes after the begin of the last step, so that no part of it is noted
        saves = {name: [seconds for seconds in clock.seconds[name] if seconds > 0] for name in EACH_SAVE}
        return {
            "steps": [after - before for before, after in itertools.pairwise(loop.wall[WARM_UP:])],
            "each_step": {name: clock.seconds[name][counted] for name in (*EACH_STEP, WATCHED)},
            "step_cpu": loop.per_step(loop.main),
            "watching": loop.per_step(loop.watch),
            "each_save": {**saves, WRITING: clock.background},
        }

    def pair(self, number: int) -> dict[str, float]:
        """Seconds of a step with guard and checkpoints, and without."""
        found: dict[str, float] = {}
        kinds: list[tuple[str, Changes]] = [("with", {}), ("without", bare())]
        for kind, changes in kinds if number % 2 == 0 else kinds[::-1]:
            loop = self.train(f"{kind}-{number}", changes, None)
            found |= {kind: loop.per_step(loop.wall), f"{kind}_cpu": loop.per_step(loop.cpu)}
        return found


def measure(job: Job) -> dict[str, Any]:
    """All of a job: {"parts": see there, "pairs": one a round}."""
    torch.set_num_threads(1)
    ranks = join("cpu")
    measurement = Measurement(job, ranks)
    parts = measurement.parts()
    result = {"parts": parts, "pairs": [measurement.pair(number) for number in range(job.rounds)]}
    ranks.close()
    return result


def main() -> int:
    """Run the job of standard input; the exit code."""
    status = 0
    job = json.load(sys.stdin)
    result: dict[str, Any]
    try:
        result = measure(Job(**{**job, "scene": job["scene"] and tuple(job["scene"])}))
    except Exception as error:  # the parent shows it, and the other settings still run
        result = {"error": describe(error)}
        status = 1
    if os.environ.get("RANK", "0") == "0" or status:
        Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
