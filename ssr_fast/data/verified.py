"""Which large files were read through and found whole, so that only those that changed since are read again.

A byte that a disk loses without a write is not noticed by this: `python -m ssr_fast.prepare check` reads everything.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssr_fast.data.cache import Report, default_folder, write_text
from ssr_fast.data.images import BadFile

_MOST_THREADS = 16
_LONG = 1 << 30  # bytes whose reading is announced
_TICK = 100_000_000  # nanoseconds: a second write within one tick of the file system's clock would leave no trace

_Stamp = tuple[int, int, int, int]


def check_files(
    key: str, paths: Sequence[Path], check: Callable[[Path], BadFile | None], report: Report, again: bool = False
) -> list[BadFile]:
    """Read files through, in parallel, unless they were whole before and have not changed.

    Args:
        key: what the files have to agree with, such as a digest of their index.
        paths: of the files.
        check: what is wrong with a file; None if it is whole.
        report: takes one line before a long reading and one if what was found cannot be kept.
        again: read all of them.
    """
    memory = _memory(key)
    known = {} if again else _load(memory)
    stamps = {path: _stamp(path) for path in paths}
    todo = [path for path in paths if known.get(str(path)) != stamps[path]]
    size = sum(stamps[path][0] for path in todo)
    if size > _LONG:
        report(f"verifying {len(todo)} of {len(paths)} files of {todo[0].parent} ({size / 1e9:.1f} GB), once")
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        found = [error for error in pool.map(check, todo) if error is not None]
    bad = {error.path for error in found}
    # a file that changed while it was read, or a moment before, may change again within one tick of its clock
    settled = time.time_ns() - _TICK
    good = [path for path in paths if path not in bad and stamps[path][2] < settled and _stamp(path) == stamps[path]]
    whole = {str(path): stamps[path] for path in good}
    if whole != known:
        _save(memory, whole, report)
    return found


def _stamp(path: Path) -> _Stamp:
    """Size, times of the last changes of content and of anything, number of the file; zeros if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _memory(key: str) -> Path:
    """Beside the indices of data sets."""
    return default_folder() / f"verified-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _load(memory: Path) -> dict[str, _Stamp]:
    """Whatever cannot be read counts as nothing."""
    try:
        content = json.loads(memory.read_text(encoding="ascii"))
        return {str(path): (stamp[0], stamp[1], stamp[2], stamp[3]) for path, stamp in content.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}


def _save(memory: Path, whole: dict[str, _Stamp], report: Report) -> None:
    try:
        write_text(memory, json.dumps(whole))
    except OSError as error:
        report(f"{memory} cannot be written ({error.strerror}); stores are verified at every start")
