"""Finding the files below a folder, whatever links lie in it."""

import os
from pathlib import Path

from ssr_fast.data.images import IMAGE_SUFFIXES, printable
from ssr_fast.errors import UserError

_MAX_REPEATS = 10_000  # folders met again over links; links that cross each other make more ways than can be walked


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; links to folders are followed, never in a circle; hidden files are not seen.

    A link that leads nowhere counts as a file, and so does an empty folder with an image's name: they are named as bad
    ones instead of going missing.

    Raises:
        UserError: a folder cannot be listed, or links lead over and over to the same folders.
    """
    files: list[Path] = []
    start = os.path.realpath(folder)
    stack, met, repeats = [(str(folder), start, frozenset([start]))], {start}, 0
    while stack:
        current, resolved, above = stack.pop()
        children = _children(current)
        if not children and current.lower().endswith(IMAGE_SUFFIXES):
            files.append(Path(current))
        for child in children:
            if not _is_folder(child):
                files.append(Path(child.path))
                continue
            real = os.path.join(resolved, child.name)
            real = os.path.realpath(real) if child.is_symlink() else real
            if real in above:
                continue
            repeats += real in met
            if repeats > _MAX_REPEATS:
                raise UserError(
                    f"the links below {printable(folder)} lead to the same folders in more than {_MAX_REPEATS} ways, "
                    f"the last of them {printable(Path(child.path))}; remove the links that lead to each other"
                )
            met.add(real)
            stack.append((child.path, real, above | {real}))
    return sorted(files)


def leads_nowhere(path: Path) -> bool:
    """A link whose target does not exist, or that is part of a circle."""
    return os.path.islink(path) and not os.path.exists(path)


def _children(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as children:
            return [child for child in children if not child.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"the folder {printable(Path(folder))} cannot be listed ({error.strerror}); check its permissions and name"
        ) from error


def _is_folder(child: "os.DirEntry[str]") -> bool:
    """Folder or link to one. What the listing says of a folder counts: its path may be too long for a look at it."""
    return os.path.isdir(child.path) if child.is_symlink() else child.is_dir(follow_symlinks=False)
