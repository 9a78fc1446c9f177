"""A run from its configuration to its report: data, stages, evaluation, pictures, the shipped model."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from ssr_fast.config import TrainConfig
from ssr_fast.data.advice import Advice, advise
from ssr_fast.data.cache import Report
from ssr_fast.data.labels import ClassSet
from ssr_fast.data.loader import load
from ssr_fast.domains import inputs_of, loader_of, open_domains, stored_features
from ssr_fast.engine import fork_server
from ssr_fast.engine.apex import check_fused
from ssr_fast.engine.attention import check_attention, check_sam_attention
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.deterministic import prepare_deterministic
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.host_memory import freeze_what_stays, keep_freed_memory
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.parallel import wrap
from ssr_fast.engine.precision import pick_precision
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.run_config import pick_device
from ssr_fast.engine.side_by_side import share, side_by_side
from ssr_fast.engine.state import seed_generators
from ssr_fast.engine.trainer import Branch, Trainer
from ssr_fast.engine.watch import At, nowhere
from ssr_fast.eval.protocols import fitting_protocols
from ssr_fast.evaluator import Evaluator
from ssr_fast.methods.build import build_method
from ssr_fast.methods.source_free import SourceFreeConfig
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.weights import save_model
from ssr_fast.presets import ABOUT
from ssr_fast.report.page import write_report
from ssr_fast.run_files import check_stores, plain, write_head, write_text

STAGE_NAMES = {
    "supervised": "source_only",
    "self_training": "self_training",
    "ssr": "ssr",
    "source_free": "source_free",
}


class Session:
    """One run directory at work.

    Args:
        config: legal (config.problems is empty), with run.dir set.
        preset: name of the preset that it started from.
        resume: continue what the directory holds.
        command: how the run was started, for the report; empty for a process that trains one stage of a run.
        report: takes one-line messages.
        ranks: the processes that train together; rank 0 writes the directory, and what the others say is lost.
        at: told what the main thread is about to do, for the watch.
    """

    def __init__(
        self,
        config: TrainConfig,
        preset: str,
        resume: bool,
        command: list[str],
        report: Report = print,
        ranks: Ranks | None = None,
        at: At = nowhere,
    ) -> None:
        self.ranks, self.at = ranks or Ranks(), at
        self.config, self.preset, self.resume = config, preset, resume
        self.report = report if self.ranks.first else _nothing
        self.say: Report = print if self.ranks.first else _nothing
        self.console: Console | None = None if self.ranks.first else Console(quiet=True, force_terminal=False)
        self.folder = Path(config.run.dir)
        self.device = pick_device(config.run.device, self.ranks.local if self.ranks.world > 1 else None)
        self.precision = pick_precision(config.run.precision, self.device)
        prepare_deterministic(config.run.deterministic, self.device)  # before cuBLAS is asked for anything
        check_fused(config.optim.fused, self.device)
        check_attention(config.run.attention, config.model.backbone, self.precision, self.device)
        if "ssr" in config.stages():
            check_sam_attention(config.sam, self.precision, self.device, config.run.compile_blocks)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.resolved = plain(dataclasses.asdict(config))
        if command:
            if not resume:  # else what it began with stays, until it is sure that it goes on
                self._write_head(command)
            if self._in_processes():
                fork_server.start(__name__)  # while this process checks the data
        at("looking at the data", True)
        self.domains = self.ranks.first_then_others(lambda: open_domains(config, self.folder, self.report))
        self.loader = loader_of(config, self.domains, self.device)
        if command:
            self.ranks.on_first(lambda: check_stores(self.folder, self.domains.recipes(), resume))
            if resume:
                self._write_head(command)
        self.classes = self.domains.classes
        self.evaluator = self._evaluator()
        self.summary = self.ranks.on_first(self._read_summary)

    def train(self, stop: StopSignal | None = None) -> dict[str, Any]:
        """Train every stage that is not finished, then write pictures, the model and the report; the summary.

        Args:
            stop: the signals to this process, if it listens to them already.

        Raises:
            Stopped: a signal asked for it and the state was saved.
            UserError: data, weights or options that do not fit.
        """
        stages = self.config.stages()
        # a run may be resumed for more steps than it had
        finished = [row["name"] for row in self.summary["stages"] if row["steps"] >= self.config.run.steps]
        pending = [name for name in stages if STAGE_NAMES[name] not in finished]
        if self._shared_steps():
            self.say(
                f"the first {self._shared_steps()} steps of source_only and self_training are the same: trained once"
            )
        with StopSignal() if stop is None else contextlib.nullcontext(stop) as stop:
            if self._in_processes():
                self.at("training the stages in processes of their own", True)
                self._train_side_by_side(pending, stop)
            else:
                for name in itertools.chain(*self._chains()):
                    if name in pending:
                        row = self.train_stage(name, stop)
                        self.ranks.on_first(lambda row=row: self._finish_stages([row]))  # type: ignore[misc]
        self.ranks.on_first(lambda: self._finish(pending))
        return self.summary

    def _finish(self, pending: list[str]) -> None:
        """What is left once every stage is trained."""
        stages = self.config.stages()
        if len(stages) > 1:
            for file in sorted((self.folder / "models" / STAGE_NAMES[stages[-1]]).iterdir()):
                shutil.copyfile(file, self.folder / file.name)
        if not pending:
            self._write_report()

    def _evaluator(self) -> Evaluator:
        """What judges the stages; without labelled images it shows some of the target's."""
        config, labelled = self.config, self.domains.evaluation
        seen = config.data.evaluation or config.data.target
        return Evaluator(
            labelled,
            labelled or self.domains.target,
            config.run.samples,
            self.classes,
            config.inference,
            seen.resize,
            _protocol(self.classes, self.preset),
            self.device,
            (self.ranks.rank, self.ranks.world),
            self.ranks.sum_,
        )

    def _in_processes(self) -> bool:
        """Whether stages train at the same time, each in a process of its own."""
        alone = self.config.parallel.picked(self.ranks.world) == "single"
        return alone and self.device.type == "cpu" and share(len(self._chains()))[0] > 1

    def _shared_steps(self) -> int:
        """Number of first steps that source-only training has in common with self-training; they are trained once."""
        run, stages = self.config.run, self.config.stages()
        steps = self.config.self_training.supervised_steps()
        return steps if {"supervised", "self_training"} <= set(stages) and 0 < steps < run.steps else 0

    def _chains(self) -> list[list[str]]:
        """The stages, those together that one process has to train in this order."""
        stages = list(self.config.stages())
        together = ["self_training", "supervised"] if self._shared_steps() else ["supervised"]
        if self._trains_source_model():
            together.append("source_free")
        if len(together) == 1:
            return [[name] for name in stages]
        return [together, *([name] for name in stages if name not in together)]

    def _trains_source_model(self) -> bool:
        """Whether the supervised stage trains what the source-free stage starts from."""
        return {"supervised", "source_free"} <= set(self.config.stages())

    def _train_side_by_side(self, pending: list[str], stop: StopSignal) -> None:
        """The stages in processes of their own, the last one, which takes longest, first.

        The number of threads follows from all stages, so that a resumed run adds in the same order.
        """
        chains = self._chains()
        at_once, threads = share(len(chains))
        print(f"{len(self.config.stages())} stages, {at_once} at a time with {threads} thread(s) each")
        left = [[name for name in chain if name in pending] for chain in reversed(chains)]
        jobs = [
            (" and ".join(STAGE_NAMES[name] for name in chain), (self.config, self.preset, self.resume, chain))
            for chain in left
            if chain
        ]
        for _, rows in side_by_side(_stages_process, jobs, at_once, threads, stop):
            self._finish_stages(rows)

    def _finish_stages(self, rows: list[dict[str, Any]]) -> None:
        """Summary, pictures and report of all stages so far, so that a long comparison can be looked at on the way."""
        order = [STAGE_NAMES[name] for name in self.config.stages()]
        names = [row["name"] for row in rows]
        before = [row for row in self.summary["stages"] if row["name"] not in names]
        self.summary["stages"] = sorted([*before, *rows], key=lambda row: order.index(row["name"]))
        write_text(self.folder / "summary.json", json.dumps(plain(self.summary), indent=1))
        for row in rows:
            score = "" if row["target_miou"] is None else f"target mIoU {row['target_miou']:.1f} after "
            print(f"{row['name']}: {score}{row['steps']} steps in {row['seconds']:.0f} s")
        self._write_report()

    def _write_report(self) -> None:
        stages = [row["name"] for row in self.summary["stages"]]
        self.evaluator.write_comparisons(self.folder / "samples", stages)
        write_report(self.folder)

    def train_stage(self, name: str, stop: StopSignal) -> dict[str, Any]:
        """Train the stage of a method; its row of the summary.

        Raises:
            Stopped, UserError: see `train`.
        """
        stage, config, shared = STAGE_NAMES[name], self.config, self._shared_steps()
        freeze_what_stays()
        seed_generators(config.run.seed, self.ranks.rank)
        features, stored = None, None
        if name == "ssr" and self.domains.features is not None:
            features, stored = stored_features(config, self.domains, self.device)
        method = build_method(
            name,
            method=config.method,
            model=config.model,
            self_training=config.self_training,
            ssr=config.ssr,
            source_free=self._source_free(),
            sam=config.sam,
            classes=self.classes,
            counts=self.domains.source_counts(),
            seed=config.run.seed,
            device=self.device,
            stored=stored,
        )
        shares = config.optim.accumulate
        wrapped = wrap(method, config.run, self.precision, config.parallel, self.ranks, shares)
        inputs = inputs_of(self.domains, features, self.ranks.rank, self.ranks.world)
        data = dataclasses.replace(config.data, batch_size=config.data.batch_size * shares)
        store, log = self._records(stage)
        branch = None
        if shared and name == "self_training":
            branch = Branch(shared, *self._records(STAGE_NAMES["supervised"]))
        trainer = Trainer(
            wrapped,
            lambda first, last: load(data, inputs, self.loader, config.run.seed, first, last, self.device, self.report),
            self.evaluator.scores if self.domains.evaluation is not None else None,
            run=config.run,
            optim=self._optim(name),
            store=store,
            log=log,
            stop=stop,
            config=self.resolved,
            device=self.device,
            guard=config.guard,
            meta=self._meta(),
            report=self.say,
            console=self.console,
            branch=branch,
            advice=self._advice(),
            ranks=self.ranks,
            at=self.at,
        )
        continues = self.resume or (shared > 0 and name == "supervised")
        with contextlib.closing(log), contextlib.closing(branch.log) if branch else contextlib.nullcontext():
            if not (continues and trainer.resume()):
                log.truncate(0)
            scores = trainer.fit()
        self.at(f"shipping the model of {stage}")
        student = wrapped.student()
        self.ranks.on_first(lambda: self._ship(student, stage))
        return {
            "name": stage,
            "target_miou": scores.miou if scores else None,
            "per_class": scores.per_class if scores else {},
            "seconds": trainer.seconds,
            "steps": config.run.steps,
            "seed": config.run.seed,
            "skipped_steps": int(trainer.guard.skipped),
        }

    def _ship(self, student: Segmentor, stage: str) -> None:
        """A stage's predictions for the report, and its model."""
        self.evaluator.predict_shown(student, self.folder / "samples" / stage)
        several = len(self.config.stages()) > 1
        save_model(self.folder / "models" / stage if several else self.folder, student, self._meta())

    def _advice(self) -> Advice:
        """What makes this run's loader faster, for the warning that a stage waits for it."""
        data, domains = self.config.data, self.domains
        indices = [index for index in (domains.source, domains.target) if index is not None]
        _, cores = share(len(self._chains()) if self._in_processes() else 1)
        return advise(
            workers=data.workers,
            cores=cores,
            batch_size=data.batch_size,
            images=tuple(len(index.samples) for index in indices),
            cached=data.cache,
            dali=self.loader.name == "dali",
            from_files=data.scenes is None and any(index.layout.store is None for index in indices),
        )

    def _optim(self, name: str) -> OptimConfig:
        """The optimiser's options for the stage of a method."""
        factor = self.config.source_free.lr_factor if name == "source_free" else 1.0
        return dataclasses.replace(self.config.optim, lr=self.config.optim.lr * factor)

    def _source_free(self) -> SourceFreeConfig:
        """The options of source-free adaptation, with the source model that this run has trained where it does."""
        config = self.config.source_free
        if not self._trains_source_model():
            return config
        return dataclasses.replace(config, model=str(self.folder / "models" / STAGE_NAMES["supervised"]))

    def _records(self, stage: str) -> tuple[CheckpointStore, MetricLog]:
        """Where a stage's checkpoints and metrics go."""
        several, run = len(self.config.stages()) > 1, self.config.run
        checkpoints = self.folder / "checkpoints"
        file = f"metrics-{stage}.jsonl" if several else "metrics.jsonl"
        store = CheckpointStore(
            checkpoints / stage if several else checkpoints,
            run.keep,
            background=True,
            report=self.say,
            ranks=self.ranks,
            on_error=run.on_save_error,
        )
        return store, MetricLog(self.folder, stage, run.log_every, self.say, file, self.ranks)

    def _meta(self) -> dict[str, Any]:
        """What the shipped model's config.json says beside the network."""
        classes = self.classes
        return {
            "classes": {"names": list(classes.names), "colors": [list(color) for color in classes.colors]},
            "inference": plain(dataclasses.asdict(self.config.inference)),
            "resize": plain(self.evaluator.resize),
        }

    def _write_head(self, command: list[str]) -> None:
        self.ranks.on_first(lambda: write_head(self.folder, self.resolved, self.preset, command, self.ranks.world))

    def _read_summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        if self.resume and path.is_file():
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return summary
        classes = self.classes
        return {
            "preset": self.preset,
            "title": f"{self.preset}: {self.domains}",
            "about": ABOUT.get(self.preset, ""),
            "protocol": self.evaluator.protocol,
            "classes": {"names": list(classes.names), "colors": [list(color) for color in classes.colors]},
            "stages": [],
        }


def _nothing(line: str) -> None:
    """Where the lines of the other ranks go: they are those of rank 0."""


def _stages_process(config: TrainConfig, preset: str, resume: bool, names: list[str]) -> list[dict[str, Any]]:
    """What a process of a side-by-side run does: stages one after another, with plain lines instead of a bar."""
    with StopSignal() as stop:
        session = Session(config, preset, resume, [], report=lambda line: None)
        session.console = Console(force_terminal=False)
        return [session.train_stage(name, stop) for name in names]


def _protocol(classes: ClassSet, preset: str) -> str:
    """The published protocol of a benchmark preset, else all classes."""
    fitting = fitting_protocols(classes.names)
    return "synthia16" if preset == "synthia-cityscapes" and "synthia16" in fitting else fitting[0]
