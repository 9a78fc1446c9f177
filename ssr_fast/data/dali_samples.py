"""What a step reads, as DALI takes it: pixels or JPEG files of a prepared store, and the other parts of a batch.

H W pixels of the crop.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.dali_loader import Output
from ssr_fast.data.geometry import crop_image, fitted_size, resize_image
from ssr_fast.data.index import Index
from ssr_fast.data.plan import StepPlan, View
from ssr_fast.data.samples import Corner, Parts, StepSamples


class DaliSamples(StepSamples):
    """One view of each domain at a time; arguments as of StepSamples."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.slots, self.crop = self.plan.batch, self.plan.crop
        self._last: tuple[int, StepPlan] | None = None
        outputs = [*self._outputs("source", self.source_index, "source_label"), *self._outputs(
            "target", self.target_index, "target_valid", *["target_segments"] * (self.segments is not None)
        )]  # fmt: skip
        self.outputs = tuple(outputs)

    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        """The arrays of a slot, in the order of the outputs."""
        if self._last is None or self._last[0] != step:
            self._last = step, self.views(step)
        plan = self._last[1]
        parts = (self.source(plan.source[slot]) if plan.source else {}) | self.target(plan.target[slot])
        return tuple(parts[name] for output in self.outputs for name in names(output))

    def _outputs(self, domain: str, index: Index | None, *arrays: str) -> list[Output]:
        if index is None:
            return []
        store = index.layout.store
        found = [Output(f"{domain}_image", "jpeg" if store is not None and store.is_jpeg else "pixels")]
        view = getattr(self.views(0), domain)[0]
        kept = self._features(domain, getattr(self, f"{domain}_features"), index, view, view.corners[0])
        return found + [Output(name, "array") for name in (*arrays, *kept)]

    def _pixels(self, part: str, index: Index, view: View, corner: Corner) -> Parts:
        """The crop before it is mirrored, or where it lies in a JPEG file."""
        path, store, flip = index.samples[view.index].image, index.layout.store, np.array([view.flip], np.uint8)
        if store is None or not store.is_jpeg:
            image = resize_image(index.layout.read_image(path), view.size)
            return {part: crop_image(image, corner, self.crop, False), f"{part}_flip": flip}
        inside = [min(self.crop[axis], view.size[1 - axis] - corner[1 - axis]) for axis in (0, 1)]
        where: Parts = {"corner": np.array(corner[::-1], np.int32), "shape": np.array(inside, np.int32), "flip": flip}
        return {part: store.jpeg(path)} | {f"{part}_{name}": value for name, value in where.items()}


def names(output: Output) -> tuple[str, ...]:
    """The arrays of an output, by name."""
    more = {"array": (), "pixels": ("flip",), "jpeg": ("corner", "shape", "flip")}[output.kind]
    return output.part, *(f"{output.part}_{name}" for name in more)


def unsuitable(index: Index, box: tuple[int, int] | None, option: str) -> str | None:
    """Why DALI cannot read a data set, in a sentence; None if it can.

    Args:
        box: (width, height) that images are resized into.
        option: the option's name, for the sentence.
    """
    store = index.layout.store
    if store is None:
        return (
            f"--{option}.root {index.layout.root} is no prepared store (`python -m ssr_fast.prepare store` makes one)"
        )
    if store.is_jpeg and any(fitted_size(row.width, row.height, box) != row.stored for row in store.rows):
        return f"--{option}.root {index.layout.root} holds JPEG files of another size than --{option}.resize asks for"
    return None
