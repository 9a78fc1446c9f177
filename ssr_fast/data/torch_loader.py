"""The torch loader: reads, crops and flips the samples that the plan names, in worker processes.

B batch, H W pixels of the crop.
"""

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssr_fast.data.augment import crop_image, crop_label, resize_image, resize_label
from ssr_fast.data.images import read_image
from ssr_fast.data.index import DomainConfig, Index
from ssr_fast.data.plan import Plan, SamplingConfig, View, acceptable
from ssr_fast.data.scenes import ScenesConfig
from ssr_fast.errors import UserError


@dataclass(kw_only=True)
class DataConfig:
    """The data of a run; the options `--data.*`."""

    source: DomainConfig = field(default_factory=DomainConfig)
    """Labelled images to learn from."""
    target: DomainConfig = field(default_factory=DomainConfig)
    """Unlabelled images to adapt to."""
    evaluation: DomainConfig = field(default_factory=lambda: DomainConfig(split="val"))
    """Labelled target images that only the evaluation sees."""
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
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How samples are drawn."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = self.sampling.problems(f"{where}.sampling")
        if self.scenes is not None:
            found += self.scenes.problems(f"{where}.scenes")
        for name in ("source", "target", "evaluation"):
            domain: DomainConfig = getattr(self, name)
            found += domain.problems(f"{where}.{name}")
            if self.scenes is not None and domain.root:
                found.append(
                    f"--{where}.{name}.root {domain.root} contradicts --{where}.scenes, which draws the data: "
                    f"leave one out (--{where}.scenes null reads from folders; the preset `folder` is made for that)"
                )
            if self.scenes is None and not domain.root:
                found.append(f"--{where}.{name}.root is missing: give the folder of the {name} data set")
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
        source_image: uint8 [B, H, W, 3] RGB.
        source_label: uint8 [B, H, W], 255 ignored.
        target_image: uint8 [B, H, W, 3] RGB.
        target_valid: bool [B, H, W], False where the crop lies outside the image.
        source_features: float32 [B, D, h, w], the frozen encoder's of the source images where a method keeps them.
    """

    source_image: Tensor
    source_label: Tensor
    target_image: Tensor
    target_valid: Tensor
    source_features: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copies."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: page-locked copies make `to` asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


class StepDataset(Dataset[Batch]):
    """Item `step` is the batch of that step for one rank."""

    def __init__(
        self, plan: Plan, source: Index, target: Index, rank: int = 0, world: int = 1, cache: bool = False
    ) -> None:
        self.plan, self.source, self.target = plan, source, target
        self.rank, self.world = rank, world
        self._cache: dict[tuple[str, int], NDArray[np.uint8]] | None = {} if cache else None

    def __getitem__(self, step: int) -> Batch:
        plan = self.plan(step, self.rank, self.world)
        source = [self._source(view) for view in plan.source]
        target = [self._target(view) for view in plan.target]
        return Batch(
            torch.from_numpy(np.stack([image for image, _ in source])),
            torch.from_numpy(np.stack([label for _, label in source])),
            torch.from_numpy(np.stack([image for image, _ in target])),
            torch.from_numpy(np.stack([valid for _, valid in target])),
        )

    def _source(self, view: View) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The first candidate crop that satisfies the view's conditions, else the last."""
        image, label = self._image(self.source, view), self._label(view)
        size = self.plan.crop
        for corner in view.corners:
            cut = crop_label(label, corner, size, view.flip)
            if acceptable(cut, view.rare_class, self.plan.sampling):
                break
        return crop_image(image, corner, size, view.flip), cut

    def _target(self, view: View) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        image = self._image(self.target, view)
        corner, size = view.corners[0], self.plan.crop
        inside = crop_label(np.zeros(image.shape[:2], np.uint8), corner, size, view.flip) == 0
        return crop_image(image, corner, size, view.flip), inside

    def _image(self, index: Index, view: View) -> NDArray[np.uint8]:
        path = index.samples[view.index].image
        key = (path, 0)
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        image = resize_image(read_image(path), view.size)
        if self._cache is not None:
            self._cache[key] = image
        return image

    def _label(self, view: View) -> NDArray[np.uint8]:
        sample = self.source.samples[view.index]
        if sample.label is None:
            raise UserError(f"{sample.image} has no label: the source needs one for every image")
        key = (sample.label, 1)
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        label = resize_label(self.source.layout.read_label(sample.label), view.size)
        if self._cache is not None:
            self._cache[key] = label
        return label


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    random.seed(0)  # nothing may depend on a worker's own random state; a fixed one makes a violation reproducible


def load_steps(dataset: StepDataset, first: int, last: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers."""
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Reported(dataset),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
