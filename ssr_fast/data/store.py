"""Opens prepared stores: what index.json says, the samples' parts of the large files, and what is damaged.

H W pixels of a stored image, K classes.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.cache import Report
from ssr_fast.data.images import BadFile
from ssr_fast.data.labels import ClassSet
from ssr_fast.data.store_files import (
    DTYPES,
    HEADER_BYTES,
    Row,
    checksum,
    checksum_of,
    decode_jpeg,
    header,
    kinds,
    shard_name,
)
from ssr_fast.data.stores import FILE, Recipe, StoreKind, open_folder
from ssr_fast.data.verified import check_files
from ssr_fast.errors import UserError

COMMAND = "python -m ssr_fast.prepare store"
GENERATOR = "prepared store"
INDEX = "index.json"
KIND = StoreKind("store", "prepared store", COMMAND)

_SUM = "checksum"
_NO_SUM = "0" * 32


@dataclass(frozen=True)
class ImageStore:
    """An open store; made by `open_store`.

    Args:
        folder: of the store.
        recipe: what made it.
        classes: what the labels tell apart.
        rows: the samples, by name in order.
        notes: what was unusual with the originals.
        files: checksums of whole files, by name.
    """

    folder: Path
    recipe: Recipe
    classes: ClassSet
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def is_jpeg(self) -> bool:
        """Whether images are JPEG files, not pixels."""
        return bool(self.recipe.options["image"] == "jpeg")

    @property
    def box(self) -> tuple[int, int] | None:
        """(width, height) of the box that the images were resized into; None if they were not."""
        box = self.recipe.options["resize"]
        return (box[0], box[1]) if box else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of images, labels, segments it holds."""
        return kinds(self.recipe)

    def image(self, path: Path | str) -> NDArray[np.uint8]:
        """RGB uint8 [H, W, 3] of a sample; of a raw store a read-only view of the file, of which nothing is read yet.

        Args:
            path: of the original, as if it lay in the store's folder.

        Raises:
            BadFile: the store has no such sample, or its file is damaged.
        """
        row = self._row(path)
        if self.is_jpeg:
            return decode_jpeg(self.jpeg(path), self.path("images", row.shard))
        return self._map("images", row)[row.start : row.stop].reshape(*row.stored[::-1], 3)

    def jpeg(self, path: Path | str) -> NDArray[np.uint8]:
        """A sample's JPEG file, uint8 [bytes], after a look at its checksum; arguments and errors as of `image`."""
        row = self._row(path)
        content = self._map("images", row)[row.start : row.stop]
        if checksum(content) != row.sums["images"]:
            raise self._damaged("images", row)
        return content

    def label(self, path: Path | str) -> NDArray[np.uint8]:
        """Train ids uint8 [H, W] of a sample, 255 ignored; a read-only view, arguments and errors as of `image`."""
        row = self._row(path)
        return self._map("labels", row)[row.first : row.first + row.pixels].reshape(row.stored[::-1])

    def segments(self, path: Path | str) -> NDArray[np.uint16]:
        """Segments uint16 [H, W] of a sample, 0 is none; a read-only view, arguments and errors as of `image`."""
        row = self._row(path)
        return self._map("segments", row)[row.first : row.first + row.pixels].reshape(row.stored[::-1])

    def path(self, kind: str, shard: int) -> Path:
        """The file of a kind."""
        return self.folder / shard_name(kind, shard)

    def damage(self, report: Report, again: bool = False) -> list[BadFile]:
        """What is missing, cut short or damaged; a file that was whole and has not changed since is not read again.

        Args:
            report: takes one-line messages.
            again: read everything.
        """
        shards: dict[Path, list[Row]] = {}
        for row in self.rows:
            for kind in self.kinds:
                shards.setdefault(self.path(kind, row.shard), []).append(row)

        def check(path: Path) -> BadFile | None:
            return self.check_shard(path, shards[path]) if path in shards else self._check_whole(path)

        paths = [*shards, *(self.folder / name for name in self.files)]
        key = f"{self.folder.resolve()} {checksum((self.folder / INDEX).read_bytes())}"
        return check_files(key, paths, check, report, again)

    def check_shard(self, path: Path, rows: Sequence[Row]) -> BadFile | None:
        """What is wrong with a file that holds the parts of rows, and nothing else."""
        kind = path.name.partition("-")[0]
        try:
            with path.open("rb") as file:
                length = max(row.span(kind)[1] for row in rows)
                if (found := path.stat().st_size) != length:
                    return BadFile(path, f"has {found} bytes where {length} were written", self._advice())
                if file.read(HEADER_BYTES) != header(kind, (length - HEADER_BYTES) // np.dtype(DTYPES[kind]).itemsize):
                    return BadFile(path, "is damaged (its header is another)", self._advice())
                for row in rows:
                    if checksum_of(file, *row.span(kind)) != row.sums[kind]:
                        return self._damaged(kind, row)
        except OSError as error:
            return BadFile(path, _reason(error), self._advice())
        return None

    def _check_whole(self, path: Path) -> BadFile | None:
        """What is wrong with a file of which the whole has a checksum."""
        try:
            whole = checksum(path.read_bytes()) == self.files[path.name]
        except OSError as error:
            return BadFile(path, _reason(error), self._advice())
        return None if whole else BadFile(path, "is damaged (its checksum is another)", self._advice())

    def _advice(self) -> str:
        return _advice(self.folder, self.recipe)

    def _damaged(self, kind: str, row: Row) -> BadFile:
        problem = f"is damaged (the checksum of {row.name!r} is another)"
        return BadFile(self.path(kind, row.shard), problem, self._advice())

    def _row(self, path: Path | str) -> Row:
        """Raises BadFile if there is no such sample."""
        row = self._by_path.get(str(path))
        if row is None:
            raise BadFile(Path(path), f"is no sample of the store {self.folder}", "give a path that its index has")
        return row

    def _map(self, kind: str, row: Row) -> NDArray[Any]:
        """The file of a kind that holds a row, mapped into memory; raises BadFile if it is not what it should be."""
        path = self.path(kind, row.shard)
        if path not in self._maps:
            try:
                values = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise BadFile(path, f"cannot be opened ({' '.join(str(error).split())})", self._advice()) from error
            size = np.dtype(DTYPES[kind]).itemsize
            whole = HEADER_BYTES + values.size * size >= row.span(kind)[1]
            if values.dtype.str != DTYPES[kind] or values.ndim != 1 or not whole:
                raise BadFile(path, "is not the file that the store's index describes", self._advice())
            self._maps[path] = values
        return self._maps[path]

    @cached_property
    def _by_path(self) -> dict[str, Row]:
        return {str(self.folder / row.image): row for row in self.rows} | {
            str(self.folder / row.label): row for row in self.rows if row.label is not None
        }

    @cached_property
    def _maps(self) -> dict[Path, NDArray[Any]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: each process makes its own."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _advice(folder: Path, recipe: Recipe) -> str:
    """The command that repairs a store."""
    words = [*COMMAND.split(), "ROOT", "--out", str(folder)]
    for name, value in recipe.options.items():
        default = {"split": "train", "condition": "", "labelled": True, "image": "raw"}.get(name)
        if value is None or value == default or name in ("classes", "table"):
            continue
        if name == "labelled":
            words += ["--unlabelled"]
        elif name == "segments":
            words += ["--segments", "FOLDER"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return f"run `{shlex.join(words)}` with the original data set as ROOT: it makes again what is damaged"


def is_store(root: Path) -> bool:
    """Whether a folder is a prepared store, finished or not."""
    try:
        content = json.loads((root / FILE).read_text(encoding="utf-8"))
        return bool(content["generator"] == GENERATOR)
    except (OSError, ValueError, TypeError, KeyError):
        return os.path.isfile(root / INDEX) and os.path.isfile(root / FILE)  # Path's own raises for too long a name


def open_store(root: Path, option: str) -> ImageStore:
    """The store in a folder; `damage` finds what is wrong with its larger files.

    Args:
        root: folder of the store.
        option: the option's name as it is written, for errors.

    Raises:
        UserError: it is not finished, or store.json or index.json is damaged.
    """
    _, recipe = open_folder(KIND, str(root), root, option.removeprefix("--"))
    path = root / INDEX
    if recipe.generator != GENERATOR:
        raise UserError(f"{path.parent / FILE} was changed since the store was made; {_advice(root, recipe)}")
    if not path.is_file():
        raise UserError(f"{option}: the prepared store {root} is not finished; {_advice(root, recipe)}")
    return read_index(path, recipe)


def read_index(path: Path, recipe: Recipe) -> ImageStore:
    """What index.json says.

    Raises:
        BadFile: it is damaged, or of another recipe.
    """
    try:
        text = path.read_bytes()
        content = json.loads(text)
        found = str(content[_SUM])
        if checksum(text.replace(found.encode(), _NO_SUM.encode(), 1)) != found:
            raise ValueError("its checksum is another")
        classes = content["classes"]
        colors = tuple((color[0], color[1], color[2]) for color in classes["colors"])
        class_set = ClassSet(classes["name"], tuple(classes["names"]), colors, tuple(classes["things"]))
        rows = tuple(Row.of(fields) for fields in content["samples"])
        store = ImageStore(path.parent, recipe, class_set, rows, tuple(content["notes"]), content["files"])
        if content["recipe"] != recipe.digest:
            raise BadFile(path.parent / FILE, "was changed since the store was made", _advice(path.parent, recipe))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise BadFile(path, f"is damaged ({reason})", _advice(path.parent, recipe)) from error
    return store


def index_text(store: ImageStore) -> bytes:
    """index.json of a store."""
    classes = store.classes
    content = {
        _SUM: _NO_SUM,
        "version": 1,
        "recipe": store.recipe.digest,
        "classes": {
            "name": classes.name,
            "names": classes.names,
            "colors": classes.colors,
            "things": classes.things,
        },
        "notes": store.notes,
        "files": dict(sorted(store.files.items())),
        "samples": [{**row.__dict__, "sums": dict(sorted(row.sums.items()))} for row in store.rows],
    }
    text = (json.dumps(content) + "\n").encode()
    return text.replace(_NO_SUM.encode(), checksum(text).encode(), 1)
