"""The data of a run, and which loader reads it."""

from dataclasses import dataclass, field

from ssr_fast.data.index import DomainConfig
from ssr_fast.data.plan import SamplingConfig
from ssr_fast.data.scenes import ScenesConfig


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
    workers: int = 4
    """Processes that read samples; 0 reads in the training process."""
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
        if self.workers < 0:
            found.append(f"--{where}.workers must not be negative (it is {self.workers})")
        return found
