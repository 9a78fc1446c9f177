"""What the index remembers of files it has checked: one JSON file a data set, split and class set."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ssr_fast.data.cache import Report, write_text
from ssr_fast.data.layouts import Entry, Layout

_VERSION = 2  # to be raised whenever the check of a file changes, so that old results do not count


@dataclass(frozen=True)
class Stamp:
    """What a file pair looked like when it was checked; a change of any part means that it is checked again."""

    image_size: int
    image_mtime_ns: int
    label: str
    label_size: int
    label_mtime_ns: int


@dataclass(frozen=True)
class Row:
    """A good image: width and height in pixels, pixels of each class (None without label), notes on its decoding."""

    stamp: Stamp
    width: int
    height: int
    counts: tuple[int, ...] | None
    notes: tuple[str, ...]


def cache_file(folder: Path, layout: Layout, split: str, condition: str, labelled: bool) -> Path:
    """The file for one data set, split, condition and reading of the labels."""
    key = [str(layout.root.resolve()), layout.name, split, condition, labelled, _VERSION]
    key += [layout.classes.names, layout.classes.colors, hashlib.sha256(layout.table.tobytes()).hexdigest()]
    return folder / f"{layout.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"


def stamp(entry: Entry, root: Path, labelled: bool) -> Stamp | None:
    """The stamp of a pair as it is now; None if a file cannot be looked at."""
    try:
        image = os.stat(entry.image)
        if not labelled or entry.label is None:
            return Stamp(image.st_size, image.st_mtime_ns, "", 0, 0)
        label = os.stat(entry.label)
    except OSError:
        return None
    name = entry.label.relative_to(root).as_posix()
    return Stamp(image.st_size, image.st_mtime_ns, name, label.st_size, label.st_mtime_ns)


def load(path: Path, class_count: int, report: Report) -> dict[str, Row]:
    """Name -> row. A damaged file is reported in one line and counts as empty."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="ascii"))
        return {name: _row(fields, class_count) for name, fields in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        report(f"the index cache {path} is damaged ({type(error).__name__}: {reason}) and is built anew")
        return {}


def save(path: Path, rows: Mapping[str, Row], report: Report) -> None:
    """Write atomically; a folder that cannot be written is reported in one line, for it costs time only."""
    try:
        write_text(path, json.dumps({name: asdict(row) for name, row in rows.items()}))
    except OSError as error:
        report(f"the index cache {path.parent} cannot be written ({error.strerror}); files are checked at every start")


def _row(fields: Mapping[str, object], class_count: int) -> Row:
    """One row of the file, checked field by field: a cache is a file that anything may have written to."""
    stamp_fields, counts, notes = fields["stamp"], fields["counts"], fields["notes"]
    width, height = fields["width"], fields["height"]
    if not isinstance(stamp_fields, dict) or not isinstance(notes, list):
        raise ValueError("a row lacks its stamp or notes")
    if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
        raise ValueError("a row has no size")
    if counts is not None:
        if not isinstance(counts, list) or len(counts) != class_count or not all(isinstance(n, int) for n in counts):
            raise ValueError("a row has wrong class counts")
        counts = tuple(counts)
    return Row(Stamp(**stamp_fields), width, height, counts, tuple(str(note) for note in notes))
