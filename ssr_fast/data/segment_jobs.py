"""Makes the maps of a store, image by image, in this process or in several; the result does not depend on how many.

H W pixels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data import stores
from ssr_fast.data.images import BadFile, opened, read_image
from ssr_fast.data.processes import in_processes
from ssr_fast.data.segments import SegmentStore

Generator = Callable[[Path, NDArray[np.uint8]], NDArray[np.uint16]]
"""(path, RGB uint8 [H, W, 3]) -> segments uint16 [H, W]; raises BadFile for an image that it cannot do."""

Visit = Callable[[Path, NDArray[np.uint8], NDArray[np.uint16]], None]
"""Takes (path, image, segments) of every image, in the process that did it."""


@dataclass(frozen=True)
class Outcome(stores.Outcome):
    """What became of one image: `segments` in the new map, and the share of its pixels that is `covered` by one."""

    segments: int = 0
    covered: float = 0.0


@dataclass(frozen=True)
class Task:
    """One image and what makes its map."""

    image: Path
    generate: Generator


def make_maps(
    store: SegmentStore, tasks: Sequence[Task], workers: int, overwrite: bool = False, visit: Visit | None = None
) -> Iterator[Outcome]:
    """Make every map that is missing, damaged or of another size; in the tasks' order.

    Args:
        store: where the maps go.
        tasks: the images.
        workers: processes; 0 works in this one, which a generator with a network wants.
        overwrite: make the maps that are there, too.
        visit: is called for kept maps too.

    Raises:
        UserError: the store cannot be written, or a process was killed.
    """
    yield from in_processes(_Job(store, overwrite, visit), tasks, workers, "segment maps")


@dataclass(frozen=True)
class _Job:
    """One task's work; goes to the processes."""

    store: SegmentStore
    overwrite: bool
    visit: Visit | None

    def __call__(self, task: Task) -> Outcome:
        try:
            return self._run(task)
        except BadFile as error:
            return Outcome(task.image, "failed", str(error))

    def _run(self, task: Task) -> Outcome:
        path, message = self.store.path(task.image), ""
        if not self.overwrite and os.path.lexists(path):
            with opened(task.image) as header:
                size = header.size
            problem = self.store.problem(task.image, size)
            if problem is None:
                if self.visit is not None:
                    self.visit(task.image, read_image(task.image), self.store.read(task.image))
                return Outcome(task.image, "kept")
            message = f"the segment map {path} {problem}; it is made again"
        image = read_image(task.image)
        segments = task.generate(task.image, image)
        self.store.write(task.image, segments)
        if self.visit is not None:
            self.visit(task.image, image, segments)
        there = np.bincount(segments.ravel(), minlength=2)
        return Outcome(task.image, "made", message, int((there[1:] > 0).sum()), 1.0 - float(there[0]) / segments.size)
