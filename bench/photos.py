"""Pictures of the sizes and the weight of GTA5's and Cityscapes' files, drawn for timing readers: not for learning.

The street scenes of ssr_fast/data/scenes.py with what makes a photograph heavy: outlines that no ruler drew, leaves,
small objects of many classes, 1/f texture and sensor noise. A PNG then has about the bytes of the sets' own, on which
the time of decoding depends. Deterministic from a seed.
Legend: H W pixels, R regions.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data import scenes
from ssr_fast.data.labels import CITYSCAPES, CITYSCAPES_IDS
from ssr_fast.data.scenes import SceneLayout, Style

ROLES = {"gta5": 1, "cityscapes": 2}

KINDS: dict[int, tuple[tuple[int, float], ...]] = {
    scenes.ROAD: ((7, 1.0),),
    scenes.SIDEWALK: ((8, 1.0),),
    scenes.BUILDING: ((11, 0.8), (12, 0.1), (13, 0.1)),
    scenes.VEGETATION: ((21, 0.8), (22, 0.2)),
    scenes.POLE: ((17, 0.6), (19, 0.15), (20, 0.25)),
    scenes.SKY: ((23, 1.0),),
    scenes.PERSON: ((24, 0.7), (25, 0.15), (33, 0.1), (32, 0.05)),
    scenes.CAR: ((26, 0.75), (27, 0.1), (28, 0.1), (31, 0.05)),
}
"""Class of a scene -> the labelIds that its regions may get, and how often."""

SMALL = (scenes.POLE, scenes.PERSON, scenes.CAR, scenes.BUILDING, scenes.VEGETATION)
"""Classes of the small objects in the distance."""

TILE = 512
"""Side of the texture's tile, which is repeated; twice that in the larger octave."""


@dataclass(frozen=True)
class Photograph:
    """What makes one set's pictures: its size and its style.

    Attributes:
        set: a key of ROLES.
        width, height: pixels.
        grain: amplitude of the 1/f texture, grey levels.
        noise: standard deviation of the sensor's noise, grey levels.
    """

    set: str
    width: int
    height: int
    grain: float
    noise: float

    def style(self) -> Style:
        """A clean rendering, or a camera's picture of another place."""
        base = scenes.source_style() if self.set == "gta5" else scenes.target_style(0.8)
        return replace(base, noise=self.noise)


GTA5 = Photograph("gta5", 1914, 1052, 2.5, 0.35)
CITYSCAPES_PHOTOGRAPH = Photograph("cityscapes", 2048, 1024, 2.5, 0.35)


class Written(NamedTuple):
    """Files of one set and their mean sizes in bytes; 0 where there are none."""

    images: int
    image_bytes: float
    label_bytes: float


def draw(photograph: Photograph, seed: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Picture `index` of a set: RGB uint8 [H, W, 3] and Cityscapes' labelIds uint8 [H, W]; a pure function."""
    key = [seed, ROLES[photograph.set]]
    rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))
    height, width = photograph.height, photograph.width
    layout = scenes.draw_layout(rng, height // 2, width // 2)
    layout = _with_small_objects(layout, rng)
    layout = _with_natural_outlines(layout, rng, height, width)
    ids = np.array([_draw_id(kind, rng) for kind in layout.classes], np.uint8)
    image = scenes.render(layout, photograph.style(), rng)
    return _with_grain(image, layout, photograph.grain, rng), ids[layout.region]


def _draw_id(kind: int, rng: np.random.Generator) -> int:
    choices = KINDS[kind]
    return choices[int(rng.choice(len(choices), p=[share for _, share in choices]))][0]


def _with_small_objects(layout: SceneLayout, rng: np.random.Generator) -> SceneLayout:
    """Some hundred more regions around the horizon: [H, W] in, [H, W] out."""
    height, width = layout.label.shape
    region, depth, classes = layout.region.copy(), layout.depth.copy(), list(layout.classes)
    for _ in range(int(rng.integers(80, 160))):
        kind = int(rng.choice(SMALL))
        x, y = int(rng.integers(0, width)), int(height * rng.normal(0.5, 0.08))
        half = max(1, int(height * rng.uniform(0.004, 0.03)))
        tall = half * (4 if kind == scenes.POLE else 2 if kind == scenes.PERSON else 1)
        box = (slice(max(0, y - tall), y + tall), slice(max(0, x - half), x + half))
        if kind in (scenes.POLE, scenes.BUILDING):
            region[box] = len(classes)
        else:
            cv2.ellipse(region, (x, y), (half, tall), 0, 0, 360, len(classes), -1)
        depth[box] = 0.6
        classes.append(kind)
    return SceneLayout(np.array(classes, np.uint8)[region], region, depth, tuple(classes))


def _with_natural_outlines(layout: SceneLayout, rng: np.random.Generator, height: int, width: int) -> SceneLayout:
    """The layout at [height, width], its outlines bent by noise, sky shining through the leaves."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    bend = [_texture(rng, height, width) for _ in range(2)]
    scale_x, scale_y = layout.label.shape[1] / width, layout.label.shape[0] / height
    map_x = columns * scale_x + bend[0] * (height / 1000)
    map_y = rows * scale_y + bend[1] * (height / 1000)
    warp = partial(cv2.remap, map1=map_x, map2=map_y, borderMode=cv2.BORDER_REPLICATE)
    region = warp(layout.region.astype(np.int16), interpolation=cv2.INTER_NEAREST).astype(np.int32)
    depth = warp(layout.depth, interpolation=cv2.INTER_NEAREST).astype(np.float32)
    classes = np.array(layout.classes, np.uint8)
    leaves = classes[region] == scenes.VEGETATION
    region[leaves & (bend[0] + bend[1] > 3.0)] = layout.classes.index(scenes.SKY)
    return SceneLayout(classes[region], region, depth, layout.classes)


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """1/f noise of standard deviation about 1, [height, width]."""
    tile = _tile(rng)
    large = cv2.resize(tile, None, fx=2.7, fy=2.7, interpolation=cv2.INTER_LINEAR)
    parts = []
    for one in (tile, large):
        one = np.roll(one, tuple(int(shift) for shift in rng.integers(0, one.shape[0], 2)), (0, 1))
        repeats = (-(-height // one.shape[0]), -(-width // one.shape[1]))
        parts.append(np.tile(one, repeats)[:height, :width])
    mixed: NDArray[np.float32] = (parts[0] + parts[1]) * np.float32(0.7)
    return mixed


def _tile(rng: np.random.Generator) -> NDArray[np.float32]:
    """One period of 1/f noise, [TILE, TILE]."""
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE), np.float32))
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None])
    frequency[0, 0] = np.inf  # the mean is 0
    tile = np.fft.irfft2(spectrum / frequency, (TILE, TILE))
    return (tile / tile.std()).astype(np.float32)


def _with_grain(
    image: NDArray[np.uint8], layout: SceneLayout, amplitude: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The picture [H, W, 3] with texture: little in the sky, most in leaves."""
    share = np.ones(len(scenes.NAMES), np.float32)
    share[scenes.SKY], share[scenes.VEGETATION] = 0.15, 2.0
    grain = (_texture(rng, *layout.label.shape) * share[layout.label] * amplitude)[..., None]
    return np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)


def write_sets(folder: Path, kinds: Iterable[Photograph], count: int, seed: int) -> dict[str, Written]:
    """Write `count` pictures of each set as it is published: folder/gta5 with palette labels, folder/cityscapes.

    Cityscapes is written without labels: it is the unlabelled target.
    """
    written = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for kind in kinds:
            write = _write_gta5 if kind.set == "gta5" else _write_cityscapes
            sizes = list(pool.map(partial(write, folder / kind.set, kind, seed), range(count)))
            image, label = (sum(column) / count for column in zip(*sizes, strict=True))
            written[kind.set] = Written(count, image, label)
    return written


def _write_gta5(folder: Path, photograph: Photograph, seed: int, index: int) -> tuple[int, int]:
    image, ids = draw(photograph, seed, index)
    label = Image.fromarray(ids)
    label.putpalette(palette().tobytes())
    name = f"{index + 1:05d}.png"
    return _save(Image.fromarray(image), folder / "images" / name), _save(label, folder / "labels" / name)


def _write_cityscapes(folder: Path, photograph: Photograph, seed: int, index: int) -> tuple[int, int]:
    image, _ = draw(photograph, seed, index)
    name = f"drawn_{index:06d}_000019_leftImg8bit.png"
    return _save(Image.fromarray(image), folder / "leftImg8bit" / "train" / "drawn" / name), 0


def _save(image: Image.Image, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.stat().st_size


def palette() -> NDArray[np.uint8]:
    """GTA5's palette [256, 3]: index labelId -> Cityscapes' colour."""
    colors = np.zeros((256, 3), np.uint8)
    for value, train_id in CITYSCAPES_IDS.items():
        colors[value] = CITYSCAPES.colors[train_id]
    return colors
