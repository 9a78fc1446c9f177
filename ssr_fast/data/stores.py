"""What the stores beside a data set have in common: a folder with store.json, which says what made it, and one file an
image, at the image's path below the data set's root with a suffix of its own.

Every file is written whole or not at all, and names the recipe that it was made by, so that two recipes never mix.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Literal, TypeVar

from ssr_fast.data.images import BadFile
from ssr_fast.errors import UserError

_Content = TypeVar("_Content")
FILE = "store.json"
TEMPORARY = ".tmp"  # below the store, so that a finished file only changes its name
_VERSION = 1
_NEW = 10.0  # seconds in which a file there may have no lock yet
_STALE = 86400.0  # seconds after which a file was left by a killed process for sure, on a file system without locks


@dataclass(frozen=True)
class StoreKind:
    """What is kept: `content` in one word, which is also the store's folder in a data set's root, its `name` and the
    `command` that makes it."""

    content: str
    name: str
    command: str


@dataclass(frozen=True)
class Recipe:
    """What makes the files of a store: the generator's name and every option that their content depends on."""

    generator: str
    options: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Names the recipe, 16 characters; written into every file, so that files of two recipes never mix."""
        content = [self.generator, dict(self.options), _VERSION]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ", ".join([self.generator, *(f"{name} {value}" for name, value in sorted(self.options.items()))])


@dataclass(frozen=True)
class Store(Generic[_Content]):
    """The files of one data set.

    Args:
        folder: of the store.
        root: of the data set (the layout's), which the images' paths start with.
        recipe: what makes the files.
    """

    folder: Path
    root: Path
    recipe: Recipe
    suffix: ClassVar[str]

    def path(self, image: Path | str) -> Path:
        """The file of an image."""
        relative = Path(image).relative_to(self.root)
        return self.folder / relative.with_name(relative.name + self.suffix)

    def problem(self, image: Path | str, size: tuple[int, int]) -> str | None:
        """What is wrong with an image's file, as a predicate; None if it is whole and of this size and recipe."""
        try:
            self._decode(image, size)
        except BadFile as error:
            return error.problem
        return None

    def _decode(self, image: Path | str, size: tuple[int, int] | None) -> _Content:
        """What an image's file holds.

        Raises:
            BadFile: it is missing, damaged, of an image of another size (None takes any) or of another recipe.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Args:
        image: its path.
        kind: made, kept (a whole file was there) or failed.
        message: why it failed, or why a file that was there was made again; a sentence, else empty.
    """

    image: Path
    kind: Literal["made", "kept", "failed"]
    message: str = ""


def open_folder(kind: StoreKind, folder: str, root: Path, option: str) -> tuple[Path, Recipe]:
    """Folder and recipe of the store that an option names.

    Args:
        kind: of the store.
        folder: of the store; empty: the kind's in the data set's root.
        root: of the data set (the layout's).
        option: the option's name, for errors.

    Raises:
        UserError: there is no store, or its store.json is damaged.
    """
    path = Path(folder).expanduser() if folder else root / kind.content
    if not (path / FILE).is_file():
        out = f" --out {folder}" if folder else ""
        raise UserError(f"--{option}: {path} is no {kind.name} (no {FILE}); make it with `{kind.command} {root}{out}`")
    return path, _read_recipe(path / FILE, kind)


def create_folder(kind: StoreKind, folder: Path | None, root: Path, recipe: Recipe, overwrite: bool) -> Path:
    """The folder of a store (None: the kind's in the data set's root), made if there is none.

    Raises:
        UserError: the folder holds files of another recipe (and not `overwrite`), other things, or cannot be written.
    """
    folder = folder if folder is not None else root / kind.content
    file = folder / FILE
    if file.is_file() and not overwrite:
        found = _read_recipe(file, kind)
        if found != recipe:
            raise UserError(
                f"{folder} is a store of other {kind.content} ({found}, and now asked for: {recipe}); give another "
                f"--out, or --overwrite to make them anew"
            )
    elif folder.is_dir() and not file.is_file() and any(path.name != TEMPORARY for path in folder.iterdir()):
        raise UserError(f"{folder} holds other files and no {FILE}; give a new or empty folder as --out")
    else:
        content = {"version": _VERSION, "generator": recipe.generator, "options": dict(recipe.options)}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_file(file, folder, lambda handle: handle.write(text.encode()))
    _sweep(folder / TEMPORARY)
    return folder


@contextmanager
def open_new(path: Path, store: Path, to_disk: bool = False) -> Iterator[IO[bytes]]:
    """A new file below the store's temporary folder, which takes its name when the body ends without an error: a killed
    process leaves no half file.

    Args:
        path: of the file.
        store: folder of the store that it belongs to.
        to_disk: wait until the content is on the disk before it takes the name. Without it a file that a power failure
            cut short has to be found by its check sums.

    Raises:
        UserError: it cannot be written.
    """
    part = store / TEMPORARY / uuid.uuid4().hex
    try:
        for folder in (part.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                _lock(file)
                yield file
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); check the folder's rights and its free space"
        ) from error


def write_file(path: Path, store: Path, save: Callable[[IO[bytes]], object], to_disk: bool = False) -> None:
    """Write a file of a store, whole or not at all; `save` writes the content, the rest is as for `open_new`."""
    with open_new(path, store, to_disk) as file:
        save(file)


def _lock(file: IO[bytes]) -> None:
    """Held until the file is closed, by this process's end if need be; says that somebody is writing."""
    with contextlib.suppress(OSError):  # a file system without locks: then age decides
        fcntl.flock(file, fcntl.LOCK_EX)


def _read_recipe(file: Path, kind: StoreKind) -> Recipe:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, generator, options = content["version"], content["generator"], content["options"]
        if not isinstance(generator, str) or not isinstance(options, dict):
            raise ValueError("generator or options are missing")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged ({reason}); run `{kind.command}` with --overwrite for this store"
        ) from error
    if version != _VERSION:
        raise UserError(f"{file} has version {version}, and this is {_VERSION}; make the store anew with --overwrite")
    return Recipe(generator, options)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left: files that nobody holds a lock on."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process has just finished or removed it
            age = time.time() - path.stat().st_mtime
            if age > (_NEW if _unlocked(path) else _STALE):
                path.unlink()


def _unlocked(path: Path) -> bool:
    """Whether nobody holds a lock; False too on a file system that has none."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
