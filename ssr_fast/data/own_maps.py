"""A user's own segments: any folder of integer maps, one an image, found by name.

H W pixels.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.images import BadFile, decode_label
from ssr_fast.data.layouts import Entry
from ssr_fast.data.segments import MAX_SEGMENTS, compact

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".jpg", ".jpeg")
"""Files that are taken for maps; JPEG only to be refused by name, for it does not keep ids."""

_ADVICE = "give a map of integers >= 0, one a pixel, as PNG, TIFF or .npy"


@dataclass(frozen=True)
class OwnMap:
    """The user's map of one image, as a generator of segments."""

    file: Path

    def __call__(self, path: Path, image: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """The map of an image uint8 [H, W, 3] as uint16 [H, W]: its own ids, renumbered only if one is beyond 65535.

        Raises:
            BadFile: the map is damaged, of another size than the image, or holds no ids.
        """
        ids = read_ids(self.file)
        if ids.shape != image.shape[:2]:
            sizes = f"is {ids.shape[1]}x{ids.shape[0]} pixels and {path} is {image.shape[1]}x{image.shape[0]}"
            raise BadFile(self.file, sizes, "give maps of the images' own size")
        return compact(ids) if ids.max() > MAX_SEGMENTS else ids.astype(np.uint16)


def read_ids(file: Path) -> NDArray[np.integer[Any]]:
    """A map file -> its ids, integers >= 0 of any type [H, W].

    Raises:
        BadFile: it is damaged, a JPEG, has several channels, or holds fractions or negative numbers.
    """
    values = _read_npy(file) if file.suffix.lower() == ".npy" else decode_label(file)
    if values.ndim != 2:
        raise BadFile(file, f"has the shape {list(values.shape)} where one id a pixel is expected", _ADVICE)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype.kind not in "ui":
        raise BadFile(file, f"holds values of type {values.dtype}", _ADVICE)
    if not values.size:
        raise BadFile(file, "holds no pixels", _ADVICE)
    if values.min() < 0:
        raise BadFile(file, f"holds the negative id {values.min()}", "give ids > 0, and 0 where there is no segment")
    ids: NDArray[np.integer[Any]] = values  # type: ignore[assignment]
    return ids


def match(entries: Sequence[Entry], folder: Path, root: Path) -> tuple[dict[Path, OwnMap], list[BadFile]]:
    """Find the map of each image.

    A map is named like its image (any suffix), and lies in `folder` at the image's path below the data set's root, at
    its path below the split's folder, or anywhere if no other image has that name. Where two images differ in their
    suffix only, a map has both suffixes: a.jpg.png.

    Args:
        entries: all images of the split, whatever this process works on.
        folder: of the maps.
        root: of the data set.

    Returns:
        image -> its map, and what is wrong with the others: none fits, several fit, or it fits several images.
    """
    files = _files(folder)
    found: dict[Path, OwnMap] = {}
    problems: list[BadFile] = []
    stems = Counter(key for entry in entries for key in set(_short_keys(entry)))
    for entry in entries:
        relative = entry.image.relative_to(root).as_posix()
        keys = [relative, entry.image.relative_to(root).with_suffix("").as_posix(), entry.name]
        keys += [f"/{key}" for key in _short_keys(entry) if stems[key] == 1]
        fitting = next((files[key] for key in keys if key in files), [])
        if len(fitting) == 1:
            found[entry.image] = OwnMap(fitting[0])
        elif fitting:
            problem = f"has several maps, {fitting[0]} and {fitting[1]}"
            problems.append(BadFile(entry.image, problem, "remove all but one of them"))
        else:
            advice = f"add {folder / relative}.png, or name the map like the image"
            problems.append(BadFile(entry.image, f"has no map in {folder}", advice))
    claims = Counter(own.file for own in found.values())
    for image in [image for image, own in found.items() if claims[own.file] > 1]:
        problem = f"shares its map {found.pop(image).file} with another image"
        problems.append(BadFile(image, problem, f"name its own map {image.name}.png"))
    return found, problems


def _short_keys(entry: Entry) -> tuple[str, ...]:
    """An image's names without folders: as it is, without suffix, without the layout's suffix."""
    return entry.image.name, entry.image.stem, entry.name.rpartition("/")[2]


def _files(folder: Path) -> dict[str, list[Path]]:
    """Path below `folder` without suffix -> files, and "/" + name without suffix -> files wherever they lie."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in _maps(folder):
        relative = path.relative_to(folder).with_suffix("")
        files[relative.as_posix()].append(path)
        files[f"/{relative.name}"].append(path)
    return files


def _maps(folder: Path) -> Iterable[Path]:
    """All map files below `folder`, sorted; hidden ones are not seen."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir():
            yield path


def _read_npy(file: Path) -> NDArray[np.generic]:
    try:
        values = np.load(file, allow_pickle=False)
    except PermissionError as error:
        raise BadFile(file, "may not be read (permission denied)", "give yourself read permission") from error
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise BadFile(file, f"cannot be read as .npy ({reason})", "write it with numpy.save") from error
    if not isinstance(values, np.ndarray):  # an .npz under another name
        raise BadFile(file, "is an archive of several arrays", "write one array with numpy.save")
    return values
