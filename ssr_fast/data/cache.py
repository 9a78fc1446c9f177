"""The folder in which results of looking at data are kept, so that the same files need not be looked at again."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

Report = Callable[[str], None]
"""Takes one-line messages."""


def default_folder() -> Path:
    """$SSR_FAST_CACHE/index, or ~/.cache/ssr_fast/index."""
    base = os.environ.get("SSR_FAST_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "ssr_fast") / "index"


def write_text(path: Path, text: str) -> None:
    """Write a file of a cache, whole or not at all; OSError if it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".index-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
