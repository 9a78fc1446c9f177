"""Superpixels as segments, for those without SAM's weights: regions of like colour that mostly respect objects.

H W pixels, S segments.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.segments import compact
from ssr_fast.data.stores import Recipe

ALGORITHMS = ("felzenszwalb", "slic")


@dataclass(kw_only=True, frozen=True)
class SuperpixelConfig:
    """How an image is cut into superpixels; the options of `prepare masks --generator superpixels`."""

    algorithm: str = field(
        default="felzenszwalb",
        metadata={
            "help": "felzenszwalb: large areas stay whole, thin things stay apart. slic: a given number of like size"
        },
    )
    scale: float = field(
        default=20.0,
        metadata={"help": "felzenszwalb: the larger, the more contrast two regions may have and still be merged"},
    )
    sigma: float = field(default=0.5, metadata={"help": "felzenszwalb: width in pixels of the blur that comes first"})
    min_share: float = field(
        default=0.0006,
        metadata={
            "help": "felzenszwalb: smaller regions, as a share of the image's pixels, are merged into a neighbour"
        },
    )
    count: int = field(default=300, metadata={"help": "slic: about how many superpixels an image gets"})
    compactness: float = field(
        default=10.0,
        metadata={"help": "slic: the larger, the rounder, the less they follow the colours"},
    )

    def problems(self) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.algorithm not in ALGORITHMS:
            found.append(f"--algorithm must be {' or '.join(ALGORITHMS)} (it is {self.algorithm})")
        for name in ("scale", "compactness"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"--{name} must be > 0 (it is {getattr(self, name)})")
        if not 0 <= self.sigma < float("inf"):
            found.append(f"--sigma must not be negative (it is {self.sigma})")
        if not 0 <= self.min_share < 1:
            found.append(f"--min-share must lie in [0, 1) (it is {self.min_share})")
        if self.count < 1:
            found.append(f"--count must be at least 1 (it is {self.count})")
        return found


OPTIONS = {"felzenszwalb": ("scale", "sigma", "min_share"), "slic": ("count", "compactness")}
"""The options that have an effect with each algorithm."""


@dataclass(frozen=True)
class Superpixels:
    """Cuts images: RGB uint8 [H, W, 3] -> uint16 [H, W], 1..S, every pixel in a segment; a function of the pixels."""

    config: SuperpixelConfig

    def recipe(self) -> Recipe:
        """What a store of such segments says of them: the options that have an effect."""
        names = ("algorithm", *OPTIONS[self.config.algorithm])
        return Recipe("superpixels", {name: getattr(self.config, name) for name in names})

    def __call__(self, path: Path, image: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """The segments of one image; its path plays no part."""
        from skimage.segmentation import felzenszwalb, slic  # half a second that the command's other uses need not wait

        config, pixels = self.config, image.shape[0] * image.shape[1]
        if config.algorithm == "slic":
            ids = slic(image, n_segments=config.count, compactness=config.compactness, start_label=1)
        else:
            smallest = max(1, round(config.min_share * pixels))
            ids = felzenszwalb(image, scale=config.scale, sigma=config.sigma, min_size=smallest) + 1
        return compact(ids)
