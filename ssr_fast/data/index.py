"""The index of a data set: every file is opened and checked once, so that training never meets a bad one.

What a file can be:
 good      it becomes a Sample;
 left out  it does no harm when missing: a label without an image, and in GTA5, whose release has a few, a label of
           another size than its image. `diagnose` names it, training counts it in one printed line;
 bad       everything else. Training does not start before it is repaired or removed.
Legend: K classes.
"""

import os
import shlex
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data import index_cache
from ssr_fast.data.cache import Report, default_folder
from ssr_fast.data.decode_room import DecodeRoom
from ssr_fast.data.diagnosis import Diagnosis, Index, Problem, Sample, total_counts
from ssr_fast.data.images import BadFile, decode_image, printable
from ssr_fast.data.index_cache import Row
from ssr_fast.data.labels import ClassSet
from ssr_fast.data.layouts import LAYOUTS, Entry, Layout, Listing, find_layout
from ssr_fast.data.roots import expanded, option_name
from ssr_fast.data.store import is_store
from ssr_fast.data.store_index import check_sizes, diagnose_store
from ssr_fast.errors import UserError

__all__ = ["Diagnosis", "DomainConfig", "Index", "Problem", "Sample", "build_index", "diagnose", "total_counts"]

_STRIP = 1 << 20  # pixels that are counted at once
_MAX_THREADS = 16  # Pillow decodes without the interpreter's lock; beyond this the disk is the limit


@dataclass(kw_only=True)
class DomainConfig:
    """One data set; the options `--data.source.*`, `--data.target.*` and so on."""

    root: str = ""
    """Folder of the data set."""
    layout: str = "auto"
    """auto, or one of cityscapes, acdc, darkzurich, synthia, mapillary, bdd100k, camvid, gta5, folder."""
    split: str = "train"
    """train, val, test, or all for every split that exists."""
    condition: str = ""
    """A part of the split: fog, night, rain, snow (acdc); day, twilight, night (darkzurich); day, dusk (camvid)."""
    resize: tuple[int, int] | None = None
    """Width and height of the box that images are resized into, keeping their ratio; null keeps their size."""
    classes: str = ""
    """Classes file of a `folder` data set, if it does not lie in its root as classes.json, .yaml or .txt."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.layout not in ("auto", *LAYOUTS):
            found.append(f"--{where}.layout must be auto or one of {', '.join(LAYOUTS)} (it is {self.layout!r})")
        if not self.split:
            found.append(f"--{where}.split must not be empty; give train, val, test or all")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            found.append(f"--{where}.resize must be width and height > 0, or null (it is {list(self.resize)})")
        if self.classes and self.layout not in ("auto", "folder"):
            found.append(f"--{where}.classes has no effect with --{where}.layout {self.layout}; leave one out")
        return found


def build_index(
    config: DomainConfig, labelled: bool, option: str, cache: Path | None = None, report: Report | None = None
) -> Index:
    """Check a data set, or take the results of the last check for files that have not changed since.

    Args:
        config: where the data set is.
        labelled: read the labels too; an unlabelled index never opens them.
        option: prefix of the option names in errors, such as data.source.
        cache: folder for the results; the default is $SSR_FAST_CACHE/index or ~/.cache/ssr_fast/index.
        report: takes one-line messages.

    Raises:
        UserError: nothing to read, or bad files: the first is named, the others are counted.
    """
    tell = report or _silent
    index = usable(diagnose(config, labelled, option, cache, tell), config, option, tell)
    if index.layout.store is not None:
        check_sizes(index.layout.store, config.resize, option)
    return index


def usable(diagnosis: Diagnosis, config: DomainConfig, option: str, report: Report) -> Index:
    """What training reads of a data set; tells what is left out and what is unusual. Arguments as of `build_index`.

    Raises:
        UserError: bad files.
    """
    command = _check_command(config, diagnosis.labelled)
    if diagnosis.fatal:
        more = len(diagnosis.fatal) - 1
        lists = f" (and {more} more, which `{command}` lists)" if more else ""
        raise UserError(f"{option_name(option, 'root')} {config.root}: {diagnosis.fatal[0]}{lists}")
    if diagnosis.rows:
        report(
            f"{len(diagnosis.rows)} file(s) of {config.root} left out, the first because "
            f"{printable(diagnosis.rows[0].path)} {diagnosis.rows[0].problem}; `{command}` lists them"
        )
    for note in diagnosis.notes:
        report(note)
    return diagnosis.index()


def diagnose(
    config: DomainConfig,
    labelled: bool,
    option: str = "",
    cache: Path | None = None,
    report: Report | None = None,
    again: bool = False,
) -> Diagnosis:
    """Check every file of a data set and collect all that is wrong; arguments as for `build_index`.

    Args:
        again: read a prepared store through, even if it was whole before and has not changed.

    Raises:
        UserError: the root, layout, split, condition or classes file is wrong, so that there are no files to check.
    """
    if not config.root:
        raise UserError(f"{option_name(option, 'root')} is missing; give the data set's folder")
    root = expanded(Path(config.root), option)
    if is_store(root):
        wanted = {name: getattr(config, name) for name in ("layout", "split", "condition", "classes")}
        return diagnose_store(root, wanted, labelled, option, report or _silent, again)
    layout = find_layout(Path(config.root), config.layout, config.classes, option)
    if labelled and not layout.classes.count:
        raise UserError(
            f"{option_name(option, 'root')} {config.root} has no classes file, which the layout folder needs for its "
            f"labels; write the class names into {layout.root / 'classes.json'} (for a numbered GTA5 copy give "
            f"{option_name(option, 'layout')} gta5)"
        )
    listing = layout.listing(config.split, config.condition, option)
    if not listing.entries:
        asked = f"split {config.split}" + f", condition {config.condition}" * bool(config.condition)
        raise UserError(
            f"{option_name(option, 'root')} {config.root} holds no images ({layout.name}, {asked}); check both"
        )
    rows = _pairing_problems(listing, labelled, layout)
    bad = {row.path for row in rows if row.fatal}
    entries = [entry for entry in listing.entries if entry.image not in bad and not (labelled and entry.label is None)]
    file = index_cache.cache_file(cache or default_folder(), layout, config.split, config.condition, labelled)
    checked, bad_files = _check_all(entries, layout, labelled, file, report or _silent)
    samples = tuple(_sample(entry, row, labelled) for entry, row in checked)
    rows += bad_files + _data_set_problems(samples, layout, rows + bad_files)
    return Diagnosis(
        layout=layout,
        labelled=labelled,
        rows=tuple(sorted(rows, key=lambda row: (not row.fatal, str(row.path)))),
        samples=samples,
        notes=_notes(checked, samples, layout.classes),
        images=len(listing.entries),
        labels=sum(entry.label is not None for entry in listing.entries),
    )


def _pairing_problems(listing: Listing, labelled: bool, layout: Layout) -> list[Problem]:
    """Images that share a name, images without label, images with two labels, labels without image."""
    advice = "restore the folder that it leads to (is its disk there?) or remove it"
    rows = [Problem(path, "is a link that leads nowhere", advice) for path in listing.lost]
    for one, two in zip(listing.entries, listing.entries[1:], strict=False):
        if one.name == two.name:
            rows.append(
                Problem(
                    two.image,
                    f"has the same name as {printable(Path(one.image.name))}",
                    "rename or remove one of the two",
                )
            )
    if not labelled:
        return rows
    missing = [entry.image for entry in listing.entries if entry.label is None]
    if len(missing) == len(listing.entries) > 1:
        problem = f"has no labels at all for the {len(missing)} images of this split (layout {layout.name})"
        return [*rows, Problem(layout.root, problem, "add them, or check it as unlabelled")]
    rows += [Problem(image, "has no label", "add its label or remove the image") for image in missing]
    rows += [
        Problem(two, f"is a second label for the image of {printable(Path(one.name))}", "remove one of the two")
        for one, two in listing.rivals
    ]
    return rows + [Problem(path, "has no image", "add its image", fatal=False) for path in listing.orphans]


class _LeftOut(BadFile):
    """A file that is no reason to stop: training does without it."""


def _check(entry: Entry, layout: Layout, labelled: bool, stamp: index_cache.Stamp, room: DecodeRoom) -> Row:
    """Open one image and its label completely, one after the other, each when there is room for it.

    Raises:
        BadFile: what is wrong with one of them.
    """
    with room.taken(entry.image):
        image, notes = decode_image(entry.image)
        height, width = image.shape[:2]
        del image  # before another one takes its place
    if not labelled or entry.label is None:
        return Row(stamp, width, height, None, notes)
    with room.taken(entry.label):
        label = layout.read_label(entry.label)
        counts = _class_counts(label, layout.classes.count)
    if label.shape != (height, width):
        kind = _LeftOut if layout.name == "gta5" else BadFile
        name = printable(Path(entry.image.name))
        size = f"is {label.shape[1]}x{label.shape[0]} and its image {name} is {width}x{height} pixels"
        raise kind(entry.label, size, "remove the pair or restore both files from their source")
    if not any(counts):
        advice = "remove the pair, or check that the label belongs to this data set"
        raise BadFile(entry.label, "is ignored everywhere: no pixel of it has a class", advice)
    return Row(stamp, width, height, counts, notes)


def _class_counts(label: NDArray[np.uint8], class_count: int) -> tuple[int, ...]:
    """Pixels of each class, [K], a few at a time: NumPy counts in copies of 8 bytes a pixel."""
    flat = label.ravel()
    parts = [np.bincount(flat[k : k + _STRIP], minlength=256) for k in range(0, flat.size, _STRIP)]
    return tuple(np.sum(parts, axis=0)[:class_count].tolist())


def _check_all(
    entries: Sequence[Entry], layout: Layout, labelled: bool, file: Path, report: Report
) -> tuple[list[tuple[Entry, Row]], list[Problem]]:
    """Check the entries that changed since the results in `file`, in parallel; what is done is kept if interrupted."""
    known = index_cache.load(file, layout.classes.count, report)
    stamps = {entry.name: index_cache.stamp(entry, layout.root, labelled) for entry in entries}
    kept = {name: known[name] for name, stamp in stamps.items() if name in known and known[name].stamp == stamp}
    to_check = [entry for entry in entries if entry.name not in kept]
    if to_check:
        report(f"checking {len(to_check)} of {len(entries)} files of {layout.root}")
    rows = dict(kept)
    problems: list[Problem] = []
    room = DecodeRoom()

    def check(entry: Entry) -> Row | Problem:
        stamp = stamps[entry.name] or index_cache.Stamp(0, 0, "", 0, 0)  # no stamp: the check names the reason
        try:
            return _check(entry, layout, labelled, stamp, room)
        except BadFile as error:  # which must not wait in the queue: its traceback holds the decoder's memory
            return Problem(error.path, error.problem, error.advice, fatal=not isinstance(error, _LeftOut))

    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
    try:
        with _quiet_decoders():
            for entry, result in zip(to_check, pool.map(check, to_check), strict=True):
                if isinstance(result, Problem):
                    problems.append(result)
                else:
                    rows[entry.name] = result
    finally:
        pool.shutdown(cancel_futures=True)
        if rows != known:
            index_cache.save(file, rows, report)
    return [(entry, rows[entry.name]) for entry in entries if entry.name in rows], problems


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Without Pillow's warnings, which name no file: what matters of them comes back as a problem that does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _data_set_problems(samples: Sequence[Sample], layout: Layout, rows: Sequence[Problem]) -> list[Problem]:
    """What only all files together show: nothing is left, or a 0/255 mask whose 255 was read as 'ignored'."""
    if not samples and not any(row.fatal for row in rows):
        return [Problem(layout.root, "has no usable image", "see the files that are left out")]
    total = total_counts(samples)
    if layout.classes.count == 2 and len(total) == 2:
        ignored = sum(sample.width * sample.height for sample in samples) - int(total.sum())
        if total[1] == 0 and ignored:
            problem = f"has no pixel of the class {layout.classes.names[1]} but {ignored} ignored ones"
            advice = 'if 255 is the second class, write "ids": {"0": 0, "255": 1} into the classes file'
            return [Problem(layout.root, problem, advice)]
    return []


def _notes(checked: Sequence[tuple[Entry, Row]], samples: Sequence[Sample], classes: ClassSet) -> tuple[str, ...]:
    """One sentence for each kind of conversion, and for classes that never occur."""
    by_note: dict[str, list[Path]] = defaultdict(list)
    for entry, row in checked:
        for note in row.notes:
            by_note[note].append(entry.image)
    notes = [
        f"{len(images)} of {len(checked)} images: {note} (the first is {printable(images[0])})"
        for note, images in sorted(by_note.items())
    ]
    absent = [classes.names[k] for k in np.flatnonzero(total_counts(samples) == 0)]
    if absent:
        notes.append(f"no label holds the class{'es' * (len(absent) > 1)} {', '.join(absent)}")
    return tuple(notes)


def _sample(entry: Entry, row: Row, labelled: bool) -> Sample:
    label = str(entry.label) if labelled else None
    return Sample(entry.name, str(entry.image), label, row.width, row.height, row.counts)


def _check_command(config: DomainConfig, labelled: bool) -> str:
    """The command line that lists all problems of this data set."""
    words = ["python", "-m", "ssr_fast.prepare", "check", config.root]
    for name, default in (("layout", "auto"), ("split", "train"), ("condition", ""), ("classes", "")):
        if getattr(config, name) != default:
            words += [f"--{name}", getattr(config, name)]
    return shlex.join(words + ["--unlabelled"] * (not labelled))


def _silent(_: str) -> None:
    """No messages."""
