"""The data of a run, and which loader reads it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ssr_fast.data.batch import Batch, batch_of
from ssr_fast.data.dali_loader import load_dali, not_supported_reasons
from ssr_fast.data.dali_samples import DaliSamples, unsuitable
from ssr_fast.data.features import FeatureStore
from ssr_fast.data.index import DomainConfig, Index
from ssr_fast.data.plan import Plan, SamplingConfig
from ssr_fast.data.residents import Residents
from ssr_fast.data.scenes import ScenesConfig
from ssr_fast.data.segments import SegmentStore
from ssr_fast.data.store import ImageStore
from ssr_fast.data.torch_loader import StepDataset, load_steps
from ssr_fast.errors import UserError

LOADERS = ("auto", "torch", "dali")


@dataclass(kw_only=True)
class DataConfig:
    """The data of a run; the options `--data.*`."""

    source: DomainConfig = field(default_factory=DomainConfig)
    """Labelled images to learn from."""
    target: DomainConfig = field(default_factory=DomainConfig)
    """Unlabelled images to adapt to."""
    evaluation: DomainConfig | None = field(default_factory=lambda: DomainConfig(split="val"))
    """Labelled target images that only the evaluation sees; null if there are none: the run then has no scores."""
    scenes: ScenesConfig | None = None
    """Draw procedural scenes in the run directory instead of reading source, target and evaluation."""
    crop: tuple[int, int] = (512, 512)
    """Height and width of a training crop in pixels; smaller images are padded."""
    batch_size: int = 2
    """Images a domain in one step of one process."""
    loader: str = "auto"
    """torch (PyTorch's DataLoader), dali (NVIDIA DALI, for prepared stores: it decodes, flips and normalises on the
    device) or auto: dali on a GPU where it can be had, else torch; a line says why."""
    workers: int = 4
    """Processes that read samples; 0 reads in the training process."""
    prefetch: int = 4
    """Batches that each worker (dali: the pipeline) makes in advance."""
    cache: bool = False
    """Keep decoded images and labels in memory (each worker keeps its own): for data sets of a few hundred images."""
    segments: str = ""
    """Segment store of the target set, made by `python -m ssr_fast.prepare masks`, for a method that learns from
    segments; empty: those in a prepared store, else the folder `segments` in the target set's root."""
    source_features: str = ""
    """Feature store of the source set, made by `python -m ssr_fast.prepare features`, for --sam.features cached_full;
    empty: the folder `features` in the source set's root."""
    target_features: str = ""
    """The same of the target set, for --sam.mixed composed."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How samples are drawn."""

    def problems(self, where: str, reads_source: bool = True) -> list[str]:
        """Sentences about illegal values; empty if all is well.

        Args:
            where: prefix of the options' names.
            reads_source: whether the methods learn from a source.
        """
        found = self.sampling.problems(f"{where}.sampling")
        if self.scenes is not None:
            found += self.scenes.problems(f"{where}.scenes")
        for name in ("source", "target", "evaluation"):
            domain: DomainConfig | None = getattr(self, name)
            if domain is None:
                continue
            found += domain.problems(f"{where}.{name}")
            if self.scenes is not None and domain.root:
                found.append(
                    f"--{where}.{name}.root {domain.root} contradicts --{where}.scenes, which draws the data: "
                    f"leave one out (--{where}.scenes null reads from folders; the preset `folder` is made for that)"
                )
            missing = self.scenes is None and not domain.root
            if missing and (reads_source or name != "source"):
                without = f", or --{where}.evaluation null to train without scores" if name == "evaluation" else ""
                found.append(f"--{where}.{name}.root is missing: give the folder of the {name} data set{without}")
        if self.source.root and not reads_source:
            found.append(
                f"--{where}.source.root {self.source.root} has no effect with --method.name source_free, which reads "
                "no source data: leave it out"
            )
        if min(self.crop) < 32:
            found.append(f"--{where}.crop must be at least 32 32 (it is {self.crop[0]} {self.crop[1]})")
        if self.batch_size < 1:
            found.append(f"--{where}.batch_size must be at least 1 (it is {self.batch_size})")
        if self.loader not in LOADERS:
            found.append(f"--{where}.loader must be one of {', '.join(LOADERS)} (it is {self.loader})")
        if self.prefetch < 1:
            found.append(f"--{where}.prefetch must be at least 1 (it is {self.prefetch})")
        if self.workers < 0:
            found.append(f"--{where}.workers must not be negative (it is {self.workers})")
        return found


@dataclass(frozen=True)
class Inputs:
    """What a loader reads, and for which of how many processes; arguments as of StepSamples."""

    source: Index | None
    target: Index
    segments: SegmentStore | ImageStore | None = None
    source_features: FeatureStore | Residents | None = None
    target_features: FeatureStore | Residents | None = None
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Choice:
    """A loader's `name`, torch or dali, and the `reason` in words."""

    name: str
    reason: str


def choose_loader(
    config: DataConfig, source: Index | None, target: Index, device: torch.device, pixels: bool
) -> Choice:
    """The loader of a run.

    Args:
        config: legal.
        source, target: the data sets; None for a source that is not read.
        device: that trains.
        pixels: whether anything needs images as the bytes that they are, which DALI hands over normalised.

    Raises:
        UserError: DALI is asked for and cannot be had, with all reasons.
    """
    if config.loader == "torch":
        return Choice("torch", "as asked for")
    if config.loader == "auto" and device.type != "cuda":
        return Choice("torch", "there is no GPU for DALI to work on")
    reasons = not_supported_reasons(device)
    domains = (("source", source, config.source), ("target", target, config.target))
    for name, index, domain in domains:
        found = unsuitable(index, domain.resize, f"data.{name}") if index is not None else None
        reasons += [found] if found else []
    if pixels:
        reasons.append("--sam.features cached_views compares pixels, and DALI hands over normalised images")
    if config.cache:
        reasons.append("--data.cache true keeps decoded images, and DALI decodes each anew")
    if config.loader == "dali":
        if reasons:
            raise UserError(f"--data.loader dali cannot be had: {', and '.join(reasons)}; give --data.loader torch")
        return Choice("dali", "as asked for")
    return Choice("torch", reasons[0]) if reasons else Choice("dali", "there is a GPU, and the data is prepared")


def load(
    config: DataConfig,
    inputs: Inputs,
    choice: Choice,
    seed: int,
    first: int,
    last: int,
    device: torch.device,
    report: Callable[[str], None],
) -> Iterator[Batch]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers and the loader.

    Args:
        config: legal.
        inputs: what is read.
        choice: of choose_loader.
        seed: of the run.
        device: for which batches are made; torch leaves them on the host, page-locked for a GPU.
        report: takes a line on the loader and what its queues hold.

    Raises:
        UserError: a sample cannot be read, or a process of the loader died.
    """
    boxes = config.source.resize, config.target.resize
    plan = Plan(seed, inputs.source, inputs.target, *boxes, config.crop, config.batch_size, config.sampling)
    if choice.name == "dali":
        samples = DaliSamples(plan, **vars(inputs))
        found = load_dali(
            samples,
            first,
            last,
            device=device,
            workers=config.workers,
            queue=config.prefetch,
            report=lambda line: report(f"loader: dali ({choice.reason}), {line}"),
        )
        with contextlib.closing(found):
            for parts in found:
                yield batch_of(parts, config.crop)
        return
    dataset = StepDataset(plan, **vars(inputs), cache=config.cache)
    pin = device.type == "cuda"
    with contextlib.closing(load_steps(dataset, first, last, config.workers, pin, config.prefetch)) as batches:
        for number, batch in enumerate(batches):
            if number == 0:
                report(_queues(batch, choice, config))
            yield batch


def _queues(batch: Batch, choice: Choice, config: DataConfig) -> str:
    """What the torch loader holds, in a line."""
    size = sum(part.nbytes for part in batch.parts().values()) / 1e6
    line = f"loader: torch ({choice.reason})"
    if config.workers == 0:
        return f"{line}, in the training process, a batch of {size:.1f} MB at a time"
    count = config.workers * config.prefetch
    return (
        f"{line}, {config.workers} processes, up to {count} batches of {size:.1f} MB in advance ({count * size:.0f} MB)"
    )
