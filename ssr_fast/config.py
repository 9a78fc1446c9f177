"""The configuration of a run: the components' own dataclasses, composed, and what they must satisfy together."""

from dataclasses import dataclass, field

from ssr_fast.data.loader import DataConfig
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.parallel import SHARDED, ParallelConfig
from ssr_fast.engine.ranks import launched
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step_guard import GuardConfig
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.methods.method import METHODS, MethodConfig
from ssr_fast.methods.self_training import SelfTrainingConfig
from ssr_fast.methods.source_free import SourceFreeConfig
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.sam import SamConfig
from ssr_fast.models.segmentor import ModelConfig


@dataclass(kw_only=True)
class TrainConfig:
    """Everything that `python -m ssr_fast.train` can be told; a preset is a function that returns one."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run: where, how long, how often."""
    data: DataConfig = field(default_factory=DataConfig)
    """Source, target and evaluation data and their sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """How it is trained."""
    self_training: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    """Teacher, pseudo-labels and mixing; for the methods self_training and ssr."""
    ssr: SsrConfig = field(default_factory=SsrConfig)
    """The regulariser; for the method ssr."""
    source_free: SourceFreeConfig = field(default_factory=SourceFreeConfig)
    """Source model, teacher and contrast; for the method source_free."""
    sam: SamConfig = field(default_factory=SamConfig)
    """The regulariser's frozen encoder; for the method ssr."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Which steps are skipped, and when a run gives up."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How images are seen at evaluation."""

    def stages(self) -> tuple[str, ...]:
        """Methods that this run trains one after another, each from the same start."""
        return self.run.stages or (self.method.name,)

    def reads_source(self) -> bool:
        """Whether any stage needs source images."""
        return any(stage != "source_free" for stage in self.stages())

    def reads_segments(self) -> bool:
        """Whether any stage needs the target's segment maps."""
        return "source_free" in self.stages() and self.source_free.uses_segments()

    def reads_features(self) -> tuple[str, ...]:
        """Domains whose stored features are read."""
        if "ssr" not in self.stages() or self.sam.features != "cached_full":
            return ()
        return ("source", "target") if self.sam.mixed == "composed" else ("source",)


# Sections that only some methods read: an option of theirs given for another method would be ignored in silence.
SECTIONS_OF = {
    "model": ("supervised", "self_training", "ssr"),
    "self_training": ("self_training", "ssr"),
    "ssr": ("ssr",),
    "sam": ("ssr",),
    "source_free": ("source_free",),
}


def problems(config: TrainConfig, explicit: frozenset[str] = frozenset()) -> list[str]:
    """Every reason why this configuration cannot be run, one sentence each; empty if it can.

    Args:
        explicit: dotted names of the options that the user gave; one that has no effect is an error.
    """
    stages = config.stages()
    found = config.run.problems("run") + config.data.problems("data", config.reads_source())
    found += config.method.problems("method") + config.optim.problems("optim")
    found += config.inference.problems("inference") + config.guard.problems("guard")
    found += config.parallel.problems("parallel")
    for stage in stages:
        if stage not in METHODS:
            found.append(f"--run.stages must hold only {', '.join(METHODS)} (it holds {stage})")
    for section, methods in SECTIONS_OF.items():
        if any(stage in methods for stage in stages):
            found += getattr(config, section).problems(section)
        else:
            found += [
                f"--{name} has no effect with --method.name {config.method.name}: leave it out"
                for name in sorted(explicit)
                if name.startswith(f"{section}.")
            ]
    return found + _contradictions(config, stages, explicit)


def _contradictions(config: TrainConfig, stages: tuple[str, ...], explicit: frozenset[str]) -> list[str]:
    """What two sections cannot both ask for."""
    found = []
    mixing = any(stage in SECTIONS_OF["self_training"] for stage in stages)
    if mixing and config.self_training.feature_distance > 0 and not config.model.weights:
        found.append(
            f"--self_training.feature_distance {config.self_training.feature_distance} measures against pretrained "
            "weights and --model.weights is not given: give them, or --self_training.feature_distance 0"
        )
    if "self_training" in stages and config.self_training.start_step >= config.run.steps:
        found.append(
            f"--self_training.start_step {config.self_training.start_step} is not below --run.steps "
            f"{config.run.steps}: pseudo-labels would never be used"
        )
    if "ssr" in stages and config.sam.features == "cached_views" and config.ssr.domains == "mixed":
        found.append(
            "--sam.features cached_views keeps features of source images and --ssr.domains mixed uses none: "
            "give --sam.features online"
        )
    found += _feature_contradictions(config, stages, explicit) + _parallel_contradictions(config, explicit)
    if "data.prefetch" in explicit and config.data.workers == 0 and config.data.loader != "dali":
        found.append(
            f"--data.prefetch {config.data.prefetch} has no effect with --data.workers 0, which reads nothing in "
            "advance: leave it out"
        )
    if config.data.evaluation is None and "run.evaluate_every" in explicit:
        found.append(
            f"--run.evaluate_every {config.run.evaluate_every} has no effect with --data.evaluation null: leave it out"
        )
    if config.data.segments and (not config.reads_segments() or config.data.scenes is not None):
        why = "are made with the scenes" if config.reads_segments() else "are read by no method here"
        found.append(f"--data.segments {config.data.segments} has no effect, segment maps {why}: leave it out")
    if "source_free" in stages:
        found += _source_free_contradictions(config, stages)
    if config.optim.warmup_steps >= config.run.steps:
        found.append(
            f"--optim.warmup_steps {config.optim.warmup_steps} is not below --run.steps {config.run.steps}: "
            "the learning rate would never reach its value"
        )
    return found


def _parallel_contradictions(config: TrainConfig, explicit: frozenset[str]) -> list[str]:
    """What one process, or a sharded network, cannot have."""
    mode, world = config.parallel.picked(launched()), launched()
    found = [
        f"--parallel.{name} {getattr(config.parallel, name)} has no effect with one process: leave it out"
        for name in ("reduce", "sync_batchnorm")
        if world == 1 and f"parallel.{name}" in explicit
    ]
    if mode in SHARDED and config.optim.fused == "apex":
        found.append(
            f"--optim.fused apex knows no shards, which --parallel.mode {mode} makes: give --optim.fused torch"
        )
    if world > 1 and config.run.device.startswith("cuda:"):
        found.append(
            f"--run.device {config.run.device} is one GPU and torchrun has started {world} processes, each of which "
            "takes that of its number: give --run.device cuda"
        )
    return found


def _feature_contradictions(config: TrainConfig, stages: tuple[str, ...], explicit: frozenset[str]) -> list[str]:
    """What stored features cannot be had together with."""
    found = []
    sam, domains, read = config.sam, config.ssr.domains, config.reads_features()
    for name, folder in (("source", config.data.source_features), ("target", config.data.target_features)):
        if folder and (name not in read or config.data.scenes is not None):
            why = "are made with the scenes" if name in read else f"of the {name} are read by no method here"
            found.append(f"--data.{name}_features {folder} has no effect, features {why}: leave it out")
    if "ssr" not in stages:
        return found
    if sam.mixed == "composed" and sam.features != "cached_full":
        found.append(
            f"--sam.mixed composed takes stored features and --sam.features {sam.features} stores none: give "
            "--sam.features cached_full, or --sam.mixed online"
        )
    if domains == "source" and "sam.mixed" in explicit:
        found.append(
            f"--sam.mixed {sam.mixed} has no effect with --ssr.domains source, which regularises no mixed image: "
            "leave it out"
        )
    if sam.features == "cached_full" and domains == "mixed" and sam.mixed == "online":
        found.append(
            "--sam.features cached_full stores features of unmixed images and --ssr.domains mixed uses none: give "
            "--sam.mixed composed, or --sam.features online"
        )
    if sam.features == "cached_full" and sam.encoder.startswith("vit_"):
        encodes = "the mixed images are" * sam.encodes(domains) or "the scenes are" * (config.data.scenes is not None)
        if encodes and not sam.checkpoint:
            found.append(
                f"--sam.checkpoint is missing: {encodes} encoded by --sam.encoder {sam.encoder}, which needs "
                "segment-anything's file (--sam.mixed composed encodes no mixed image)"
            )
        if sam.checkpoint and not encodes:
            found.append(
                f"--sam.checkpoint {sam.checkpoint} has no effect, all features are read from the stores: leave it out"
            )
    return found


def _source_free_contradictions(config: TrainConfig, stages: tuple[str, ...]) -> list[str]:
    """What source-free adaptation cannot have together with other sections."""
    found, trained_here = [], stages[: stages.index("source_free")].count("supervised") > 0
    if not config.source_free.model and not trained_here:
        found.append(
            "--source_free.model is missing: give the source model (a run directory, model.safetensors, or a "
            "checkpoint of another format)"
        )
    if config.source_free.model and trained_here:
        found.append(
            f"--source_free.model {config.source_free.model} contradicts the stage supervised, which trains the source "
            "model: leave one out"
        )
    if config.method.class_weight != "none" and not config.reads_source():
        found.append(
            f"--method.class_weight {config.method.class_weight} counts the source's labels, which source_free does "
            "not read: give --method.class_weight none"
        )
    if config.source_free.contrast > 0 and config.source_free.contrast_start >= config.run.steps:
        found.append(
            f"--source_free.contrast_start {config.source_free.contrast_start} is not below --run.steps "
            f"{config.run.steps}: nothing would be contrasted (--source_free.contrast 0 says so)"
        )
    return found
