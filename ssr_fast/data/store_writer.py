"""Makes a prepared store, shard by shard, in this process or in several; its bytes do not depend on how many, nor on
how often it was stopped.

A shard is a run of samples whose parts lie together in files. Which samples follows from their sizes alone. When its
files are there, a file in the folder `parts` says what they hold; when all shards are there, index.json replaces these.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.class_stats import STATS_FILES, write_rcs_files
from ssr_fast.data.geometry import fitted_size, resize_image, resize_label
from ssr_fast.data.images import BadFile
from ssr_fast.data.index import Index, Sample
from ssr_fast.data.processes import in_processes
from ssr_fast.data.segments import SegmentStore
from ssr_fast.data.store import INDEX, KIND, ImageStore, index_text, read_index
from ssr_fast.data.store_files import (
    DTYPES,
    HEADER_BYTES,
    Row,
    checksum,
    encode_jpeg,
    header,
    kinds,
    shard_name,
)
from ssr_fast.data.stores import FILE, Recipe, create_folder, open_new, write_file

_PARTS = "parts"
_SMALLEST, _LARGEST, _SHARDS = 32 << 20, 1 << 30, 64  # bytes of pixels in a shard; shards of a store, where these allow


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Args:
        folder: of the store.
        index: the checked data set.
        recipe: of the store.
        segments: maps of the original images; None without.
        notes: what is unusual with the originals.
        shards: the samples of each.
    """

    folder: Path
    index: Index
    recipe: Recipe
    segments: SegmentStore | None
    notes: tuple[str, ...]
    shards: tuple[tuple[Sample, ...], ...]

    def finished(self) -> bool:
        """Whether index.json is there."""
        return (self.folder / INDEX).is_file()


@dataclass(frozen=True)
class Done:
    """What became of a shard: its `number`, how many `samples` it holds, and whether it was there already (`kept`)."""

    number: int
    samples: int
    kept: bool


def plan_store(
    folder: Path, index: Index, recipe: Recipe, segments: SegmentStore | None, notes: tuple[str, ...], overwrite: bool
) -> Plan:
    """What there is to do for a store; its folder is made.

    Args:
        folder: of the store.
        index: the checked data set; labelled if the recipe says so.
        recipe: of the store.
        segments: whole, see SegmentStore.require; None without.
        notes: of the diagnosis.
        overwrite: let a store of another recipe go.

    Raises:
        UserError: the folder holds a store of another recipe (and not `overwrite`), other things, or cannot be written.
    """
    create_folder(KIND, folder, index.layout.root, recipe, overwrite)
    return Plan(folder, index, recipe, segments, notes, tuple(_shards(index.samples, recipe)))


def make_store(plan: Plan, workers: int, rank: int = 0, world: int = 1) -> Iterator[Done]:
    """Make every shard that is missing, damaged or of other originals; the last process writes the index.

    Args:
        plan: see plan_store.
        workers: processes; 0 works in this one.
        rank, world: of all shards, do each world-th from this one on.

    Raises:
        UserError: an original cannot be read any more, the store cannot be written, or a process was killed.
    """
    mine = range(rank, len(plan.shards), world)
    if plan.finished():
        _take_apart(plan)
    yield from in_processes(_Job(plan), mine, workers, "a prepared store")
    _finish(plan)


@dataclass(frozen=True)
class _Job:
    """Makes a shard; goes to the processes."""

    plan: Plan

    def __call__(self, number: int) -> Done:
        plan, samples = self.plan, self.plan.shards[number]
        expected = [_expected(plan, sample) for sample in samples]
        rows = _read_part(plan, number)
        if rows is not None and [_origin(row) for row in rows] == expected and not _damaged(plan, rows):
            return Done(number, len(samples), True)
        # from here on the store is not finished, and must not look as if it were
        if plan.finished():
            _take_apart(plan)
        for path in (plan.folder / INDEX, _part(plan.folder, number)):
            path.unlink(missing_ok=True)
        rows = _write_shard(plan, number, samples)
        _write_part(plan, number, [asdict(row) for row in rows])
        return Done(number, len(samples), False)


def _write_shard(plan: Plan, number: int, samples: Sequence[Sample]) -> list[Row]:
    """Write the files of a shard, a sample at a time; what they hold."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for kind in kinds(plan.recipe):
            path = plan.folder / shard_name(kind, number)
            files[kind] = stack.enter_context(open_new(path, plan.folder, to_disk=True))
            files[kind].write(header(kind, 0))
        first = 0
        for sample in samples:
            contents, size = _contents(plan, sample)
            start = files["images"].tell() - HEADER_BYTES
            for kind, content in contents.items():
                files[kind].write(content)
            sums = {kind: checksum(content) for kind, content in contents.items()}
            stop = start + len(contents["images"])
            rows.append(replace(_row(plan, sample, size), shard=number, start=start, stop=stop, first=first, sums=sums))
            first += size[0] * size[1]
        for kind, file in files.items():
            count = (file.tell() - HEADER_BYTES) // np.dtype(DTYPES[kind]).itemsize
            file.seek(0)
            file.write(header(kind, count))
    return rows


def _contents(plan: Plan, sample: Sample) -> tuple[dict[str, bytes], tuple[int, int]]:
    """The bytes to be stored of a sample, by kind, and (width, height) of what they show."""
    layout, size = plan.index.layout, _stored(sample, plan.recipe)
    image = layout.read_image(sample.image)
    if (image.shape[1], image.shape[0]) != (sample.width, sample.height):
        raise BadFile(Path(sample.image), "has changed since it was checked", "run the command again")
    image = resize_image(image, size)
    contents = {"images": encode_jpeg(image) if plan.recipe.options["image"] == "jpeg" else image.tobytes()}
    if plan.recipe.options["labelled"]:
        assert sample.label is not None
        contents["labels"] = resize_label(layout.read_label(sample.label), size).tobytes()
    if plan.segments is not None:
        segments: NDArray[np.uint16] = plan.segments.read(sample.image, (sample.width, sample.height))
        contents["segments"] = resize_label(segments, size).astype(DTYPES["segments"]).tobytes()
    return contents, size


def _expected(plan: Plan, sample: Sample) -> Row:
    """What a sample's row says of its originals."""
    return _origin(_row(plan, sample, _stored(sample, plan.recipe)))


def _origin(row: Row) -> Row:
    """A row without what making it has found."""
    return replace(row, shard=0, start=0, stop=0, first=0, sums={})


def _row(plan: Plan, sample: Sample, size: tuple[int, int]) -> Row:
    root = plan.index.layout.root
    paths = [None if path is None else Path(path) for path in (sample.image, sample.label)]
    image, label = (None if path is None else path.relative_to(root).as_posix() for path in paths)
    assert image is not None
    files = tuple((0, 0) if path is None else _stamp(path) for path in paths)
    return Row(
        sample.name,
        image,
        label,
        sample.width,
        sample.height,
        (files[0], files[1]),
        sample.counts,
        size,
        0,
        0,
        0,
        0,
        {},
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError as error:
        raise BadFile(path, f"cannot be read any more ({error.strerror})", "restore it") from error


def _stored(sample: Sample, recipe: Recipe) -> tuple[int, int]:
    """(width, height) of a stored image."""
    box = recipe.options["resize"]
    return fitted_size(sample.width, sample.height, (box[0], box[1]) if box else None)


def _shards(samples: Sequence[Sample], recipe: Recipe) -> Iterator[tuple[Sample, ...]]:
    """Runs of samples: small enough that a stopped run loses little, few enough for a reader to keep all files open."""
    sizes = [3 * size[0] * size[1] for size in (_stored(sample, recipe) for sample in samples)]
    limit = min(max(sum(sizes) // _SHARDS, _SMALLEST), _LARGEST)
    run: list[Sample] = []
    total = 0
    for sample, size in zip(samples, sizes, strict=True):
        if run and total + size > limit:
            yield tuple(run)
            run, total = [], 0
        run.append(sample)
        total += size
    if run:
        yield tuple(run)


def _part(folder: Path, number: int) -> Path:
    return folder / _PARTS / f"{number:05d}.json"


def _write_part(plan: Plan, number: int, rows: Sequence[dict[str, Any]]) -> None:
    content = json.dumps({"recipe": plan.recipe.digest, "rows": rows}).encode()
    write_file(_part(plan.folder, number), plan.folder, lambda file: file.write(content), to_disk=True)


def _read_part(plan: Plan, number: int) -> list[Row] | None:
    """What a finished shard holds; None if it is not finished, of another recipe, or its file is damaged."""
    try:
        content = json.loads(_part(plan.folder, number).read_bytes())
        return [Row.of(fields) for fields in content["rows"]] if content["recipe"] == plan.recipe.digest else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _damaged(plan: Plan, rows: Sequence[Row]) -> bool:
    """Whether any file of a shard is not what its rows say."""
    store = ImageStore(plan.folder, plan.recipe, plan.index.classes, tuple(rows), (), {})
    return any(store.check_shard(store.path(kind, rows[0].shard), rows) for kind in store.kinds)


def _take_apart(plan: Plan) -> None:
    """Say of each shard what index.json says of it; what is damaged there is made anew."""
    try:
        rows = read_index(plan.folder / INDEX, plan.recipe).rows
    except BadFile:
        return
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_shard.setdefault(row.shard, []).append(asdict(row))
    for number, parts in by_shard.items():
        if not _part(plan.folder, number).is_file():
            _write_part(plan, number, parts)


def _finish(plan: Plan) -> None:
    """Write the index if all shards are there, and remove what is left of earlier ones."""
    parts = [_read_part(plan, number) for number in range(len(plan.shards))]
    if any(rows is None for rows in parts):
        return
    names = [FILE]
    if plan.recipe.options["labelled"]:
        write_rcs_files(plan.index, plan.folder)
        names += STATS_FILES
    files = {name: checksum((plan.folder / name).read_bytes()) for name in names}
    rows = tuple(row for part in parts for row in part or ())
    store = ImageStore(plan.folder, plan.recipe, plan.index.classes, rows, plan.notes, files)
    write_file(plan.folder / INDEX, plan.folder, lambda file: file.write(index_text(store)), to_disk=True)
    kept = {store.path(kind, row.shard) for row in rows for kind in store.kinds}
    kept |= {plan.folder / name for name in names}
    for path in [*plan.folder.glob("*-*.npy"), *(plan.folder / name for name in STATS_FILES)]:
        if path not in kept:
            path.unlink(missing_ok=True)
    for path in (plan.folder / _PARTS).glob("*.json"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another rank may have removed it
        (plan.folder / _PARTS).rmdir()
