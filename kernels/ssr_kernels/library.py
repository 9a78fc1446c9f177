"""The compiled libraries, loaded by ctypes, or why they are not there.

libssr_cpu.so and libssr_cuda.so stand in the folder `lib` beside this file. Where one could not be built, setup.py
leaves `lib<name>.txt` instead, whose first line says why (a compiler's output may follow).
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path

LIBRARIES = {"ssr_cpu": "ssr_version", "ssr_cuda": "ssr_cuda_version"}
"""Name of each library and of its function that returns the digest of the sources it was built from."""

REBUILD = "python setup.py build_csrc --inplace"

_PACKAGE = Path(__file__).parent


def reasons(name: str) -> list[str]:
    """Why library `name` (of LIBRARIES) cannot be used: one sentence, or empty if it is loaded."""
    return [] if isinstance(loaded := _load(name), ctypes.CDLL) else [loaded]


def load(name: str) -> ctypes.CDLL:
    """Library `name` of LIBRARIES.

    Raises:
        OSError: it cannot be used; the message says why.
    """
    loaded = _load(name)
    if isinstance(loaded, str):
        raise OSError(loaded)
    return loaded


def open_library(name: str, folder: Path, sources: Path) -> ctypes.CDLL | str:
    """Open lib<name>.so of `folder`, or say in one sentence why that is impossible.

    Args:
        name: one of LIBRARIES.
        folder: where the libraries and the notes of setup.py stand.
        sources: csrc/ of the source checkout; where it exists the library must have been built from what it holds.
    """
    path, note = folder / f"lib{name}.so", folder / f"lib{name}.txt"
    if not path.exists():
        why = note.read_text(encoding="utf-8").splitlines()[0] if note.exists() else f"build it with `{REBUILD}`"
        return f"{path.name} not built: {why}"
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, LIBRARIES[name])
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({error}); rebuild it with `{REBUILD}`"
    version.restype = ctypes.c_char_p
    if sources.is_dir() and version().decode() != digest(sources):
        return f"{path.name} is stale (csrc has changed since it was built); rebuild it with `{REBUILD}`"
    return library


def digest(sources: Path) -> str:
    """Digest of the C++ and CUDA sources of a folder; CMakeLists.txt computes the same."""
    files = sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    lines = "".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def report() -> list[str]:
    """A line for each reason why libraries cannot be used, and the compiler's output where compiling failed."""
    names: dict[str, list[str]] = {}
    output: list[str] = []
    for name in LIBRARIES:
        for reason in reasons(name):
            names.setdefault(reason.removeprefix(f"lib{name}.so "), []).append(f"lib{name}.so")
        note = _PACKAGE / "lib" / f"lib{name}.txt"
        output += note.read_text(encoding="utf-8").splitlines()[1:] if note.exists() else []
    return output + [f"ssr_fast: {' and '.join(files)} {reason}" for reason, files in names.items()]


@cache
def _load(name: str) -> ctypes.CDLL | str:
    return open_library(name, _PACKAGE / "lib", _PACKAGE.parents[1] / "csrc")


if __name__ == "__main__":
    print("".join(f"{line}\n" for line in report()), end="")
