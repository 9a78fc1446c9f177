"""A source of samples for DALI that needs no files, and what the torch loader's path makes of the same samples."""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.dali_loader import Output, load_dali
from ssr_fast.data.geometry import crop_image

CPU = torch.device("cpu")
PIXELS = Output("target_image", "pixels")
JPEG = Output("source_image", "jpeg")
LABEL, VALID = Output("source_label", "array"), Output("target_valid", "array")
SEGMENTS, FEATURES = Output("target_segments", "array"), Output("source_features", "array")
PLACES = Output("target_places", "array")
EVERY = (JPEG, LABEL, PIXELS, VALID, SEGMENTS, FEATURES, PLACES, Output("target_image_2", "jpeg"))


@dataclass(frozen=True)
class Fake:
    """Samples drawn from (step, slot): images of odd sizes, larger and smaller than the crop."""

    outputs: tuple[Output, ...]
    slots: int = 2
    crop: tuple[int, int] = (33, 47)
    options: dict[str, Any] = field(default_factory=lambda: {"quality": 95, "subsampling": 0})

    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        return tuple(array for output in self.outputs for array in self.arrays(output, step, slot))

    def files(self, step: int) -> list[str]:
        return [f"{step}-{slot}.jpg" for slot in range(self.slots)]

    def drawn(self, output: Output, step: int, slot: int) -> tuple[NDArray[np.uint8], tuple[int, int], bool]:
        """Image, corner (x, y), flip."""
        rng = np.random.default_rng([step, slot, len(output.part)])
        height, width = (int(rng.integers(size // 2, 3 * size)) for size in self.crop)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        image = np.array(Image.fromarray(image[::4, ::4]).resize((width, height), Image.Resampling.BICUBIC))
        x, y = (int(rng.integers(0, max(0, a - b) + 1)) for a, b in zip((width, height), self.crop[::-1], strict=True))
        return image, (x, y), bool(rng.integers(2))

    def arrays(self, output: Output, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        rng, (height, width) = np.random.default_rng([step, slot, 9]), self.crop
        if output.kind == "array":
            shape = {"source_features": (3, 5, 16), "target_places": (8, 3)}.get(output.part, self.crop)
            dtype = {"source_label": "u1", "target_valid": "?", "target_segments": "i4", "source_features": "f4"}
            return ((rng.random(shape) * 1000).astype(dtype.get(output.part, "f8")),)
        image, (x, y), flip = self.drawn(output, step, slot)
        flag = np.array([flip], np.uint8)
        if output.kind == "pixels":
            return crop_image(image, (x, y), self.crop, False), flag
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", **self.options)
        inside = min(height, image.shape[0] - y), min(width, image.shape[1] - x)
        return np.frombuffer(file.getvalue(), np.uint8), np.array([y, x], "i4"), np.array(inside, "i4"), flag

    def expected(self, output: Output, step: int) -> torch.Tensor:
        """What the torch loader's path makes of the same samples."""
        if output.kind == "array":
            return torch.from_numpy(np.stack([self.arrays(output, step, slot)[0] for slot in range(self.slots)]))
        crops = []
        for slot in range(self.slots):
            image, corner, flip = self.drawn(output, step, slot)
            if output.kind == "jpeg":
                image = np.array(Image.open(io.BytesIO(self.arrays(output, step, slot)[0].tobytes())).convert("RGB"))
            crops.append(crop_image(image, corner, self.crop, flip))
        return normalise_batch(torch.from_numpy(np.stack(crops)))


@dataclass(frozen=True)
class Slow(Fake):
    seconds: float = 0.0
    slow_from: int = 0

    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        time.sleep(self.seconds if step >= self.slow_from else 0.0)
        return super().__call__(step, slot)


def load(source: Any, first: int, last: int, workers: int = 0, queue: int = 2, **rest: Any) -> Iterator[Any]:
    rest = {"device": CPU, "report": lambda line: None, **rest}
    return load_dali(source, first, last, workers=workers, queue=queue, **rest)


def assert_steps(source: Fake, batches: list[dict[str, torch.Tensor]], first: int) -> None:
    for step, batch in enumerate(batches, first):
        assert list(batch) == [output.part for output in source.outputs]
        for output in source.outputs:
            expected = source.expected(output, step)
            assert batch[output.part].dtype == expected.dtype
            assert torch.equal(batch[output.part], expected), (output, step)
