"""Which samples a step sees: a pure function of (seed, step, rank, world).

Nothing is drawn inside a loader, so every loader sees the same samples and a resumed run needs the step number only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.geometry import fitted_size
from ssr_fast.data.index import Index

TRIES = 10  # candidate crops a view; the first that satisfies the source's conditions is taken
_KEPT_ORDERS = 4
_SOURCE, _TARGET, _ORDER = 1, 2, 4  # streams of the generator


@dataclass(kw_only=True)
class SamplingConfig:
    """How samples are drawn; the options `--data.sampling.*`. The shares are DAFormer's pixel numbers made relative."""

    rare_class: bool = True
    """Draw source images by class, rare classes first (P(c) = softmax((1 - f_c) / temperature))."""
    temperature: float = 0.01
    """Temperature of the rare-class distribution."""
    min_share: float = 0.0015
    """A source file counts as holding a class from this share of its pixels on (3000 px of GTA5's 1914x1052)."""
    min_crop_share: float = 0.0057
    """A crop drawn for a class should hold it in this share of its pixels (1500 px of 512x512)."""
    max_class_share: float = 0.75
    """A source crop should not be filled by one class beyond this share of its labelled pixels."""
    flip: float = 0.5
    """Probability of mirroring left to right."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.temperature <= 0:
            found.append(f"--{where}.temperature must be > 0 (it is {self.temperature})")
        for name in ("min_share", "min_crop_share", "max_class_share", "flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                found.append(f"--{where}.{name} must lie in [0, 1] (it is {getattr(self, name)})")
        return found


@dataclass(frozen=True)
class View:
    """One sample of a batch before its pixels are read.

    Attributes:
        index: number of the sample in its index.
        size: (width, height) that the image is resized to.
        corners: candidate crop corners (x, y) in the resized image, in order of preference.
        flip: mirror the crop left to right.
        rare_class: the class that this view was drawn for, -1 if none.
    """

    index: int
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    flip: bool
    rare_class: int


@dataclass(frozen=True)
class StepPlan:
    """The views of one rank in one step."""

    source: tuple[View, ...]
    target: tuple[View, ...]


def rare_class_probabilities(counts: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """P(c) = softmax((1 - f_c) / temperature) over the classes that occur.

    Args:
        counts: pixels of each class over the source set, [K].

    Returns:
        float64 [K], 0 for classes that do not occur.
    """
    frequency = counts / max(1, counts.sum())
    logits = np.where(counts > 0, (1.0 - frequency) / temperature, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Plan:
    """The samples of every step of a run.

    Args:
        seed: the run's seed.
        source, target: the checked data sets; without a source its part of every step is empty.
        source_box, target_box: resize boxes (width, height) or None.
        crop: (height, width) of a crop; None takes the whole resized image (all images of one size then).
        batch: images a domain and rank.
        sampling: how to draw.
    """

    def __init__(
        self,
        seed: int,
        source: Index | None,
        target: Index,
        source_box: tuple[int, int] | None,
        target_box: tuple[int, int] | None,
        crop: tuple[int, int],
        batch: int,
        sampling: SamplingConfig,
    ) -> None:
        self.seed, self.batch, self.crop, self.sampling = seed, batch, crop, sampling
        samples = source.samples if source is not None else ()
        self._source_sizes = [fitted_size(s.width, s.height, source_box) for s in samples]
        self._target_sizes = [fitted_size(s.width, s.height, target_box) for s in target.samples]
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._probabilities, self._files = None, None
        if sampling.rare_class and samples:
            counts = np.array([sample.counts for sample in samples], np.int64)  # [files, K]
            self._probabilities = rare_class_probabilities(counts.sum(0), sampling.temperature)
            share = counts / np.array([[s.width * s.height] for s in samples])
            self._files = [_files_with(share[:, k], sampling.min_share) for k in range(counts.shape[1])]

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> StepPlan:
        """The views of `rank` in `step` (both counted from 0) among `world` ranks."""
        first = (step * world + rank) * self.batch
        source = tuple(self._source_view(first + slot) for slot in range(self.batch if self._source_sizes else 0))
        target = tuple(self._target_view(first + slot) for slot in range(self.batch))
        return StepPlan(source, target)

    def _generator(self, stream: int, position: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream], counter=[0, 0, 0, position]))

    def _order(self, stream: int, epoch: int, count: int) -> NDArray[np.int64]:
        """The permutation of an epoch; a few are kept, for a batch may reach from one into the next."""
        if (stream, epoch) not in self._orders:
            if len(self._orders) >= _KEPT_ORDERS:
                self._orders.clear()
            self._orders[stream, epoch] = self._generator(stream + _ORDER, epoch).permutation(count)
        return self._orders[stream, epoch]

    def _in_order(self, stream: int, position: int, count: int) -> int:
        """Epoch by epoch through a fresh permutation: no image twice before all were seen once."""
        return int(self._order(stream, position // count, count)[position % count])

    def _source_view(self, position: int) -> View:
        rng = self._generator(_SOURCE, position)
        rare_class = -1
        if self._probabilities is not None and self._files is not None:
            rare_class = int(rng.choice(len(self._probabilities), p=self._probabilities))
            index = int(rng.choice(self._files[rare_class]))
        else:
            index = self._in_order(_SOURCE, position, len(self._source_sizes))
        return self._view(rng, index, self._source_sizes[index], TRIES, rare_class)

    def _target_view(self, position: int) -> View:
        index = self._in_order(_TARGET, position, len(self._target_sizes))
        return self._view(self._generator(_TARGET, position), index, self._target_sizes[index], 1, -1)

    def _view(self, rng: np.random.Generator, index: int, size: tuple[int, int], tries: int, rare_class: int) -> View:
        spare = max(0, size[0] - self.crop[1]), max(0, size[1] - self.crop[0])
        corners = tuple((int(x), int(y)) for x, y in rng.integers(0, [spare[0] + 1, spare[1] + 1], (tries, 2)))
        if spare == (0, 0):
            corners = corners[:1]
        return View(index, size, corners, bool(rng.random() < self.sampling.flip), rare_class)


def _files_with(share: NDArray[np.float64], min_share: float) -> NDArray[np.int64]:
    """Files that hold a class in at least min_share of their pixels; if there are none, those that hold it at all."""
    files = np.flatnonzero(share >= max(min_share, 1e-12))
    return files if len(files) else np.flatnonzero(share > 0)


def acceptable(
    label: NDArray[np.uint8], rare_class: int, sampling: SamplingConfig, pixels: int, ignore: int = 255
) -> bool:
    """Whether a source crop satisfies the conditions of its view.

    Args:
        label: train ids of what of the crop lies inside of the image, uint8 [h, w].
        rare_class: that the view was drawn for, -1 if none.
        sampling: the conditions.
        pixels: of the whole crop.
        ignore: train id that does not count.
    """
    # most candidates fail here, and to count one class takes a tenth of the time of all
    if rare_class >= 0 and np.count_nonzero(label == rare_class) < sampling.min_crop_share * pixels:
        return False
    known = np.delete(np.bincount(label.ravel(), minlength=256), ignore)
    return bool(known.max() <= sampling.max_class_share * max(1, known.sum()))
