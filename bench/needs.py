"""What a command needs to run here: a GPU, and the packages that its files import."""

import ast
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "kernels")


def no_gpu() -> list[str]:
    """Why torch cannot use a GPU here."""
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed"]
    import torch

    return [] if torch.cuda.is_available() else ["there is no GPU that torch can use"]


def missing_packages(paths: Iterable[Path]) -> list[str]:
    """Packages that these files, or files of ours that they import, need at import and that are not installed."""
    seen: set[Path] = set()
    missing: set[str] = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imported(path):
            if own := _own_files(name, SOURCES):
                waiting += own
            elif (top := name.split(".")[0]) not in sys.stdlib_module_names and not installed(top):
                missing.add(top)
    return [f"{name} is not installed" for name in sorted(missing)]


@cache
def _imported(path: Path) -> list[str]:
    """Dotted names that a file imports at its top level; what is imported inside functions is optional."""
    root = next(root for root in reversed(SOURCES) if path.is_relative_to(root))
    package = path.relative_to(root).with_suffix("").parts[:-1]
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


@cache
def _own_files(name: str, sources: tuple[Path, ...]) -> list[Path]:
    """The files of this repository behind a dotted name, the packages above it included; empty for anything else."""
    parts, found = name.split("."), []
    for root in sources:
        for count in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:count])
            found += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found


def installed(package: str) -> bool:
    """Whether it can be found, without importing it."""
    return importlib.util.find_spec(package) is not None
