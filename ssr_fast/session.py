"""A run from its configuration to its report: data, stages, evaluation, pictures, the shipped model."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml
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
from ssr_fast.engine.environment import environment
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.host_memory import keep_freed_memory
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.precision import pick_precision
from ssr_fast.engine.side_by_side import share, side_by_side
from ssr_fast.engine.trainer import Branch, Trainer, pick_device
from ssr_fast.engine.wrapping import wrap
from ssr_fast.errors import UserError
from ssr_fast.eval.protocols import fitting_protocols
from ssr_fast.evaluator import Evaluator
from ssr_fast.methods.build import build_method
from ssr_fast.methods.source_free import SourceFreeConfig
from ssr_fast.models.weights import save_model
from ssr_fast.presets import ABOUT
from ssr_fast.report.page import write_report

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
        report: takes one-line messages about the data.
    """

    def __init__(
        self, config: TrainConfig, preset: str, resume: bool, command: list[str], report: Report = print
    ) -> None:
        self.config, self.preset, self.resume, self.report = config, preset, resume, report
        self.console: Console | None = None
        self.folder = Path(config.run.dir)
        self.device = pick_device(config.run.device)
        self.precision = pick_precision(config.run.precision, self.device)
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
        self.domains = open_domains(config, self.folder, report)
        self.loader = loader_of(config, self.domains, self.device)
        if command:
            self._check_stores()
            if resume:
                self._write_head(command)
        self.classes = self.domains.classes
        self.evaluator = self._evaluator()
        self.summary = self._read_summary()

    def train(self) -> dict[str, Any]:
        """Train every stage that is not finished, then write pictures, the model and the report; the summary.

        Raises:
            Stopped: a signal asked for it and the state was saved.
            UserError: data, weights or options that do not fit.
        """
        stages = self.config.stages()
        finished = [row["name"] for row in self.summary["stages"]]
        pending = [name for name in stages if STAGE_NAMES[name] not in finished]
        if self._shared_steps():
            print(f"the first {self._shared_steps()} steps of source_only and self_training are the same: trained once")
        with StopSignal() as stop:
            if self._in_processes():
                self._train_side_by_side(pending, stop)
            else:
                for name in itertools.chain(*self._chains()):
                    if name in pending:
                        self._finish_stages([self.train_stage(name, stop)])
        if len(stages) > 1:
            for file in sorted((self.folder / "models" / STAGE_NAMES[stages[-1]]).iterdir()):
                shutil.copyfile(file, self.folder / file.name)
        if not pending:
            self._write_report()
        return self.summary

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
        )

    def _in_processes(self) -> bool:
        """Whether stages train at the same time, each in a process of its own."""
        return self.device.type == "cpu" and share(len(self._chains()))[0] > 1

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
        self.summary["stages"] = sorted([*self.summary["stages"], *rows], key=lambda row: order.index(row["name"]))
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
        stage, several = STAGE_NAMES[name], len(self.config.stages()) > 1
        config, shared = self.config, self._shared_steps()
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
        wrap(method, config.run, self.precision)
        inputs = inputs_of(self.domains, features)
        store, log = self._records(stage)
        branch = None
        if shared and name == "self_training":
            branch = Branch(shared, *self._records(STAGE_NAMES["supervised"]))
        trainer = Trainer(
            method,
            lambda first, last: load(
                config.data, inputs, self.loader, config.run.seed, first, last, self.device, self.report
            ),
            self.evaluator.scores if self.domains.evaluation is not None else None,
            run=config.run,
            optim=self._optim(name),
            store=store,
            log=log,
            stop=stop,
            config=self.resolved,
            device=self.device,
            console=self.console,
            branch=branch,
            advice=self._advice(),
        )
        continues = self.resume or (shared > 0 and name == "supervised")
        with contextlib.closing(log), contextlib.closing(branch.log) if branch else contextlib.nullcontext():
            if not (continues and trainer.resume()):
                log.truncate(0)
            scores = trainer.fit()
        self.evaluator.predict_shown(method.student, self.folder / "samples" / stage)
        save_model(self.folder / "models" / stage if several else self.folder, method.student, self._meta())
        return {
            "name": stage,
            "target_miou": scores.miou if scores else None,
            "per_class": scores.per_class if scores else {},
            "seconds": trainer.seconds,
            "steps": config.run.steps,
            "seed": config.run.seed,
            "skipped_steps": int(trainer.guard.skipped),
        }

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
        store = CheckpointStore(checkpoints / stage if several else checkpoints, run.keep)
        return store, MetricLog(self.folder, stage, run.log_every, file=file)

    def _meta(self) -> dict[str, Any]:
        """What the shipped model's config.json says beside the network."""
        classes = self.classes
        return {
            "classes": {"names": list(classes.names), "colors": [list(color) for color in classes.colors]},
            "inference": plain(dataclasses.asdict(self.config.inference)),
            "resize": plain(self.evaluator.resize),
        }

    def _write_head(self, command: list[str]) -> None:
        """config.yaml and environment.json, before anything long begins."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", yaml.safe_dump(self.resolved, sort_keys=False))
            facts = {**environment(), "preset": self.preset, "command": shlex.join(command)}
            write_text(self.folder / "environment.json", json.dumps(facts, indent=1))
        except OSError as error:
            raise UserError(
                f"--run.dir {self.folder} cannot be written ({error.strerror}): give a folder that you may write to"
            ) from error

    def _check_stores(self) -> None:
        """Remember what made the stores that the run reads.

        Raises:
            UserError: a resumed run's are others than it began with, so that it would not go on as it began.
        """
        file, now = self.folder / "stores.json", self.domains.recipes()
        if not (self.resume and file.is_file()):
            write_text(file, json.dumps(now, indent=1))
            return
        began: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        for option in sorted(began.keys() | now.keys()):
            if began.get(option) != now.get(option):
                raise UserError(
                    f"--{option}: the run in {self.folder} began with {began.get(option, 'the original files')}, and "
                    f"now there is {now.get(option, 'none')}; make the store as it was, or start in a new run directory"
                )

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


def plain(value: Any) -> Any:
    """Dataclass dictionaries as JSON and YAML know them: tuples become lists, NaN becomes None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a run that was killed, never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
