"""What `python -m ssr_fast.prepare store` does: a data set's images, labels and segments in a few large files."""

import argparse
import hashlib
import os
import time
from pathlib import Path

from ssr_fast.data.class_stats import STATS_FILE
from ssr_fast.data.diagnosis import Diagnosis
from ssr_fast.data.index import DomainConfig, diagnose, usable
from ssr_fast.data.segments import SegmentStore, open_store
from ssr_fast.data.store import GENERATOR
from ssr_fast.data.store_writer import Done, Plan, make_store, plan_store
from ssr_fast.data.stores import Recipe
from ssr_fast.errors import UserError
from ssr_fast.prepare_parts import check_place, compare_stats, progress, shard, tell

IMAGES = ("raw", "jpeg")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare store` beside those that say which data set."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the store")
    parser.add_argument(
        "--image", default="raw", choices=IMAGES, help="raw (default; pixels) or jpeg (quality 95, 4:4:4; a quarter)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--resize",
        nargs=2,
        type=int,
        metavar=("W", "H"),
        help="box that images are resized into, as --data.source.resize (default: the recipe's for gta5, synthia, "
        "cityscapes, acdc and darkzurich)",
    )
    size.add_argument("--no-resize", action="store_true", help="keep the images' sizes, as an evaluation needs them")
    parser.add_argument("--unlabelled", action="store_true", help="images only, as of a target set")
    parser.add_argument(
        "--segments", nargs="?", const="", metavar="DIR", help="put a segment store in (default: ROOT/segments)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store of other options")
    parser.add_argument("--rank", type=int, help="do every WORLD-th part only, from this one on (default: torchrun's)")
    parser.add_argument("--world", type=int, help="processes that share the work (default: torchrun's, else 1)")
    parser.add_argument("--workers", type=int, help="processes on this machine (default: its cores)")


def run(config: DomainConfig, options: argparse.Namespace) -> int:
    """Make the store; the exit code 0.

    Raises:
        UserError: wrong options, bad files, or a store that cannot be written; what is finished is kept.
    """
    rank, world = shard(options.rank, options.world, os.environ)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if workers < 0:
        raise UserError(f"--workers must not be negative (it is {workers})")
    if options.resize is not None and min(options.resize) < 1:
        raise UserError(f"--resize must be width and height > 0 (it is {' '.join(map(str, options.resize))})")
    diagnosis = diagnose(config, not options.unlabelled, report=tell)
    index = usable(diagnosis, config, "", tell)
    if index.layout.store is not None:
        raise UserError(f"ROOT {config.root} is a prepared store; give the folder of the original data set")
    out = Path(options.out).expanduser()
    check_place(out, index.layout, [Path(sample.image) for sample in index.samples])
    segments = _segments(options.segments, diagnosis)
    box = None if options.no_resize else options.resize or index.layout.spec.box
    if box is not None and options.resize is None:
        tell(f"images are resized to fit {box[0]}x{box[1]}, as the recipe does (--no-resize keeps their size)")
    if diagnosis.labelled and (index.layout.root / STATS_FILE).is_file():
        tell(compare_stats(index))
    recipe = _recipe(diagnosis, config, options.image, box, segments)
    plan = plan_store(out, index, recipe, segments, diagnosis.notes, options.overwrite)
    started, done = time.perf_counter(), []
    with progress(sum(map(len, plan.shards[rank::world])), "store") as show:
        for part in make_store(plan, workers, rank, world):
            done.append(part)
            show("", part.samples)
    _sum_up(plan, done, time.perf_counter() - started)
    return 0


def _segments(folder: str | None, diagnosis: Diagnosis) -> SegmentStore | None:
    """The segment store to be put in; None without."""
    if folder is None:
        return None
    store = open_store(folder, diagnosis.layout.root, "segments")
    store.require(diagnosis.samples)
    return store


def _recipe(
    diagnosis: Diagnosis, config: DomainConfig, image: str, box: tuple[int, int] | None, segments: SegmentStore | None
) -> Recipe:
    """What the bytes of the store depend on, beside the originals."""
    layout = diagnosis.layout
    return Recipe(
        GENERATOR,
        {
            "layout": layout.name,
            "split": config.split,
            "condition": config.condition,
            "labelled": diagnosis.labelled,
            "classes": list(layout.classes.names),
            "table": hashlib.sha256(layout.table.tobytes()).hexdigest()[:16],
            "image": image,
            "resize": None if box is None else list(box),
            "segments": None if segments is None else str(segments.recipe),
        },
    )


def _sum_up(plan: Plan, done: list[Done], seconds: float) -> None:
    """One line on what was done."""
    made = sum(part.samples for part in done if not part.kept)
    kept = sum(part.samples for part in done) - made
    line = f"{plan.folder}: {made} images made, {kept} kept"
    size = sum(path.stat().st_size for path in plan.folder.glob("*-*.npy"))
    line += f"; {len(plan.shards)} parts, {size / 1e6:.1f} MB"
    if made:
        line += f", {made / max(seconds, 1e-9):.3g} images/s"
    if not plan.finished():
        line += "; other ranks have not finished theirs"
    print(line)
