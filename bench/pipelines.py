"""The input pipelines that `python -m bench loader` compares: what each reads, what it delivers, how it is started.

To add one: a Provider in PROVIDERS; where it reads another form of the data, a maker in bench/loader.py's MAKERS.
B batch, H W pixels of the crop.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.photos import CITYSCAPES_PHOTOGRAPH, GTA5, Photograph
from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.dali_loader import not_supported_reasons
from ssr_fast.data.geometry import fitted_size
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.loader import Choice, DataConfig, Inputs, load
from ssr_fast.presets import gta5_cityscapes

FOLDERS, RAW, JPEG = "PNG folders", "raw store", "JPEG store"
PREFETCH = 4
"""Batches that each worker (of DALI: the pipeline) prepares in advance."""
ENDLESS = 2**31

Delivered = tuple[Tensor, Tensor, Tensor]
"""Source images float32 [B, 3, H, W] normalised, source labels uint8 [B, H, W], target images as the source's."""


@dataclass(frozen=True)
class Workload:
    """What every row reads and delivers: the preset gta5-cityscapes, on drawn pictures.

    Attributes:
        source, target: the pictures.
        source_box, target_box: resize boxes (width, height).
        crop: (height, width).
        batch: images a domain in one batch.
    """

    source: Photograph
    target: Photograph
    source_box: tuple[int, int]
    target_box: tuple[int, int]
    crop: tuple[int, int]
    batch: int

    def source_size(self) -> tuple[int, int]:
        """(width, height) of a resized source image."""
        return fitted_size(self.source.width, self.source.height, self.source_box)

    def target_size(self) -> tuple[int, int]:
        """(width, height) of a resized target image."""
        return fitted_size(self.target.width, self.target.height, self.target_box)


def full_workload() -> Workload:
    """The sizes of the sets and of the preset."""
    data = gta5_cityscapes().data
    assert data.source.resize is not None and data.target.resize is not None
    return Workload(GTA5, CITYSCAPES_PHOTOGRAPH, data.source.resize, data.target.resize, data.crop, data.batch_size)


@dataclass(frozen=True)
class Job:
    """One run of one provider in a process of its own.

    Attributes:
        provider: its name.
        workload: what it reads and delivers.
        roots: form of the data -> folders of source and target.
        cache: folder of the index's results: the data were checked before.
        workers: processes or threads that read.
        warm_up: batches before the measured part; by then those that were begun during the start are used up.
        seconds: length of the measured part, at least.
        least: batches in the measured part, at least.
        device: cpu or cuda.
        seed: of the drawn samples.
    """

    provider: str
    workload: Workload
    roots: dict[str, tuple[str, str]]
    cache: str
    workers: int
    warm_up: int
    seconds: float
    least: int
    device: str
    seed: int = 0

    @staticmethod
    def of(content: dict[str, Any]) -> "Job":
        """From what dataclasses.asdict and JSON have made of one."""
        work = dict(content["workload"])
        for name in ("source", "target"):
            work[name] = Photograph(**work[name])
        for name in ("source_box", "target_box", "crop"):
            work[name] = tuple(work[name])
        roots = {form: (source, target) for form, (source, target) in content["roots"].items()}
        return Job(**{**content, "workload": Workload(**work), "roots": roots})


@dataclass(frozen=True)
class Provider:
    """One input pipeline.

    Attributes:
        name: of its row.
        form: of the data that it reads, a key of Job.roots.
        about: what it does, and what it delivers where.
        batches: job -> batches without end.
        reasons: why it cannot run here.
    """

    name: str
    form: str
    about: str
    batches: Callable[[Job], Iterator[Delivered]]
    reasons: Callable[[torch.device], list[str]] = lambda device: []


def data_config(job: Job, form: str) -> DataConfig:
    """The preset's, of the job's data."""
    work, (source, target) = job.workload, job.roots[form]
    data = gta5_cityscapes().data
    return dataclasses.replace(
        data,
        source=dataclasses.replace(data.source, root=source, resize=work.source_box),
        target=dataclasses.replace(data.target, root=target, resize=work.target_box),
        evaluation=None,
        crop=work.crop,
        batch_size=work.batch,
        workers=job.workers,
        prefetch=PREFETCH,
    )


def indices(data: DataConfig, cache: str) -> tuple[Index, Index]:
    """Source and target, checked, or as they were checked before."""

    def index(domain: DomainConfig, labelled: bool, option: str) -> Index:
        return build_index(domain, labelled, option, Path(cache))

    return index(data.source, True, "data.source"), index(data.target, False, "data.target")


def torchvision_folders(job: Job) -> Iterator[Delivered]:
    """bench.torchvision_loader on the folders."""
    from bench import torchvision_loader as rival  # its imports belong to its own start-up
    from ssr_fast.data.labels import GTA5_IDS

    work, (source, target) = job.workload, (Path(root) for root in job.roots[FOLDERS])
    images = sorted((source / "images").glob("*.png"))
    dataset = rival.PairDataset(
        [(image, source / "labels" / image.name) for image in images],
        sorted((target / "leftImg8bit" / "train").glob("*/*_leftImg8bit.png")),
        work.source_size(),
        work.target_size(),
        work.crop,
        GTA5_IDS,
    )
    return rival.batches(dataset, work.batch, job.workers, PREFETCH, job.device == "cuda", job.seed)


def ours(loader: str, form: str, device: str, job: Job) -> Iterator[Delivered]:
    """A loader of ours, and normalise_batch, with which a training step begins, where the loader has not done it."""
    data = data_config(job, form)
    inputs, choice = Inputs(*indices(data, job.cache)), Choice(loader, "for the benchmark")
    for batch in load(data, inputs, choice, job.seed, 0, ENDLESS, torch.device(device), lambda line: None):
        yield normalise_batch(batch.source_image), batch.source_label, normalise_batch(batch.target_image)


def of_torch(form: str) -> Callable[[Job], Iterator[Delivered]]:
    """Our torch loader on a form of the data; batches stay on the host."""
    return lambda job: ours("torch", form, "cpu", job)


def of_dali(form: str, device: str) -> Callable[[Job], Iterator[Delivered]]:
    """Our DALI loader on a store, for a device."""
    return lambda job: ours("dali", form, device, job)


def dali_cpu(device: torch.device) -> list[str]:
    """Why DALI cannot work on the host."""
    return not_supported_reasons(torch.device("cpu"))


def dali_gpu(device: torch.device) -> list[str]:
    """Why DALI cannot work on a GPU."""
    if device.type != "cuda":
        return ["needs a GPU (--device cuda)"]
    return not_supported_reasons(device)


PROVIDERS = (
    Provider(
        "torchvision, PNG folders",
        FOLDERS,
        "DataLoader and transforms v2; uniform draws, the first crop; float32 is made in the workers, on the host",
        torchvision_folders,
    ),
    Provider(
        "ours, PNG folders",
        FOLDERS,
        "the plan's rare-class draws, up to 10 tries a crop; uint8 comes from the workers, float32 is made by the "
        "consumer, on the host",
        of_torch(FOLDERS),
    ),
    Provider("ours, raw store", RAW, "the same samples, bit for bit, out of mapped files", of_torch(RAW)),
    Provider("ours, JPEG store", JPEG, "the same crops of JPEG files of quality 95, decoded by Pillow", of_torch(JPEG)),
    Provider("DALI cpu, raw store", RAW, "flipped and normalised by DALI, on the host", of_dali(RAW, "cpu"), dali_cpu),
    Provider(
        "DALI cpu, JPEG store", JPEG, "decoded (the crop alone) and so on by DALI", of_dali(JPEG, "cpu"), dali_cpu
    ),
    Provider("DALI gpu, raw store", RAW, "float32 is made on the GPU", of_dali(RAW, "cuda"), dali_gpu),
    Provider("DALI gpu, JPEG store", JPEG, "decoded by nvJPEG, on the GPU", of_dali(JPEG, "cuda"), dali_gpu),
)
"""The first is what the others are compared with."""
BY_NAME = {provider.name: provider for provider in PROVIDERS}
