"""The folder that a user gives for a data set, and how its options are called in messages."""

import os
from pathlib import Path

from ssr_fast.errors import UserError


def option_name(option: str, name: str) -> str:
    """How an option is called in messages: --data.source.root, or for `prepare` (no prefix) ROOT and --split."""
    if option:
        return f"--{option}.{name}"
    return "ROOT" if name == "root" else f"--{name}"


def expanded(root: Path, option: str) -> Path:
    """The root with ~ replaced.

    Raises:
        UserError: there is no such user.
    """
    try:
        return root.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{option_name(option, 'root')} {root} does not exist ({error}); give another folder"
        ) from error


def check_root(root: Path, option: str) -> None:
    """The root is a folder, readable and not empty."""
    where = f"{option_name(option, 'root')} {root}"
    if not os.path.isdir(root):  # Path's own method raises for a name that is too long
        kind = "is a file" if os.path.isfile(root) else "does not exist"
        raise UserError(f"{where} {kind}; give the data set's folder")
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise UserError(f"{where} cannot be listed ({error.strerror}); check its permissions") from error
    if empty:
        raise UserError(f"{where} is an empty folder; give the data set's folder")
