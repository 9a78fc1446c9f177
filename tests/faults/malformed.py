"""What a malformed input is, and data sets made of them: one bad file a pair, the other file of the pair is good.

Everything is drawn from fixed seeds: the same files each time.
"""

import json
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.crafted import HEIGHT, WIDTH, deep_png, encoded, ids, picture

Make = Callable[[Path], None]

NAMED, HANDLED, ANY = "named", "handled", "named or handled"


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Args:
        stem: name without ending; unique in its data set.
        make: writes the file.
        expect: NAMED, HANDLED (it becomes a good sample), or ANY where the library's version decides: one of both.
        words: must stand in the sentence that names it.
        suffix: the file name's ending.
        label: the label is malformed, not the image.
        size: width and height of the good file beside it.
    """

    stem: str
    make: Make
    expect: str = NAMED
    words: str = ""
    suffix: str = ".png"
    label: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)


def content(data: bytes) -> Make:
    """A regular file of these bytes."""

    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def link(target: str) -> Make:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def sparse(start: bytes, size: int) -> Make:
    """A file that begins with `start` and claims `size` bytes, of which the disk holds next to none."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def unreadable(data: bytes) -> Make:
    """A file without any permission (root may read it all the same)."""

    def make(path: Path) -> None:
        path.write_bytes(data)
        path.chmod(0)

    return make


def two_link_loop(path: Path) -> None:
    """A link to a hidden link that leads back."""
    other = path.with_name(f".{path.name}")
    other.symlink_to(path)
    path.symlink_to(other)


def make_socket(path: Path) -> None:
    """A socket that nobody listens on; the path below /proc is short enough for its address."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def special_files(start: str, label: bool) -> list[Case]:
    """Whatever is no regular file, as images or as labels."""
    good = encoded(ids(1) if label else picture(1), "PNG")
    readable = HANDLED if os.geteuid() == 0 else NAMED
    makes: dict[str, tuple[Make, str, str]] = {
        "folder": (Path.mkdir, NAMED, "folder"),
        "fifo": (os.mkfifo, NAMED, "not a regular file"),
        "socket": (make_socket, NAMED, "not a regular file"),
        "zero": (link("/dev/zero"), NAMED, "not a regular file"),
        "urandom": (link("/dev/urandom"), NAMED, "not a regular file"),
        "full": (link("/dev/full"), NAMED, "not a regular file"),
        "null": (link("/dev/null"), NAMED, "not a regular file"),
        "memory": (link("/proc/self/mem"), NAMED, ""),
        "dangling": (link("gone.png"), NAMED, "No such file"),
        "through a file": (link("/etc/hostname/x.png"), NAMED, "cannot be decoded"),
        "long target": (link("x" * 3000), NAMED, "File name too long"),
        "self": (lambda path: path.symlink_to(path), NAMED, "symbolic links"),
        "circle": (two_link_loop, NAMED, "symbolic links"),
        "unreadable": (unreadable(good), readable, "" if readable == HANDLED else "permission"),
    }
    return [Case(f"{start} {name}", make, expect, words, label=label)
            for name, (make, expect, words) in makes.items()]  # fmt: skip


def build_folder(root: Path, cases: Sequence[Case], classes: object) -> dict[Path, Case]:
    """A `folder` data set of all cases; returns the path of each malformed file."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    colors = np.array(classes["colors"], np.uint8) if isinstance(classes, dict) and "colors" in classes else None
    made = {}
    for number, case in enumerate(cases):
        width, height = case.size
        large = width * height > 1 << 20  # noise of that size would take long to draw
        good = (
            np.zeros((height, width), np.uint8)
            if large
            else (picture if case.label else ids)(1000 + number, *case.size)
        )
        if colors is not None and not case.label:
            good = colors[good % len(colors)]
        made[_make_pair(root / "images", root / "labels", case, encoded(good, "PNG", compress_level=1))] = case
    return made


def build_unlabelled(root: Path, cases: Sequence[Case]) -> dict[Path, Case]:
    """A `folder` data set of images alone."""
    (root / "images").mkdir(parents=True)
    made = {root / "images" / f"{case.stem}{case.suffix}": case for case in cases}
    for path, case in made.items():
        case.make(path)
    return made


def build_synthia(root: Path, cases: Sequence[Case]) -> dict[Path, Case]:
    """A SYNTHIA data set, whose labels OpenCV decodes; every case is a label."""
    (root / "RGB").mkdir(parents=True)
    (root / "GT" / "LABELS").mkdir(parents=True)
    return {
        _make_pair(root / "RGB", root / "GT" / "LABELS", case, encoded(picture(2000 + number, *case.size), "PNG")): case
        for number, case in enumerate(cases)
    }


def _make_pair(images: Path, labels: Path, case: Case, good: bytes) -> Path:
    bad, whole = (labels, images) if case.label else (images, labels)
    (whole / f"{case.stem}.png").write_bytes(good)
    path = bad / f"{case.stem}{case.suffix}"
    case.make(path)
    return path


def partner(path: Path) -> Path:
    """The good file beside a malformed one of a `folder` data set."""
    return path.parents[1] / ("images" if path.parent.name == "labels" else "labels") / f"{path.stem}.png"


def synthia_label(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A 16-bit label as SYNTHIA has them: the class in the first channel, instances in the second."""
    values = np.zeros((height, width, 3), np.uint16)
    values[..., 0] = np.random.default_rng(seed).integers(0, 23, (height, width))
    values[..., 1] = 300 + seed
    return deep_png(values)


def kind_of(path: Path) -> str:
    """What makes a file distinct: the bytes of a regular one, else its type and where it leads."""
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        with path.open("rb") as file:  # a sparse file is told by its start and size
            return f"{file.read(1 << 20)!r} {os.lstat(path).st_size}"
    return f"{stat.S_IFMT(mode)} {os.readlink(path) if stat.S_ISLNK(mode) else ''}"


def frames(seed: int, count: int = 3) -> list[Image.Image]:
    """Pictures for animations."""
    return [Image.fromarray(picture(seed + k)) for k in range(count)]
