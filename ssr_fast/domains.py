"""The data of a run: source, target and evaluation, their segments and features, and the batches of its steps."""

import dataclasses
import functools
from pathlib import Path

import torch

from ssr_fast.config import TrainConfig
from ssr_fast.data.cache import Report
from ssr_fast.data.feature_jobs import make_features
from ssr_fast.data.feature_map import grid_of
from ssr_fast.data.features import FeatureShape, FeatureStore, create_features, open_features
from ssr_fast.data.index import DomainConfig, Index, build_index, total_counts
from ssr_fast.data.labels import ClassSet
from ssr_fast.data.loader import Choice, Inputs, choose_loader
from ssr_fast.data.residents import Residents, read_residents
from ssr_fast.data.scenes import write_scenes
from ssr_fast.data.segment_jobs import Task, make_maps
from ssr_fast.data.segments import SegmentStore, create_store, open_store
from ssr_fast.data.store import ImageStore
from ssr_fast.data.store_index import require_originals
from ssr_fast.data.stores import Store
from ssr_fast.data.superpixels import SuperpixelConfig, Superpixels
from ssr_fast.engine.run_config import pick_device
from ssr_fast.errors import UserError
from ssr_fast.methods.ssr import StoredFeatures
from ssr_fast.models.feature_maps import build_map_encoder, check_recipe, recipe
from ssr_fast.models.resident_features import ResidentFeatures
from ssr_fast.shipped import open_model

SCENE_SUPERPIXELS = SuperpixelConfig(scale=60.0, sigma=1.0)
"""Segments of scenes: small noisy pictures, which the defaults, chosen on photographs, would cut into 300 crumbs."""


@dataclasses.dataclass(frozen=True)
class Features:
    """The stored features that a run reads; `target` is None where only the source's are read."""

    source: FeatureStore | Residents
    target: FeatureStore | Residents | None
    shape: FeatureShape


@dataclasses.dataclass(frozen=True)
class Domains:
    """What open_domains gives.

    Attributes:
        source: None where no stage reads it.
        target: without its labels.
        evaluation: target images with labels; None where the run has none.
        classes: what the networks tell apart.
        segments: the target's segment maps; None where no stage reads them.
        features: stored features of the frozen encoder; None where no stage reads them.
    """

    source: Index | None
    target: Index
    evaluation: Index | None
    classes: ClassSet
    segments: SegmentStore | ImageStore | None
    features: Features | None

    def source_counts(self) -> list[int]:
        """Source pixels of each class; empty without a source."""
        return [] if self.source is None else [int(count) for count in total_counts(self.source.samples)]

    def recipes(self) -> dict[str, str]:
        """What made each store whose content cannot be had again from the originals, by the option that names it."""
        stores: dict[str, object] = {"data.segments": self.segments}
        if self.features is not None:
            stores |= {"data.source_features": self.features.source, "data.target_features": self.features.target}
        kept = {option: store for option, store in stores.items() if isinstance(store, Store)}
        found = {option: str(store.recipe) for option, store in kept.items()}
        for name, index in {"source": self.source, "target": self.target}.items():
            store = index.layout.store if index is not None else None
            if store is not None and store.is_jpeg:  # pixels of their own; those of a raw store are the originals'
                found[f"data.{name}.root"] = str(store.recipe)
        if isinstance(self.segments, ImageStore):
            found["data.segments"] = str(self.segments.recipe.options["segments"])
        return found

    def __str__(self) -> str:
        indices = {"source": self.source, "target": self.target, "evaluation": self.evaluation}
        return ", ".join(f"{len(index.samples)} {name}" for name, index in indices.items() if index) + " images"


def open_domains(config: TrainConfig, folder: Path, report: Report) -> Domains:
    """Check the data sets, or draw the scenes and check them like any other.

    Args:
        config: the run's.
        folder: of the run, in which scenes are drawn.
        report: takes one-line messages.

    Raises:
        UserError: data that cannot be used, source and evaluation of different classes, or a source model that cannot
            be read and has to name the classes, because no data does.
    """
    data = config.data
    wanted = {"source": data.source, "target": data.target}
    if data.evaluation is not None:
        wanted["evaluation"] = data.evaluation
    if data.scenes is not None:
        write_scenes(folder / "scenes", data.scenes)
        for name, domain in wanted.items():
            root = str(folder / "scenes" / name)
            wanted[name] = dataclasses.replace(domain, root=root, layout="folder", split="all")
    if not config.reads_source():
        del wanted["source"]
    found = {name: _index(name, domain, data.target, report) for name, domain in wanted.items()}
    source, evaluation = found.get("source"), found.get("evaluation")
    if source is not None and evaluation is not None and source.classes.names != evaluation.classes.names:
        raise UserError(
            f"--data.source.root has the classes {', '.join(source.classes.names)} and --data.evaluation.root "
            f"{', '.join(evaluation.classes.names)}: they must be the same"
        )
    segments = _segments(config, found["target"]) if config.reads_segments() else None
    features = _features(config, found, report)
    labelled = evaluation or source
    classes = labelled.classes if labelled else open_model(config.source_free.model, "cpu", report).classes
    return Domains(source, found["target"], evaluation, classes, segments, features)


def _index(name: str, domain: DomainConfig, target: DomainConfig, report: Report) -> Index:
    """The checked data set of a domain.

    Raises:
        UserError: it cannot be used.
    """
    try:
        index = build_index(domain, name != "target", f"data.{name}", report=report)
    except UserError as error:
        if name == "evaluation" and domain.root == target.root:  # perhaps nobody has labelled the target
            raise UserError(f"{error}; --data.evaluation null trains without labelled target images") from error
        raise
    if name == "evaluation":
        require_originals(index, "data.evaluation")
    return index


def loader_of(config: TrainConfig, domains: Domains, device: torch.device) -> Choice:
    """Which loader reads the data of a run, and why.

    Raises:
        UserError: the one that is asked for cannot be had.
    """
    pixels = "ssr" in config.stages() and config.sam.features == "cached_views"
    return choose_loader(config.data, domains.source, domains.target, device, pixels)


def inputs_of(domains: Domains, features: Features | None, rank: int = 0, world: int = 1) -> Inputs:
    """What the loader of a rank reads."""
    return Inputs(
        domains.source,
        domains.target,
        domains.segments,
        features.source if features else None,
        features.target if features else None,
        rank,
        world,
    )


def _segments(config: TrainConfig, target: Index) -> SegmentStore | ImageStore:
    """The target's segment maps; a prepared store may hold them; those of scenes are superpixels, made here."""
    root, prepared = target.layout.root, target.layout.store
    if prepared is not None and "segments" in prepared.kinds and not config.data.segments:
        return prepared
    if config.data.scenes is None:
        store = open_store(config.data.segments, root)
        store.require(target.samples)
        return store
    superpixels = Superpixels(SCENE_SUPERPIXELS)
    store = create_store(None, root, superpixels.recipe(), overwrite=False)
    tasks = [Task(Path(sample.image), superpixels) for sample in target.samples]
    for outcome in make_maps(store, tasks, workers=0):
        assert outcome.kind != "failed", outcome.message
    return store


def _features(config: TrainConfig, found: dict[str, Index], report: Report) -> Features | None:
    """The stored features that the run reads; those of scenes are made here.

    Raises:
        UserError: a store is missing, not whole, or of another encoder than the run's or the other store.
    """
    stores, shapes = {}, {}
    for name in config.reads_features():
        option = f"data.{name}_features"
        if config.data.scenes is not None:
            stores[name] = _scene_features(config, name, found[name], report)
        else:
            stores[name] = open_features(
                getattr(config.data, option.partition(".")[2]), found[name].layout.root, option
            )
            check_recipe(stores[name].recipe, config.sam, option, config.sam.encodes(config.ssr.domains))
        shapes[name] = stores[name].require(found[name].samples)
    if not stores:
        return None
    weights = {store.recipe.options["weights_sha256"] for store in stores.values()}
    if len(weights) > 1 or len(set(shapes.values())) > 1:
        raise UserError(
            f"{stores['source'].folder} and {stores['target'].folder} hold features of different encoders: make both "
            f"with the same weights"
        )
    return Features(stores["source"], stores.get("target"), shapes["source"])


def stored_features(config: TrainConfig, domains: Domains, device: torch.device) -> tuple[Features, StoredFeatures]:
    """Where the loader and the method find the stored features; with --sam.resident they are read and put on a device.

    Raises:
        UserError: a file is damaged, or the device's memory is too small.
    """
    assert domains.features is not None and domains.source is not None
    features, resident, found = domains.features, {}, {}
    if config.sam.resident:
        rows = grid_of(config.data.crop[0], features.shape.stride)
        for name, index in (("source", domains.source), ("target", domains.target)):
            if isinstance(store := getattr(features, name), FeatureStore):
                places, values, scales = read_residents(store, index.samples)
                resident[name] = ResidentFeatures(values, scales, rows, device)
                found[name] = places
        features = Features(found["source"], found.get("target"), features.shape)
    return features, StoredFeatures(features.shape.channels, config.sam.standardise, resident)


def _scene_features(config: TrainConfig, name: str, index: Index, report: Report) -> FeatureStore:
    """Features of scenes: a few small maps, which need no compression to int8."""
    store = create_features(None, index.layout.root, recipe(config.sam, "fp16", "fp32"), overwrite=False)
    device = pick_device(config.run.device)
    build = functools.cache(lambda: build_map_encoder(config.sam, device, "fp32"))
    images = [Path(sample.image) for sample in index.samples]
    outcomes = list(make_features(store, images, lambda path, image: build()(path, image), threads=1))
    for outcome in outcomes:
        if outcome.kind == "failed":
            raise UserError(outcome.message)
    if made := sum(outcome.kind == "made" for outcome in outcomes):
        report(f"{made} {name} scenes encoded for --sam.features cached_full")
    return store
