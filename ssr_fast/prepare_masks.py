"""What `python -m ssr_fast.prepare masks` does: a data set's segments, by SAM, superpixels or from a folder."""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.images import IMAGE_SUFFIXES, read_image
from ssr_fast.data.index import DomainConfig
from ssr_fast.data.layouts import Entry, Layout, find_layout
from ssr_fast.data.own_maps import match
from ssr_fast.data.segment_jobs import Generator, Outcome, Task, make_maps
from ssr_fast.data.segments import SegmentStore, create_store
from ssr_fast.data.stores import Recipe
from ssr_fast.data.superpixels import ALGORITHMS, OPTIONS, SuperpixelConfig, Superpixels
from ssr_fast.errors import UserError
from ssr_fast.models.sam_masks import MODELS, SamMaskConfig, SamMasks, checkpoint_digest, load_sam, pick_device
from ssr_fast.prepare_parts import check_place, local_rank, progress, shard
from ssr_fast.report.segment_pictures import segment_picture, sheet

_SAM, _SUPERPIXELS = "sam", "superpixels"
_ROWS = 4  # images in the picture that --preview FILE writes
_Config = TypeVar("_Config", SuperpixelConfig, SamMaskConfig)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare masks` beside those that say which data set."""
    parser.add_argument(
        "--generator", required=True, help="sam, superpixels, or a FOLDER with one map of integer ids an image"
    )
    parser.add_argument("--out", metavar="DIR", help="the store; default: segments in the data set's folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="make maps that are there anew, with other options too"
    )
    parser.add_argument(
        "--preview",
        nargs="?",
        const="",
        metavar="FILE-or-FOLDER",
        help=f"draw the segments: {_ROWS} images in one file (default: preview.png in the store), or all in a folder",
    )
    parser.add_argument("--rank", type=int, help="do every WORLD-th image only, from this one on (default: torchrun's)")
    parser.add_argument("--world", type=int, help="processes that share the images (default: torchrun's, else 1)")
    parser.add_argument("--workers", type=int, help="processes on this machine, not with sam (default: its cores)")
    sam = parser.add_argument_group("--generator sam")
    sam.add_argument("--sam-checkpoint", type=Path, metavar="FILE", help="the file that segment-anything publishes")
    sam.add_argument("--sam-model", choices=("auto", *MODELS.values()), help="default: auto, as the file says")
    sam.add_argument("--device", help="auto (default: this process's GPU if there is one), cpu, cuda or cuda:N")
    sam.add_argument("--points-per-batch", type=int, help="points decoded at a time: speed and memory (default: 64)")
    _add_fields(sam, SamMaskConfig)
    _add_fields(parser.add_argument_group("--generator superpixels"), SuperpixelConfig)


def run(config: DomainConfig, options: argparse.Namespace) -> int:
    """Make the store; the exit code 0.

    Raises:
        UserError: wrong options, or images that got no map (a line each, after all others are done).
    """
    rank, world = shard(options.rank, options.world, os.environ)
    _check(options)
    layout = find_layout(Path(config.root), config.layout, config.classes)
    entries = layout.listing(config.split, config.condition).entries
    if not entries:
        raise UserError(f"ROOT {config.root} holds no images ({layout.name}, split {config.split}); check both")
    out = Path(options.out).expanduser() if options.out else None
    check_place(out, layout, [entry.image for entry in entries])
    source = _source(options, entries, layout)
    store = create_store(out, layout.root, source.recipe, options.overwrite)
    mine = [entry.image for entry in entries[rank::world]]
    preview = None if options.preview is None else _Preview.of(options.preview, store)
    outcomes = [Outcome(image, "failed", source.failed[image]) for image in mine if image in source.failed]
    todo = [image for image in mine if image not in source.failed]
    generator = source.build() if todo else None
    started = time.perf_counter()
    if generator is not None:
        tasks = [Task(image, generator(image)) for image in todo]
        visit = preview if preview is not None and preview.is_folder else None
        with progress(len(tasks), "segments") as show:
            for outcome in make_maps(store, tasks, _workers(options), options.overwrite, visit):
                outcomes.append(outcome)
                show(outcome.message if outcome.kind == "made" else "")
    _sum_up(outcomes, store, time.perf_counter() - started)
    if preview is not None and not preview.is_folder and rank == 0:
        preview.write_sheet([outcome.image for outcome in outcomes if outcome.kind != "failed"])
    if failed := [outcome.message for outcome in outcomes if outcome.kind == "failed"]:
        raise UserError("\n".join(failed))
    return 0


def _add_fields(group: argparse._ArgumentGroup, kind: type[_Config]) -> None:
    """An option for each field; None where it is not given, so that one without effect can be named."""
    for field in dataclasses.fields(kind):
        text = f"{field.metadata['help']} (default: {field.default})"
        choices = ALGORITHMS if field.name == "algorithm" else None
        group.add_argument(_option(field.name), type=type(field.default), choices=choices, help=text)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(options: argparse.Namespace, kind: type[_Config]) -> _Config:
    """The configuration with the fields that were given."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _check(options: argparse.Namespace) -> None:
    """Every mistake in the options that needs no look at the data.

    Raises:
        UserError: a line for each.
    """
    generator = options.generator
    of_sam = ["sam_checkpoint", "sam_model", "device", "points_per_batch"]
    of_sam += [field.name for field in dataclasses.fields(SamMaskConfig)]
    of_superpixels = [field.name for field in dataclasses.fields(SuperpixelConfig)]
    useless = [*(of_sam if generator != _SAM else ["workers"]), *(of_superpixels if generator != _SUPERPIXELS else ())]
    found = [
        f"{_option(name)} has no effect with --generator {generator}; leave it out"
        for name in useless
        if getattr(options, name) is not None
    ]
    if generator == _SAM:
        found += _given(options, SamMaskConfig).problems()
        if options.sam_checkpoint is None:
            found.append("--sam-checkpoint is missing; give segment-anything's file, or take --generator superpixels")
        if options.points_per_batch is not None and options.points_per_batch < 1:
            found.append(f"--points-per-batch must be at least 1 (it is {options.points_per_batch})")
    elif generator == _SUPERPIXELS:
        config = _given(options, SuperpixelConfig)
        found += config.problems()
        for name in set(of_superpixels) - {"algorithm", *OPTIONS[config.algorithm]}:
            if getattr(options, name) is not None:
                found.append(f"{_option(name)} has no effect with --algorithm {config.algorithm}; leave it out")
    elif not Path(generator).expanduser().is_dir():
        found.append(f"--generator must be sam, superpixels or a folder of maps, and {generator} is no folder")
    if options.workers is not None and options.workers < 0:
        found.append(f"--workers must not be negative (it is {options.workers}); 0 works in the command's own process")
    if found:
        raise UserError("\n".join(found))


def _workers(options: argparse.Namespace) -> int:
    """Processes: none of its own for SAM, whose network is in this one."""
    if options.generator == _SAM:
        return 0
    return len(os.sched_getaffinity(0)) if options.workers is None else options.workers


@dataclass(frozen=True)
class _Source:
    """Where segments come from.

    Args:
        recipe: for the store.
        build: what makes the map of an image; loads a network if one is needed.
        failed: images that can have no map, and why.
    """

    recipe: Recipe
    build: Callable[[], Callable[[Path], Generator]]
    failed: Mapping[Path, str] = dataclasses.field(default_factory=dict)


def _source(options: argparse.Namespace, entries: tuple[Entry, ...], layout: Layout) -> _Source:
    """What the options name.

    Raises:
        UserError: SAM's file is missing or damaged, or a wrong device.
    """
    if options.generator == _SUPERPIXELS:
        superpixels = Superpixels(_given(options, SuperpixelConfig))
        return _Source(superpixels.recipe(), lambda: lambda image: superpixels)
    if options.generator == _SAM:
        return _sam_source(options)
    folder = Path(options.generator).expanduser()
    maps, problems = match(entries, folder, layout.root)
    failed = {problem.path: str(problem) for problem in problems}
    return _Source(Recipe("folder", {"folder": str(folder.resolve())}), lambda: maps.__getitem__, failed)


def _sam_source(options: argparse.Namespace) -> _Source:
    config = _given(options, SamMaskConfig)
    path = options.sam_checkpoint.expanduser()
    recipe = Recipe(_SAM, {"checkpoint_sha256": checkpoint_digest(path), **dataclasses.asdict(config)})

    def build() -> Callable[[Path], Generator]:
        device = pick_device(options.device or "auto", local_rank(os.environ))
        masks = SamMasks(load_sam(path, options.sam_model or "auto", device), config, options.points_per_batch or 64)
        return lambda image: masks

    return _Source(recipe, build)


@dataclass(frozen=True)
class _Preview:
    """Where pictures of the segments go: a file for some images, or a folder with one of each."""

    target: Path
    is_folder: bool
    store: SegmentStore

    @staticmethod
    def of(value: str, store: SegmentStore) -> "_Preview":
        """The option's value: empty, a file or a folder."""
        target = Path(value).expanduser() if value else store.folder / "preview.png"
        return _Preview(target, target.is_dir() or target.suffix.lower() not in IMAGE_SUFFIXES, store)

    def __call__(self, image: Path, pixels: NDArray[np.uint8], segments: NDArray[np.uint16]) -> None:
        """Draw one image into the folder, under its map's name."""
        self._save(
            self.target / self.store.path(image).relative_to(self.store.folder), segment_picture(pixels, segments)
        )

    def write_sheet(self, images: list[Path]) -> None:
        """Draw some of the images, evenly chosen, into the file."""
        if images:
            chosen = images[:: -(-len(images) // _ROWS)]
            pictures = [segment_picture(read_image(image), self.store.read(image)) for image in chosen]
            self._save(self.target, sheet(pictures))
            print(f"preview: {self.target}")

    def _save(self, path: Path, picture: NDArray[np.uint8]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--preview {path} cannot be written ({reason}); give another file or folder") from error


def _sum_up(outcomes: list[Outcome], store: SegmentStore, seconds: float) -> None:
    """One line on what was done."""
    made = [outcome for outcome in outcomes if outcome.kind == "made"]
    kept = sum(outcome.kind == "kept" for outcome in outcomes)
    line = f"{store.folder}: {len(made)} maps made, {kept} kept, {len(outcomes) - len(made) - kept} failed"
    if made:
        segments = statistics.median(outcome.segments for outcome in made)
        covered = statistics.fmean(outcome.covered for outcome in made)
        line += f"; {segments:.0f} segments an image (median), {covered:.1%} of the pixels in one"
        line += f", {len(outcomes) / max(seconds, 1e-9):.1f} images/s"
    print(line)
