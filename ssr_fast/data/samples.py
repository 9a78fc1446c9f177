"""What a step reads, the same for every loader: views of images, labels, segments and features, as the plan says.

H W pixels of the crop, h w tokens, D channels.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.features import FeatureStore
from ssr_fast.data.geometry import crop_image, crop_label, resize_image, resize_label
from ssr_fast.data.index import Index
from ssr_fast.data.plan import Plan, StepPlan, View, acceptable
from ssr_fast.data.residents import Residents
from ssr_fast.data.segments import SegmentStore
from ssr_fast.data.store import ImageStore
from ssr_fast.errors import UserError

_Read = TypeVar("_Read")
Corner = tuple[int, int]
Parts = dict[str, NDArray[Any]]
"""Parts of a Batch, by name, of one view."""


class StepSamples:
    """The samples of every step, for one rank.

    Args:
        plan: which samples.
        source, target: the checked data sets; without a source there is nothing of it in a step.
        rank, world: of this process.
        cache: keep decoded and resized images, labels and segments.
        segments: of the target, or the prepared store that holds them; None leaves `target_segments` out.
        source_features, target_features: stores of whole images' features, or where these are in another memory; None
            leaves these parts out.
    """

    def __init__(
        self,
        plan: Plan,
        source: Index | None,
        target: Index,
        rank: int = 0,
        world: int = 1,
        cache: bool = False,
        segments: SegmentStore | ImageStore | None = None,
        source_features: FeatureStore | Residents | None = None,
        target_features: FeatureStore | Residents | None = None,
    ) -> None:
        self.plan, self.source_index, self.target_index = plan, source, target
        self.rank, self.world, self.segments = rank, world, segments
        self.source_features, self.target_features = source_features, target_features
        self._cache: dict[tuple[str, int], Any] | None = {} if cache else None

    def views(self, step: int) -> StepPlan:
        """The plan of a step."""
        return self.plan(step, self.rank, self.world)

    def files(self, step: int) -> list[str]:
        """The images of a step, for messages."""
        plan, indices = self.views(step), (self.source_index, self.target_index)
        views = ((plan.source, indices[0]), (plan.target, indices[1]))
        return [index.samples[view.index].image for part, index in views if index is not None for view in part]

    def source(self, view: View) -> Parts:
        """image and label of the first candidate crop that satisfies the view's conditions, else of the last; features
        where they are kept."""
        index = self.source_index
        assert index is not None
        label, size = self._label(index, view), self.plan.crop
        for corner in view.corners:  # looked at in place: neither the mirror nor the padding changes the verdict
            inside = label[corner[1] : corner[1] + size[0], corner[0] : corner[0] + size[1]]
            if acceptable(inside, view.rare_class, self.plan.sampling, size[0] * size[1]):
                break
        parts = self._pixels("source_image", index, view, corner)
        parts["source_label"] = crop_label(label, corner, size, view.flip)
        return parts | self._features("source", self.source_features, index, view, corner)

    def target(self, view: View) -> Parts:
        """image, what of it is valid, segments and features where they are kept."""
        index, corner, size = self.target_index, view.corners[0], self.plan.crop
        parts = self._pixels("target_image", index, view, corner)
        valid = np.zeros(size, np.bool_)
        valid[: max(0, view.size[1] - corner[1]), : max(0, view.size[0] - corner[0])] = True
        parts["target_valid"] = np.ascontiguousarray(valid[:, ::-1]) if view.flip else valid
        if self.segments is not None:
            cut = crop_label(self._segments(view, self.segments), corner, size, view.flip, outside=0)
            parts["target_segments"] = cut.astype(np.int32)  # PyTorch does next to nothing in uint16
        return parts | self._features("target", self.target_features, index, view, corner)

    def _pixels(self, part: str, index: Index, view: View, corner: Corner) -> Parts:
        """The crop of an image, uint8 [H, W, 3]."""
        path = index.samples[view.index].image
        image = self._kept((path, 0), lambda: resize_image(index.layout.read_image(path), view.size))
        return {part: crop_image(image, corner, self.plan.crop, view.flip)}

    def _label(self, index: Index, view: View) -> NDArray[np.uint8]:
        sample = index.samples[view.index]
        label = sample.label
        if label is None:
            raise UserError(f"{sample.image} has no label: the source needs one for every image")
        return self._kept((label, 1), lambda: resize_label(index.layout.read_label(label), view.size))

    def _segments(self, view: View, store: SegmentStore | ImageStore) -> NDArray[np.uint16]:
        """The segments of a target view, resized as a label is."""
        sample = self.target_index.samples[view.index]

        def read() -> NDArray[np.uint16]:
            if isinstance(store, ImageStore):
                return resize_label(store.segments(sample.image), view.size)
            return resize_label(store.read(sample.image, (sample.width, sample.height)), view.size)

        return self._kept((sample.image, 2), read)

    def _features(
        self, domain: str, store: FeatureStore | Residents | None, index: Index, view: View, corner: Corner
    ) -> Parts:
        """The stored features of a view [h, w, D], cut and flipped as its image is, or where they are."""
        if store is None:
            return {}
        sample = index.samples[view.index]
        if isinstance(store, Residents):
            places = store.places(sample.image, view.size, corner, self.plan.crop, view.flip)
            return {f"{domain}_places": places}
        key = str(store.path(sample.image)), 3
        stored = self._kept(key, lambda: store.read(sample.image, (sample.width, sample.height)))
        return {f"{domain}_features": stored.cut(view.size, corner, self.plan.crop, view.flip)}

    def _kept(self, key: tuple[str, int], read: Callable[[], _Read]) -> _Read:
        """What `read` returns, from the cache if there is one."""
        if self._cache is None:
            return read()
        if key not in self._cache:
            self._cache[key] = read()
        kept: _Read = self._cache[key]
        return kept
