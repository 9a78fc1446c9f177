"""DAFormer's three files of class statistics, which users already have beside their data sets.

sample_class_stats.json       [{"<train id>": pixels, ..., "file": label}, ...]
sample_class_stats_dict.json  {label: {"<train id>": pixels, ...}, ...}
samples_with_class.json       {"<train id>": [[label, pixels], ...], ...}
Only classes with pixels are written. Labels are called by the names that DAFormer's conversion gives them
(*_labelTrainIds.png). Source of the format: lhoyer/DAFormer, tools/convert_datasets.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssr_fast.data.index import Index, Sample
from ssr_fast.errors import UserError

STATS_FILE = "sample_class_stats.json"
"""The file of the three that the other two can be derived from."""

STATS_FILES = (STATS_FILE, "sample_class_stats_dict.json", "samples_with_class.json")

_CONVERTED = "_labelTrainIds.png"


def write_rcs_files(index: Index, folder: Path) -> None:
    """Write the three files into `folder`.

    Raises:
        UserError: the index is unlabelled, or the folder cannot be written.
    """
    by_label: dict[str, dict[str, int]] = {}
    for sample in index.samples:
        if sample.label is None or sample.counts is None:
            raise UserError("class statistics need labels; leave out --unlabelled")
        by_label[_converted(sample.label)] = {str(k): n for k, n in enumerate(sample.counts) if n > 0}
    with_class: dict[str, list[tuple[str, int]]] = {}
    for label, counts in by_label.items():
        for train_id, pixels in counts.items():
            with_class.setdefault(train_id, []).append((label, pixels))
    rows = [{**counts, "file": label} for label, counts in by_label.items()]
    contents = dict(zip(STATS_FILES, (rows, by_label, with_class), strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"class statistics cannot be written to {folder} ({error.strerror}); give another folder"
        ) from error


def read_rcs_files(folder: Path, index: Index) -> tuple[tuple[int, ...], ...]:
    """Pixels of each class for every sample of `index`, [samples][K], from the files in `folder`.

    Raises:
        UserError: the file is missing or damaged, does not cover a sample, names a class that does not exist, or
            contradicts the counts that the index has.
    """
    path = folder / STATS_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = {_file_name(row["file"]): row for row in rows}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); write it first") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a list of class statistics ({type(error).__name__}); write it anew") from error
    return tuple(_counts(known, sample, index.classes.count, path) for sample in index.samples)


def _counts(known: Mapping[str, Any], sample: Sample, class_count: int, path: Path) -> tuple[int, ...]:
    """The counts of one sample, [K]."""
    row = known.get(_file_name(_converted(sample.label))) if sample.label else None
    if row is None:
        raise UserError(f"{path} does not cover {sample.label or sample.image}; write it anew")
    counts = [0] * class_count
    for key, pixels in row.items():
        if key == "file":
            continue
        if not key.isdecimal() or int(key) >= class_count or not isinstance(pixels, int):
            raise UserError(
                f"{path} gives {key}: {pixels} for {sample.label}, while train ids are 0..{class_count - 1}; "
                f"write it anew"
            )
        counts[int(key)] = pixels
    if sample.counts is not None and tuple(counts) != sample.counts:
        raise UserError(f"{path} contradicts {sample.label}; write it anew")
    return tuple(counts)


def _converted(label: str) -> str:
    """The name that DAFormer's conversion gives a label file."""
    stem = str(Path(label).with_suffix(""))
    return stem.removesuffix("_labelTrainIds").removesuffix("_labelIds") + _CONVERTED


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]
