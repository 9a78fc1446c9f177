"""Prediction files: which inputs give which outputs, and writing them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.images import IMAGE_SUFFIXES
from ssr_fast.data.labels import ClassSet
from ssr_fast.errors import UserError
from ssr_fast.report.pictures import overlay

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@dataclass(frozen=True)
class Job:
    """One input file and where its outputs go: `target` is their common path without ending."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """Whether the input's ending is a video's."""
        return self.source.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Jobs:
    """What an input holds: the jobs, sorted, and how many files of other kinds lie between them."""

    jobs: tuple[Job, ...]
    others: int


def plan_jobs(given: Path, out: Path) -> Jobs:
    """The jobs of an image, a video, or a folder with any of them, whose structure the outputs keep.

    Files below `out` are no inputs, so that a second run into a folder inside the input finds the same files.

    Raises:
        UserError: nothing to read, two inputs with the same output, or `out` is the input folder itself.
    """
    if not given.exists():
        raise UserError(f"{given} does not exist: give an image, a video or a folder of them")
    if not given.is_dir():
        if not _is_input(given):
            raise UserError(f"{given} is no image ({', '.join(IMAGE_SUFFIXES)}) or video ({', '.join(VIDEO_SUFFIXES)})")
        return Jobs((Job(given, out / given.stem),), 0)
    if given.resolve() == out.resolve():
        raise UserError(f"--out {out} is the folder of the inputs, and outputs would mix with them: give another one")
    files = sorted(_files_below(given, out))
    jobs = tuple(Job(path, out / path.relative_to(given).with_suffix("")) for path in files if _is_input(path))
    if not jobs:
        raise UserError(f"{given} holds no image or video")
    first: dict[Path, Path] = {}
    for job in jobs:
        other = first.setdefault(job.target, job.source)
        if other != job.source:
            raise UserError(
                f"{other} and {job.source} would both be written to {job.target}_*: rename one, or put them "
                "into different folders"
            )
    return Jobs(jobs, len(files) - len(jobs))


def _is_input(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _files_below(folder: Path, excluded: Path) -> Iterator[Path]:
    """All files below a folder, also through links to folders (each folder once), without hidden ones."""
    excluded = excluded.resolve()
    seen = {folder.resolve()}
    for here, folders, files in os.walk(folder, followlinks=True):
        inside = []
        for name in folders:
            real = (Path(here) / name).resolve()
            if not name.startswith(".") and real != excluded and real not in seen:
                seen.add(real)
                inside.append(name)
        folders[:] = inside
        yield from (Path(here) / name for name in files if not name.startswith("."))


def prepare_folder(out: Path) -> None:
    """Make the output folder and see that it can be written.

    Raises:
        UserError: it cannot.
    """
    probe = out / f".ssr_fast-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}): give a folder that you may write to"
        ) from error


def write_prediction(
    target: Path, image: NDArray[np.uint8], label: NDArray[np.uint8], classes: ClassSet
) -> tuple[Path, Path, Path]:
    """Write <target>_trainIds.png, <target>_color.png and <target>_overlay.png; existing ones are replaced.

    Args:
        target: path without ending; its folder is made.
        image: uint8 [H, W, 3] RGB.
        label: uint8 [H, W] train ids.
        classes: the label's classes.

    Returns:
        the three paths.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures = {"trainIds": label, "color": classes.colorize(label), "overlay": overlay(image, label, classes)}
    train_ids, color, mixed = (_write_png(Path(f"{target}_{kind}.png"), array) for kind, array in pictures.items())
    return train_ids, color, mixed


def _write_png(path: Path, array: NDArray[np.uint8]) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(array).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
