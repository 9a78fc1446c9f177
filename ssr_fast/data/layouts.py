"""Where each data set of the field keeps its images and labels, found from the root alone.

A layout pairs image and label files by key: the path below the split's folder, without the set's suffixes.
Legend: H W pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.class_file import CLASS_FILES, read_class_file
from ssr_fast.data.images import (
    IMAGE_SUFFIXES,
    BadFile,
    decode_label,
    decode_synthia_label,
    palette_color,
    read_image,
)
from ssr_fast.data.labels import CITYSCAPES, IGNORE, UNKNOWN, ClassSet, id_table, train_id_table
from ssr_fast.data.layout_specs import CAMVID_DUSK, LAYOUTS, TRAIN_IDS, Spec
from ssr_fast.data.roots import check_root, expanded, option_name
from ssr_fast.data.store import ImageStore, is_store
from ssr_fast.data.walk import files_below, leads_nowhere
from ssr_fast.errors import UserError

__all__ = ["LAYOUTS", "Entry", "Layout", "Listing", "find_layout", "option_name", "read_image"]

_STRIP = 1 << 20  # pixels that are converted at once


@dataclass(frozen=True)
class Entry:
    """One image and its label, if it has one; `name` is unique in a listing unless two images share their stem."""

    name: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Listing:
    """What lies in a split: pairs, labels that no image claims, images that two label files claim, lost folders.

    A lost folder is a link without extension that leads nowhere, such as to a disk that is not there.
    """

    entries: tuple[Entry, ...]
    orphans: tuple[Path, ...]
    rivals: tuple[tuple[Path, Path], ...]
    lost: tuple[Path, ...]


@dataclass(frozen=True)
class _Part:
    """The folders of one split and condition; `prefix` keeps names apart when there are several."""

    prefix: str
    images: Path
    labels: Path


@dataclass(frozen=True, eq=False)
class Layout:
    """A data set on disk.

    Args:
        name: a key of LAYOUTS.
        root: the folder that the layout's paths start from.
        classes: the class set; empty (K = 0) for a `folder` without a classes file, which has images only.
        table: value in a label file -> train id, UNKNOWN for values that may not occur, uint8 [256 or 65536].
        color_coded: RGB labels are converted by the class set's colours.
        store: where its files are, if they were prepared; `root` is the store's folder then.
    """

    name: str
    root: Path
    classes: ClassSet
    table: NDArray[np.uint8]
    color_coded: bool = False
    store: ImageStore | None = None

    def read_image(self, path: Path | str) -> NDArray[np.uint8]:
        """An image file -> RGB uint8 [H, W, 3]; read-only where it is a part of a store.

        Raises:
            BadFile: it cannot be read.
        """
        return read_image(path) if self.store is None else self.store.image(path)

    @property
    def spec(self) -> Spec:
        """The layout's row in LAYOUTS."""
        return LAYOUTS[self.name]

    def entries(self, split: str, condition: str = "") -> list[Entry]:
        """The images of a split (`all` = every split there is) with their labels, sorted by name.

        Raises:
            UserError: no such split or condition, or its folder is missing.
        """
        return list(self.listing(split, condition).entries)

    def listing(self, split: str, condition: str = "", option: str = "") -> Listing:
        """`entries` and what does not pair. `option` is the prefix of option names in errors, such as data.source."""
        entries: list[Entry] = []
        orphans: list[Path] = []
        rivals: list[tuple[Path, Path]] = []
        lost: list[Path] = []
        for part in self._parts(split, condition, option):
            labels = self._labels(part.labels)
            claimed: set[Path] = set()
            for image in files_below(part.images):
                if image.suffix.lower() not in IMAGE_SUFFIXES:
                    lost += [image] if not image.suffix and leads_nowhere(image) else []
                    continue
                key, candidates = self._candidates(image, part.images, labels)
                claimed.update(candidates)
                if not self._in_condition(image, condition):
                    continue
                entries.append(Entry(part.prefix + key, image, candidates[0] if candidates else None))
                if len(candidates) > 1 and (self.name == "folder" or candidates[0].stem == candidates[1].stem):
                    rivals.append((candidates[0], candidates[1]))
            orphans += [path for same in labels.values() for path in same if path not in claimed]
        entries.sort(key=lambda entry: (entry.name, str(entry.image)))
        return Listing(tuple(entries), tuple(sorted(orphans)), tuple(rivals), tuple(lost))

    def read_label(self, path: Path | str) -> NDArray[np.uint8]:
        """A label file -> train ids uint8 [H, W], 255 for pixels that do not count.

        Raises:
            BadFile: the file is damaged, holds colours where ids are expected, or a value that has no meaning; the
                sentence names file, value and the first position.
        """
        if self.store is not None:
            return self.store.label(path)
        path = Path(path)
        converted = path.stem.endswith(TRAIN_IDS) and self.name != "folder"
        raw = decode_synthia_label(path) if self.name == "synthia" and not converted else decode_label(path)
        if raw.ndim == 3:
            if self.color_coded:
                return self._from_colors(raw, path)
            if (raw != raw[..., :1]).any():
                raise BadFile(path, "is colour-coded where class ids are expected", self._color_advice())
            raw = raw[..., 0]  # ids that were saved as grey RGB
        table = train_id_table(self.classes.count) if converted else self.table
        label = _in_strips(lambda rows: _look_up(rows, table), raw)
        unknown = label == UNKNOWN
        if unknown.any():
            row, column = divmod(int(unknown.argmax()), label.shape[1])
            raise BadFile(
                path,
                f"holds the value {raw[row, column]} at column {column}, row {row} ({unknown.sum()} pixel(s) "
                f"like this), while {self.name} labels hold {_ranges(np.flatnonzero(table != UNKNOWN))}",
                'map the value under "ids" in the classes file'
                if self.name == "folder"
                else "check that the label belongs to this data set",
            )
        return label

    def _from_colors(self, raw: NDArray[np.generic], path: Path) -> NDArray[np.uint8]:
        """RGB [H, W, 3] -> train ids [H, W]; black is ignored unless a class has that colour."""
        # np.unique keeps the first of equal colours, so that a class whose colour is black comes before "ignored".
        colors, first = np.unique(_pack(np.array([*self.classes.colors, (0, 0, 0)])), return_index=True)
        train_ids = np.append(np.arange(self.classes.count), IGNORE).astype(np.uint8)[first]

        def convert(rows: NDArray[np.generic]) -> NDArray[np.uint8]:
            packed = _pack(rows)  # [h, W]
            position = np.searchsorted(colors, packed).clip(max=len(colors) - 1)
            return np.where(colors[position] == packed, train_ids[position], np.uint8(UNKNOWN))

        label = _in_strips(convert, raw)
        unknown = label == UNKNOWN
        if unknown.any():
            row, column = divmod(int(unknown.argmax()), label.shape[1])
            color = tuple(np.asarray(raw[row, column]).tolist())
            raise BadFile(
                path,
                f"holds the colour {color} at column {column}, row {row}, which no class has",
                "add it to colors in the classes file (black is ignored)",
            )
        return label

    def _color_advice(self) -> str:
        if self.name == "folder":
            return 'give "colors" for each class in the classes file'
        return f"give the {self.name} release's label files, not its colour pictures"

    def _labels(self, folder: Path) -> dict[str, list[Path]]:
        """Path below `folder` without extension -> the label files of that name (two if extensions differ)."""
        labels: dict[str, list[Path]] = {}
        for path in files_below(folder) if folder.is_dir() else ():
            if path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(self.spec.label_suffixes):
                labels.setdefault(_without_extension(path, folder), []).append(path)
        return labels

    def _candidates(self, image: Path, folder: Path, labels: dict[str, list[Path]]) -> tuple[str, list[Path]]:
        """The image's key, and every label file that fits it, best first."""
        whole = _without_extension(image, folder)
        key = whole.removesuffix(self.spec.image_suffix) or whole
        stems = dict.fromkeys(stem + suffix for stem in (key, whole) for suffix in self.spec.label_suffixes)
        return key, [path for stem in stems for path in labels.get(stem, ())]

    def _in_condition(self, image: Path, condition: str) -> bool:
        if self.name != "camvid" or condition in ("", "all"):
            return True
        return image.name.startswith(CAMVID_DUSK) == (condition == "dusk")

    def _parts(self, split: str, condition: str, option: str) -> list[_Part]:
        """The folders of each split and condition that is asked for and exists; at least one."""
        splits = self._split_folders(split, option)
        conditions = self._condition_folders(condition, option)
        parts = []
        for split_name, split_folder in splits.items():
            for condition_name in conditions:
                filled = {"split": split_folder, "condition": condition_name}
                images = self.root / self.spec.images.format(**filled)
                labels = [self.root / folder.format(**filled) for folder in self.spec.labels]
                prefix = f"{condition_name}/" * (len(conditions) > 1) + f"{split_name}/" * (len(splits) > 1)
                if images.is_dir():
                    parts.append(_Part(prefix, images, next((path for path in labels if path.is_dir()), labels[-1])))
        if not parts:
            folder = self.spec.images.format(split=next(iter(splits.values())), condition=conditions[0])
            raise UserError(
                f"{option_name(option, 'split')} {split}: {self.root / folder} does not exist (layout {self.name}); "
                f"give a split{' and condition' * bool(self.spec.conditions)} that the data set has"
            )
        return parts

    def _split_folders(self, split: str, option: str) -> dict[str, str]:
        """Names of the splits that are asked for -> their folders."""
        legal: dict[str, str] = dict(self.spec.splits)
        if self.name == "folder" and not any((self.root / "images" / name).is_dir() for name in legal):
            legal = {"train": ""}
        if split == "all":
            return legal
        for name, folder in legal.items():
            if split and split in (name, folder):
                return {name: folder}
        raise UserError(
            f"{option_name(option, 'split')} is {split!r}, and the splits of {self.root} (layout {self.name}) are "
            f"{', '.join(legal)} and all; give one of these"
        )

    def _condition_folders(self, condition: str, option: str) -> tuple[str, ...]:
        """The values that `{condition}` takes in paths."""
        legal = self.spec.conditions
        if condition and not legal:
            raise UserError(
                f"{option_name(option, 'condition')} is {condition!r}, and the layout {self.name} has no conditions; "
                f"leave it out"
            )
        if condition not in ("", "all", *legal):
            raise UserError(
                f"{option_name(option, 'condition')} is {condition!r}, and the conditions of {self.name} are "
                f"{', '.join(legal)} and all; give one of these"
            )
        if "{condition}" not in self.spec.images:
            return ("",)
        return legal if condition in ("", "all") else (condition,)


def find_layout(root: Path, name: str = "auto", classes: str = "", option: str = "") -> Layout:
    """The layout of the data set at `root`.

    Args:
        root: the folder of the data set; CamVid's may be one above.
        name: a key of LAYOUTS, or auto.
        classes: a classes file; it implies the layout `folder`.
        option: prefix of option names in errors, such as data.source.

    Raises:
        UserError: the root is missing or empty, no layout fits, or the classes file is wrong.
    """
    root = expanded(root, option)
    check_root(root, option)
    if is_store(root):
        raise UserError(
            f"{option_name(option, 'root')} {root} is a prepared store; give the folder of the original data set"
        )
    if name not in ("auto", *LAYOUTS):
        raise UserError(f"{option_name(option, 'layout')} is {name!r}; it must be auto or one of {', '.join(LAYOUTS)}")
    if classes and name not in ("auto", "folder"):
        raise UserError(
            f"{option_name(option, 'classes')} has no effect with the layout {name}, whose classes are fixed; "
            f"leave it out or give {option_name(option, 'layout')} folder"
        )
    class_file = next((root / file for file in CLASS_FILES if (root / file).is_file()), None)
    if classes:
        class_file, name = Path(classes).expanduser(), "folder"
    if name == "auto":
        name = _detect(root, class_file is not None, option)
    spec = LAYOUTS[name]
    if name == "camvid" and not _has(root, spec.markers):
        root = root / "CamVid"
    if not _has(root, spec.markers):
        raise UserError(
            f"{option_name(option, 'root')} {root} has no folder {' or '.join(spec.markers)}, which the layout {name} "
            f"needs; check the folder or the layout"
        )
    if name == "folder" and class_file is not None:
        read = read_class_file(class_file)
        return Layout(name, root, read.classes, read.table, read.color_coded)
    return Layout(name, root, spec.classes, id_table(spec.ids, known=spec.known))


def _detect(root: Path, has_class_file: bool, option: str) -> str:
    """The name of the layout that fits the folders below `root`."""
    for name, spec in LAYOUTS.items():
        if name == "gta5":
            if not has_class_file and _looks_like_gta5(root):
                return name
        elif _has(root, spec.markers) or (name == "camvid" and _has(root / "CamVid", spec.markers)):
            return name
    raise UserError(
        f"{option_name(option, 'root')} {root} has none of the known layouts ({', '.join(LAYOUTS)}); give the folder "
        f"in which leftImg8bit, rgb_anon, RGB, training, images or CamVid lies"
    )


def _has(root: Path, markers: Iterable[str]) -> bool:
    return any((root / marker).is_dir() for marker in markers)


def _looks_like_gta5(root: Path) -> bool:
    """Five-digit image names, and labels converted to train ids or with Cityscapes' palette (7 = road's purple).

    The palette is looked at because a user's own numbered files must not be read through GTA5's id table.
    """
    first = min((root / "images").glob("*.png"), default=None)
    if first is None or len(first.stem) != 5 or not first.stem.isdecimal():
        return False
    if (root / "labels" / f"{first.stem}_{TRAIN_IDS}.png").is_file():
        return True
    return palette_color(root / "labels" / first.name, 7) == CITYSCAPES.colors[0]


def _without_extension(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _in_strips(
    convert: Callable[[NDArray[np.generic]], NDArray[np.uint8]], raw: NDArray[np.generic]
) -> NDArray[np.uint8]:
    """`convert` of [H, W, ...] to [H, W], a few rows at a time: its wide integers take many times the label's bytes."""
    label = np.empty(raw.shape[:2], np.uint8)
    rows = max(1, _STRIP // raw.shape[1])
    for top in range(0, len(raw), rows):
        label[top : top + rows] = convert(raw[top : top + rows])
    return label


def _look_up(raw: NDArray[np.generic], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Values [H, W] of any integer type -> table entries uint8 [H, W]; UNKNOWN for values beyond the table."""
    if raw.dtype == np.uint8:
        return table[raw]
    wide = raw.astype(np.int64)
    inside = (wide >= 0) & (wide < len(table))
    return np.where(inside, table[np.where(inside, wide, 0)], np.uint8(UNKNOWN))


def _pack(colors: NDArray[np.generic]) -> NDArray[np.int64]:
    """RGB [..., 3] -> one integer a colour [...]."""
    wide = colors.astype(np.int64)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _ranges(values: NDArray[np.int64]) -> str:
    """Sorted integers in words: 0..18, 255."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
