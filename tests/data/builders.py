"""Data sets of every layout with tiny images, and what every error message must look like."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 16, 8
ROAD_PURPLE = (128, 64, 128)


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """RGB noise uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3)).astype(np.uint8)


def ids(*values: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A label [H, W] of vertical stripes, one a value."""
    stripes = np.asarray(values)[np.arange(width) * len(values) // width]
    return np.broadcast_to(stripes, (height, width)).astype(np.uint8)


def save(path: Path, array: NDArray[np.generic]) -> Path:
    """An image file; JPEG names get JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path)
    return path


def save_palette(path: Path, indices: NDArray[np.uint8]) -> Path:
    """A palette PNG whose index 7 is Cityscapes' road and whose colours never equal their index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.ascontiguousarray(indices))
    palette = [[255 - k, k // 2, 77] for k in range(256)]
    palette[7] = list(ROAD_PURPLE)
    image.putpalette(sum(palette, []))
    assert image.mode == "P"
    image.save(path)
    return path


def save_synthia(path: Path, classes: NDArray[np.uint8]) -> Path:
    """A 16-bit RGB PNG with the class in the first channel and instance numbers in the second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.zeros((*classes.shape, 3), np.uint16)
    rgb[..., 0], rgb[..., 1] = classes, 300
    assert cv2.imwrite(str(path), rgb[..., ::-1])
    return path


def gta5(root: Path, count: int = 2) -> Path:
    for k in range(1, count + 1):
        save(root / "images" / f"{k:05d}.png", picture(k))
        save_palette(root / "labels" / f"{k:05d}.png", ids(7, 8, 0, 34))
    return root


def synthia(root: Path, count: int = 2) -> Path:
    for k in range(count):
        save(root / "RGB" / f"{k:07d}.png", picture(k))
        save_synthia(root / "GT" / "LABELS" / f"{k:07d}.png", ids(3, 21, 0, 22))
    return root


def cityscapes(root: Path, kind: str = "labelIds") -> Path:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", picture())
        label = ids(7, 33, 4, 11) if kind == "labelIds" else ids(0, 18, 255, 2)
        save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", label)
        save(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", picture())
        save(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", picture()[..., 0].astype(np.uint16))
    return root


def acdc(root: Path) -> Path:
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val"):
            stem = f"{split}/GOPR1/{condition}_frame_1"
            save(root / "rgb_anon" / condition / f"{stem}_rgb_anon.png", picture())
            save(root / "gt" / condition / f"{stem}_gt_labelTrainIds.png", ids(0, 18, 255))
            save(root / "gt" / condition / f"{stem}_gt_labelColor.png", picture())
    return root


def darkzurich(root: Path) -> Path:
    for condition in ("day", "twilight", "night"):
        save(root / "rgb_anon" / "train" / condition / "GOPR1" / f"{condition}_1_rgb_anon.png", picture())
    save(root / "rgb_anon" / "val" / "night" / "GOPR2" / "frame_rgb_anon.png", picture())
    save(root / "gt" / "val" / "night" / "GOPR2" / "frame_gt_labelTrainIds.png", ids(0, 10, 255))
    return root


def bdd100k(root: Path) -> Path:
    for split in ("train", "val"):
        save(root / "images" / "10k" / split / f"{split}-1.jpg", picture())
        save(root / "labels" / "sem_seg" / "masks" / split / f"{split}-1.png", ids(0, 18, 255))
    return root


def mapillary(root: Path, labels: str = "labels") -> Path:
    for split in ("training", "validation"):
        save(root / split / "images" / f"{split}_x.jpg", picture())
        save_palette(root / split / labels / f"{split}_x.png", ids(13, 15, 65, 30))
    return root


def camvid(root: Path) -> Path:
    for split, stems in {
        "train": ("0001TP_006690", "0006R0_f00930", "0016E5_00390"),
        "val": ("0016E5_07959",),
        "test": ("0001TP_008550", "Seq05VD_f00000"),
    }.items():
        for stem in stems:
            save(root / split / f"{stem}.png", picture())
            save(root / f"{split}annot" / f"{stem}.png", ids(0, 3, 10, 11))
    return root


def folder(root: Path, stems: tuple[str, ...] = ("a", "b"), classes: object = ("road", "car", "sky")) -> Path:
    for k, stem in enumerate(stems):
        save(root / "images" / f"{stem}.png", picture(k))
        save(root / "labels" / f"{stem}.png", ids(0, 1, 2, 255))
    (root / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    return root


def assert_sentence(message: object, *parts: object) -> None:
    """One sentence without line breaks, long enough to say what to do, that holds every part."""
    text = str(message)
    assert "\n" not in text
    assert not re.search(r"[.!?] [A-Z]", text), f"more than one sentence: {text}"
    assert len(text.split()) >= 6, text
    assert ";" in text or " must " in text, f"says what is wrong but not what to do: {text}"
    for part in parts:
        assert str(part) in text, f"{part!s} is missing in: {text}"
