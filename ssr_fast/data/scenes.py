"""Procedural street scenes in two domains: the data of the embedded demo, drawn in seconds, deterministic.

A scene is a layout (class map, region map, depth map) and a rendering of it. The layout generator is shared by all
domains; what differs is the style: the source is a clean rendering, the target a "camera" image of other palette,
light, texture, haze, blur, noise and vignette. The class-agnostic encoder of models/sam_small.safetensors was trained
on a third style that draws every region in random colours.
"""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ssr_fast.errors import UserError

NAMES = ("road", "sidewalk", "building", "vegetation", "pole", "sky", "person", "car")
COLORS = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (107, 142, 35),
    (153, 153, 153),
    (70, 130, 180),
    (220, 20, 60),
    (0, 0, 142),
)
ROAD, SIDEWALK, BUILDING, VEGETATION, POLE, SKY, PERSON, CAR = range(8)
ROLES = {"source": 1, "target": 2, "evaluation": 3}

# fmt: off
_SOURCE_PALETTE = np.array([
    [90, 88, 96], [188, 150, 158], [142, 104, 84], [58, 120, 52],
    [206, 200, 120], [120, 172, 232], [206, 62, 70], [44, 62, 168],
], np.float32)
_OTHER_PALETTE = np.array([
    [104, 110, 122], [160, 150, 140], [150, 150, 158], [104, 100, 46],
    [150, 146, 96], [196, 188, 176], [124, 70, 96], [64, 104, 112],
], np.float32)
# fmt: on


@dataclass(kw_only=True)
class ScenesConfig:
    """Which scenes are drawn; the option `--data.scenes.*`."""

    source_count: int = 96
    """Labelled source scenes."""
    target_count: int = 96
    """Unlabelled target scenes."""
    evaluation_count: int = 96
    """Target scenes whose labels only the evaluation sees."""
    height: int = 96
    """Height of a scene in pixels."""
    width: int = 192
    """Width of a scene in pixels."""
    gap: float = 0.8
    """Distance of the target domain from the source: 0 the same palette and light, 1 wholly other ones."""
    seed: int = 0
    """Seed of the layouts and renderings."""

    def problems(self, where: str) -> list[str]:
        """Sentences about values that cannot be drawn; empty if all is well."""
        found = []
        for name in ("source_count", "target_count", "evaluation_count"):
            if getattr(self, name) < 1:
                found.append(f"--{where}.{name} must be at least 1 (it is {getattr(self, name)})")
        if self.height < 32 or self.width < 32:
            found.append(
                f"--{where}.height and --{where}.width must be at least 32 (they are {self.height} and {self.width})"
            )
        if not 0.0 <= self.gap <= 1.0:
            found.append(f"--{where}.gap must lie in [0, 1] (it is {self.gap})")
        if self.seed < 0:
            found.append(f"--{where}.seed must not be negative (it is {self.seed})")
        return found


@dataclass(frozen=True)
class SceneLayout:
    """The geometry of one scene, without colour.

    Attributes:
        label: uint8 [H, W], class.
        region: int32 [H, W], number of the region (an object, a facade, a surface), 0..R-1.
        depth: float32 [H, W], 0 near to 1 far.
        classes: class of each region, length R.
    """

    label: NDArray[np.uint8]
    region: NDArray[np.int32]
    depth: NDArray[np.float32]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Style:
    """How a layout is rendered: colours in 0..255, amounts as fractions unless said otherwise."""

    palette: NDArray[np.float32]
    jitter: float
    light: float
    texture: float
    haze: float
    haze_color: tuple[float, float, float]
    blur: float
    noise: float
    vignette: float
    cast: tuple[float, float, float]


class _Canvas:
    """A layout under construction: regions are painted back to front."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.region = np.zeros((height, width), np.int32)
        self.depth = np.ones((height, width), np.float32)
        self.classes: list[int] = []

    def paint(self, mask: NDArray[np.uint8], kind: int, depth: float | NDArray[np.float32]) -> None:
        """Paint one new region where mask > 0."""
        inside = mask > 0
        self.region[inside] = len(self.classes)
        self.depth[inside] = depth[inside] if isinstance(depth, np.ndarray) else depth
        self.classes.append(kind)

    def blank(self) -> NDArray[np.uint8]:
        return np.zeros((self.height, self.width), np.uint8)


def draw_layout(rng: np.random.Generator, height: int = 96, width: int = 192) -> SceneLayout:
    """Draw the geometry of one street scene."""
    canvas = _Canvas(height, width)
    horizon = int(height * rng.uniform(0.38, 0.52))
    canvas.paint(np.ones((height, width), np.uint8), SKY, 1.0)
    _draw_buildings(canvas, rng, horizon)
    _draw_trees(canvas, rng, horizon)
    _draw_ground(canvas, rng, horizon)
    _draw_objects(canvas, rng, horizon)
    label = np.asarray(canvas.classes, np.uint8)[canvas.region]
    return SceneLayout(label, canvas.region, canvas.depth, tuple(canvas.classes))


def _draw_buildings(canvas: _Canvas, rng: np.random.Generator, horizon: int) -> None:
    x = int(rng.integers(-20, 10))
    while x < canvas.width:
        span = int(canvas.width * rng.uniform(0.10, 0.24))
        if rng.random() < 0.78:
            mask = canvas.blank()
            top = int(horizon * rng.uniform(0.05, 0.75))
            cv2.rectangle(mask, (x, top), (x + span, horizon + 6), 1, -1)
            if rng.random() < 0.3:
                peak = (x + span // 2, max(0, top - int(rng.integers(4, 12))))
                cv2.fillPoly(mask, [np.array([(x, top), (x + span, top), peak], np.int32)], 1)
            canvas.paint(mask, BUILDING, float(rng.uniform(0.55, 0.8)))
        x += span + int(rng.integers(0, 8))


def _draw_trees(canvas: _Canvas, rng: np.random.Generator, horizon: int) -> None:
    for _ in range(int(rng.integers(2, 6))):
        mask = canvas.blank()
        x, radius = int(rng.integers(0, canvas.width)), int(canvas.height * rng.uniform(0.08, 0.2))
        y = horizon - int(radius * rng.uniform(0.1, 1.2))
        for _ in range(5):
            center = (x + int(rng.normal(0, radius * 0.5)), y + int(rng.normal(0, radius * 0.35)))
            axes = (max(2, int(radius * rng.uniform(0.5, 0.9))), max(2, int(radius * rng.uniform(0.4, 0.8))))
            cv2.ellipse(mask, center, axes, 0, 0, 360, 1, -1)
        canvas.paint(mask, VEGETATION, float(rng.uniform(0.45, 0.65)))


def _draw_ground(canvas: _Canvas, rng: np.random.Generator, horizon: int) -> None:
    height, width = canvas.height, canvas.width
    rows = np.arange(height, dtype=np.float32)[:, None]
    ground = np.clip(0.6 * (1.0 - (rows - horizon) / max(1, height - horizon)), 0, 0.6)
    depth = np.broadcast_to(ground, (height, width)).astype(np.float32)
    mask = canvas.blank()
    mask[horizon:] = 1
    canvas.paint(mask, SIDEWALK, depth)
    middle = width * rng.uniform(0.35, 0.65)
    near_left, near_right = middle - width * rng.uniform(0.38, 0.6), middle + width * rng.uniform(0.38, 0.6)
    far_left, far_right = middle - width * rng.uniform(0.03, 0.12), middle + width * rng.uniform(0.03, 0.12)
    road = np.array([(far_left, horizon), (far_right, horizon), (near_right, height), (near_left, height)], np.int32)
    mask = canvas.blank()
    cv2.fillPoly(mask, [road], 1)
    mask[:horizon] = 0
    canvas.paint(mask, ROAD, depth)
    if rng.random() < 0.5:
        side = rng.choice([-1, 1])
        mask = canvas.blank()
        x = int(middle + side * width * rng.uniform(0.35, 0.5))
        cv2.ellipse(
            mask, (x, horizon + 4), (int(width * rng.uniform(0.05, 0.14)), int(rng.integers(4, 9))), 0, 0, 360, 1, -1
        )
        canvas.paint(mask, VEGETATION, 0.45)


def _draw_objects(canvas: _Canvas, rng: np.random.Generator, horizon: int) -> None:
    draw = {CAR: _car, PERSON: _person, POLE: _pole}
    kinds = [CAR] * int(rng.integers(1, 5)) + [PERSON] * int(rng.integers(1, 5)) + [POLE] * int(rng.integers(1, 4))
    placed = sorted(((float(rng.uniform(0.08, 0.85)), kind) for kind in kinds), key=lambda item: item[0])
    for near, kind in placed:
        base = int(horizon + near * (canvas.height - horizon))
        scale = canvas.height / 96 * (0.55 + 0.9 * near)
        mask = draw[kind](canvas.blank(), rng, base, scale)
        canvas.paint(mask, kind, float(0.6 * (1 - near)))


def _car(mask: NDArray[np.uint8], rng: np.random.Generator, base: int, scale: float) -> NDArray[np.uint8]:
    x, w, h = int(rng.integers(0, mask.shape[1])), int(26 * scale * rng.uniform(0.8, 1.2)), int(9 * scale)
    cv2.rectangle(mask, (x - w // 2, base - h), (x + w // 2, base), 1, -1)
    roof = [
        (x - w // 3, base - h),
        (x + w // 3, base - h),
        (x + w // 5, base - int(1.8 * h)),
        (x - w // 5, base - int(1.8 * h)),
    ]
    cv2.fillPoly(mask, [np.array(roof, np.int32)], 1)
    for wheel in (x - w // 3, x + w // 3):
        cv2.circle(mask, (wheel, base), max(2, int(3 * scale)), 1, -1)
    return mask


def _person(mask: NDArray[np.uint8], rng: np.random.Generator, base: int, scale: float) -> NDArray[np.uint8]:
    x, w, h = int(rng.integers(0, mask.shape[1])), max(3, int(4.5 * scale)), int(20 * scale)
    cv2.ellipse(mask, (x, base - h // 2), (w, h // 2), 0, 0, 360, 1, -1)
    cv2.circle(mask, (x, base - h), max(2, int(3 * scale)), 1, -1)
    return mask


def _pole(mask: NDArray[np.uint8], rng: np.random.Generator, base: int, scale: float) -> NDArray[np.uint8]:
    x, w = int(rng.integers(0, mask.shape[1])), max(4, int(4 * scale))
    cv2.rectangle(mask, (x - w // 2, base - int(44 * scale)), (x - w // 2 + w, base), 1, -1)
    return mask


def source_style() -> Style:
    """The clean rendering: saturated palette, light from the left, no optics."""
    return Style(_SOURCE_PALETTE, 14.0, 0.15, 0.5, 0.0, (200.0, 210.0, 220.0), 0.0, 3.0, 0.0, (1.0, 1.0, 1.0))


def target_style(gap: float) -> Style:
    """The camera image at distance `gap` in [0, 1] from the source."""
    palette = (1.0 - gap) * _SOURCE_PALETTE + gap * _OTHER_PALETTE
    cast = (1.0 + 0.19 * gap, 1.0, 1.0 - 0.25 * gap)
    return Style(
        palette,
        14.0 + 17.0 * gap,
        0.15 - 0.40 * gap,
        1.0,
        0.45 * gap,
        (206.0, 200.0, 190.0),
        0.6 * gap,
        3.0 + 8.0 * gap,
        0.35 * gap,
        cast,
    )


def random_style(rng: np.random.Generator) -> Style:
    """A style for domain randomisation: random optics; colours are drawn per region (see `render`)."""
    haze = tuple(float(v) for v in rng.uniform(120, 240, 3))
    cast = tuple(float(v) for v in rng.uniform(0.85, 1.15, 3))
    return Style(
        np.zeros((len(NAMES), 3), np.float32),
        0.0,
        float(rng.uniform(-0.4, 0.4)),
        float(rng.uniform(0.2, 1.2)),
        float(rng.uniform(0.0, 0.6)),
        (haze[0], haze[1], haze[2]),
        float(rng.uniform(0.0, 0.8)),
        float(rng.uniform(1.0, 14.0)),
        float(rng.uniform(0.0, 0.5)),
        (cast[0], cast[1], cast[2]),
    )


def render(
    layout: SceneLayout, style: Style, rng: np.random.Generator, *, random_regions: bool = False
) -> NDArray[np.uint8]:
    """Render a layout.

    Args:
        layout: the geometry, [H, W].
        style: colours and optics.
        rng: source of colour jitter, texture and noise.
        random_regions: draw one colour for each region, whatever its class, instead of the palette's.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    count = len(layout.classes)
    if random_regions:
        colors = rng.uniform(20, 235, (count, 3)).astype(np.float32)
    else:
        shift = rng.normal(0, style.jitter, (count, 3)) * 0.5 + rng.normal(0, style.jitter, (count, 1)) * 0.7
        colors = style.palette[list(layout.classes)] + shift.astype(np.float32)
    image = colors[layout.region]
    height, width = layout.label.shape
    image *= _texture(layout, rng, style.texture)[..., None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    image *= (1.0 - style.light * columns)[..., None]
    haze = (style.haze * layout.depth**1.5)[..., None]
    image = image * (1 - haze) + np.asarray(style.haze_color, np.float32) * haze
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    image *= (1 - style.vignette * 0.5 * (columns**2 + rows**2))[..., None]
    image *= np.asarray(style.cast, np.float32)
    if style.blur > 0:
        image = np.asarray(cv2.GaussianBlur(image, (5, 5), style.blur), np.float32)
    image += rng.standard_normal(image.shape, np.float32) * style.noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _texture(layout: SceneLayout, rng: np.random.Generator, amount: float) -> NDArray[np.float32]:
    """Multiplicative texture [H, W] around 1: windows, leaves, asphalt grain."""
    height, width = layout.label.shape
    texture = np.ones((height, width), np.float32)
    grain = cv2.resize(rng.standard_normal((height // 2, width // 2), np.float32), (width, height))
    leaves = cv2.resize(rng.standard_normal((height // 4, width // 4), np.float32), (width, height))
    texture += 0.03 * amount * grain
    texture += np.where(layout.label == VEGETATION, 0.16 * amount * leaves, 0.0).astype(np.float32)
    period_x, period_y = int(rng.integers(6, 10)), int(rng.integers(7, 11))
    window = ((np.arange(width) % period_x) < period_x // 2)[None] & ((np.arange(height) % period_y) < period_y // 2)[
        :, None
    ]
    texture -= np.where((layout.label == BUILDING) & window, 0.16 * amount, 0.0).astype(np.float32)
    return texture


def generator(seed: int, role: str, index: int) -> np.random.Generator:
    """The random numbers of one scene: a pure function of (seed, role, index)."""
    return np.random.Generator(np.random.Philox(key=[seed, ROLES[role]], counter=[0, 0, 0, index]))


def draw_scene(config: ScenesConfig, role: str, index: int) -> tuple[NDArray[np.uint8], SceneLayout]:
    """Draw scene `index` of a role ("source", "target", "evaluation"): image uint8 [H, W, 3] and its layout."""
    rng = generator(config.seed, role, index)
    layout = draw_layout(rng, config.height, config.width)
    style = source_style() if role == "source" else target_style(config.gap)
    return render(layout, style, rng), layout


def write_scenes(folder: Path, config: ScenesConfig) -> None:
    """Write the scenes as an ordinary folder data set, so that the demo runs through the real input path.

    Makes `folder/{source,target,evaluation}/{images,labels}/*.png` and `classes.json` in each; the target has no
    labels. A folder that already holds just these scenes is left as it is; a half-written one is drawn again.

    Raises:
        UserError: the folder cannot be written.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    mark = json.dumps({**dataclasses.asdict(config), "version": version}, sort_keys=True)
    done = folder / "scenes.json"
    try:
        if done.is_file() and done.read_text(encoding="utf-8") == mark:
            return
        done.unlink(missing_ok=True)  # from here on the folder is neither the old set nor the new one
        for role, count in (
            ("source", config.source_count),
            ("target", config.target_count),
            ("evaluation", config.evaluation_count),
        ):
            shutil.rmtree(folder / role, ignore_errors=True)
            _write_role(folder / role, config, role, count)
        done.write_text(mark, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot draw the demo's scenes into {folder}: {error.strerror or error}") from error


def _write_role(folder: Path, config: ScenesConfig, role: str, count: int) -> None:
    (folder / "images").mkdir(parents=True)
    classes = {"names": list(NAMES), "colors": [list(color) for color in COLORS]}
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    if role != "target":
        (folder / "labels").mkdir()
    for index in range(count):
        image, layout = draw_scene(config, role, index)
        _write_png(folder / "images" / f"{index:05d}.png", image[..., ::-1])
        if role != "target":
            _write_png(folder / "labels" / f"{index:05d}.png", layout.label)


def _write_png(path: Path, array: NDArray[np.uint8]) -> None:
    """cv2.imwrite reports a full disk only by its return value; imencode + write raises OSError."""
    path.write_bytes(cv2.imencode(".png", array)[1].tobytes())
