"""The torch loader: reads, crops and flips the samples that the plan names, in worker processes.

B batch, H W pixels of the crop.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssr_fast.data.augment import crop_image, crop_label, resize_image, resize_label
from ssr_fast.data.features import FeatureStore
from ssr_fast.data.images import read_image
from ssr_fast.data.index import DomainConfig, Index
from ssr_fast.data.plan import Plan, SamplingConfig, View, acceptable
from ssr_fast.data.residents import Residents
from ssr_fast.data.scenes import ScenesConfig
from ssr_fast.data.segments import SegmentStore
from ssr_fast.data.workers import STOP_SIGNALS, LoaderProcesses, quiet_start
from ssr_fast.errors import UserError

_Read = TypeVar("_Read")


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
    segments; empty: the folder `segments` in the target set's root."""
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


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        source_image: uint8 [B, H, W, 3] RGB; B is 0 for a method without source data.
        source_label: uint8 [B, H, W], 255 ignored; likewise.
        target_image: uint8 [B, H, W, 3] RGB.
        target_valid: bool [B, H, W], False where the crop lies outside the image.
        source_features: float32 [B, D, h, w], the frozen encoder's of the source images where they are kept: of the
            crops (cached_views), or crops of the whole images' (cached_full).
        target_features: float32 [B, D, h, w], crops of the features of the whole target images, where a store of them
            is read.
        source_places, target_places: float64 [B, h + w, 3], in place of these features, which tokens of the resident
            ones (data/residents.py) they are made of.
        target_segments: int32 [B, H, W], ids of the target's segments, each image's its own, where a method learns from
            them; 0 where there is no segment, and outside of the image.
    """

    source_image: Tensor
    source_label: Tensor
    target_image: Tensor
    target_valid: Tensor
    source_features: Tensor | None = None
    target_segments: Tensor | None = None
    target_features: Tensor | None = None
    source_places: Tensor | None = None
    target_places: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copies."""
        return self.each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: page-locked copies make `to` asynchronous."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        return replace(self, **{name: change(part) for name, part in self.parts().items()})

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it has, by name."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


class StepDataset(Dataset[Batch]):
    """Item `step` is the batch of that step for one rank.

    Args:
        plan: which samples.
        source, target: the checked data sets; without a source its part of a batch has 0 images.
        rank, world: of this process.
        cache: keep decoded and resized images, labels and segments.
        segments: of the target; None leaves `target_segments` None.
        source_features, target_features: stores of whole images' features, or where these are in another memory; None
            leaves these parts of a batch None.
    """

    def __init__(
        self,
        plan: Plan,
        source: Index | None,
        target: Index,
        rank: int = 0,
        world: int = 1,
        cache: bool = False,
        segments: SegmentStore | None = None,
        source_features: FeatureStore | Residents | None = None,
        target_features: FeatureStore | Residents | None = None,
    ) -> None:
        self.plan, self.source, self.target = plan, source, target
        self.rank, self.world, self.segments = rank, world, segments
        self.source_features, self.target_features = source_features, target_features
        self._cache: dict[tuple[str, int], Any] | None = {} if cache else None

    def __getitem__(self, step: int) -> Batch:
        plan = self.plan(step, self.rank, self.world)
        source = [self._source(view, self.source) for view in plan.source] if self.source is not None else []
        target = [self._target(view) for view in plan.target]
        segments = None
        if self.segments is not None:
            cuts = [self._target_segments(view, self.segments) for view in plan.target]
            segments = torch.from_numpy(np.stack(cuts).astype(np.int32))  # PyTorch does next to nothing in uint16
        features = {"source": [features for _, _, features in source if features is not None]}
        if self.target_features is not None:
            of_target = self.target_features
            features["target"] = [self._features(view, view.corners[0], self.target, of_target) for view in plan.target]
        return Batch(
            _stack([image for image, _, _ in source], (*self.plan.crop, 3)),
            _stack([label for _, label, _ in source], self.plan.crop),
            torch.from_numpy(np.stack([image for image, _ in target])),
            torch.from_numpy(np.stack([valid for _, valid in target])),
            target_segments=segments,
            **{name: value for domain, parts in features.items() for name, value in _named(domain, parts)},
        )

    def _source(self, view: View, index: Index) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any] | None]:
        """The first candidate crop that satisfies the view's conditions, else the last: image, label, features."""
        image, label = self._image(index, view), self._label(index, view)
        size = self.plan.crop
        for corner in view.corners:
            cut = crop_label(label, corner, size, view.flip)
            if acceptable(cut, view.rare_class, self.plan.sampling):
                break
        store, features = self.source_features, None
        if store is not None:
            features = self._features(view, corner, index, store)
        return crop_image(image, corner, size, view.flip), cut, features

    def _target(self, view: View) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        image = self._image(self.target, view)
        corner, size = view.corners[0], self.plan.crop
        inside = crop_label(np.zeros(image.shape[:2], np.uint8), corner, size, view.flip) == 0
        return crop_image(image, corner, size, view.flip), inside

    def _target_segments(self, view: View, store: SegmentStore) -> NDArray[np.uint16]:
        """The segments of a target view, resized, cut and flipped as a label is."""
        sample = self.target.samples[view.index]

        def read() -> NDArray[np.uint16]:
            return resize_label(store.read(sample.image, (sample.width, sample.height)), view.size)

        segments = self._kept((sample.image, 2), read)
        return crop_label(segments, view.corners[0], self.plan.crop, view.flip, outside=0)

    def _features(
        self, view: View, corner: tuple[int, int], index: Index, store: FeatureStore | Residents
    ) -> NDArray[Any]:
        """The stored features of a view [h, w, D], cut and flipped as its image is, or where they are."""
        sample = index.samples[view.index]
        if isinstance(store, Residents):
            return store.places(sample.image, view.size, corner, self.plan.crop, view.flip)
        key = str(store.path(sample.image)), 3
        stored = self._kept(key, lambda: store.read(sample.image, (sample.width, sample.height)))
        return stored.cut(view.size, corner, self.plan.crop, view.flip)

    def _image(self, index: Index, view: View) -> NDArray[np.uint8]:
        path = index.samples[view.index].image
        return self._kept((path, 0), lambda: resize_image(read_image(path), view.size))

    def _label(self, index: Index, view: View) -> NDArray[np.uint8]:
        sample = index.samples[view.index]
        label = sample.label
        if label is None:
            raise UserError(f"{sample.image} has no label: the source needs one for every image")
        return self._kept((label, 1), lambda: resize_label(index.layout.read_label(label), view.size))

    def _kept(self, key: tuple[str, int], read: Callable[[], _Read]) -> _Read:
        """What `read` returns, from the cache if there is one."""
        if self._cache is None:
            return read()
        if key not in self._cache:
            self._cache[key] = read()
        kept: _Read = self._cache[key]
        return kept


def _stack(arrays: list[NDArray[np.uint8]], shape: tuple[int, ...]) -> Tensor:
    """[len(arrays), *shape], also of none."""
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty((0, *shape), dtype=torch.uint8)


def _named(domain: str, views: list[NDArray[Any]]) -> Iterator[tuple[str, Tensor]]:
    """Features [h, w, D] of each view -> [B, D, h, w], channels-last in memory, or their places, under a batch's name;
    nothing of none."""
    if views:
        together = torch.from_numpy(np.stack(views))
        yield (
            (f"{domain}_places", together)
            if together.ndim == 3
            else (f"{domain}_features", together.permute(0, 3, 1, 2))
        )


class _Reported(Dataset[Batch | UserError]):
    """Hands a user's error to the training process as it is: the DataLoader would wrap it in a worker's traceback."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.dataset[step]
        except UserError as error:
            return error


def _start_worker(worker: int) -> None:
    """Workers leave stopping to the parent: a terminal's Ctrl-C reaches the whole process group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # PyTorch's handlers print a guess; the parent says it in its own words
    torch.set_num_threads(1)
    random.seed(0)  # nothing may depend on a worker's own random state; a fixed one makes a violation reproducible
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that waits for its turn to write would not notice that nobody is left to read."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def load_steps(dataset: StepDataset, first: int, last: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers.

    Closing the generator ends the workers. A batch comes from a worker in one write of less than the 4 KB that a pipe
    takes whole (its tensors lie in shared memory), so a killed one never leaves half a batch to wait for.

    Raises:
        UserError: a sample cannot be read.
        LoaderDied: a worker ended by itself; it is found when the next batch is asked for.
    """
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Reported(dataset),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        # named, because a process of side_by_side would start them by its fork server, for which all must be pickled,
        # and because a forked one begins with the signals blocked that quiet_start blocks
        multiprocessing_context="fork" if workers else None,
    )
    if workers == 0:
        yield from map(_raised, loader)
        return
    with quiet_start():
        batches: Any = iter(loader)
    processes = LoaderProcesses(batches._workers)
    try:
        for _ in range(first, last):  # and no further: workers that die with their work done are of no interest
            yield _raised(processes.wait_for(batches.__next__))
    finally:
        processes.end(batches._shutdown_workers)


def _raised(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
