"""What a look at a data set finds: its good samples, and what is wrong with the other files.

Legend: K classes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.images import printable
from ssr_fast.data.labels import ClassSet
from ssr_fast.data.layouts import Layout


@dataclass(frozen=True)
class Sample:
    """A checked image.

    Args:
        name: unique in the index.
        image: path of the image.
        label: path of the label; None in an unlabelled index.
        width, height: pixels, as stored.
        counts: pixels of each class, [K]; None in an unlabelled index.
    """

    name: str
    image: str
    label: str | None
    width: int
    height: int
    counts: tuple[int, ...] | None


@dataclass(frozen=True)
class Index:
    """A checked data set; `digest` is a sha256 over names, sizes, counts and classes, wherever the files lie."""

    classes: ClassSet
    layout: Layout
    samples: tuple[Sample, ...]
    digest: str


@dataclass(frozen=True)
class Problem:
    """A file that is bad (`fatal`) or left out: `path`, the `problem` as a predicate, and `advice` what to do."""

    path: Path
    problem: str
    advice: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{printable(self.path)} {self.problem}; {self.advice}"


@dataclass(frozen=True)
class Diagnosis:
    """All that was found at a root.

    Args:
        layout: the layout that was found.
        labelled: labels were checked.
        rows: bad and left-out files, sorted by path.
        samples: good files, sorted by name.
        notes: what is unusual but used, in sentences.
        images, labels: files in the split.
    """

    layout: Layout
    labelled: bool
    rows: tuple[Problem, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    images: int
    labels: int

    @property
    def fatal(self) -> tuple[Problem, ...]:
        """The rows that keep training from starting."""
        return tuple(row for row in self.rows if row.fatal)

    def index(self) -> Index:
        """The good files as an index."""
        return Index(self.layout.classes, self.layout, self.samples, _digest(self.layout.classes, self.samples))


def total_counts(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """Pixels of each class over the data set, [K]; empty for an unlabelled one."""
    counts = [sample.counts for sample in samples if sample.counts is not None]
    return np.array(counts, np.int64).sum(0) if counts else np.zeros(0, np.int64)


def _digest(classes: ClassSet, samples: Sequence[Sample]) -> str:
    content = [classes.names, [(s.name, s.width, s.height, s.counts) for s in samples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
