"""The rules of the house, read from the source: imports go downwards, files and functions stay small.

Each rule is a function that returns what is wrong in a tree, and is also run on a fabricated tree that breaks it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# lowest first; rooms of one floor may not import one another
FLOORS = (
    ("errors", "ssr_kernels"),
    ("data",),
    ("models", "eval", "report"),
    ("methods", "shipped", "evaluator"),
    ("engine",),
    ("config",),
    ("presets",),
    ("options", "domains", "prepare_parts", "run_files"),
    ("session", "commandline"),
    ("arguments", "prepare_check", "prepare_features", "prepare_masks", "prepare_store"),
    ("train", "evaluate", "predict", "prepare", "export", "info"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILE_LINES, FUNCTION_LINES = 400, 80


def sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Each source file of the two packages, and its dotted module name."""
    for top in (root / "ssr_fast", root / "kernels" / "ssr_kernels"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, anywhere in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str:
    """The room that a module of ours is in: "data", "train", "ssr_kernels"; "" for ssr_fast and its __version__."""
    parts = module.split(".")
    if parts[0] == "ssr_kernels":
        return "ssr_kernels"
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else ""


def upward_imports(root: Path) -> list[str]:
    found = []
    for path, module in sources(root):
        here = room_of(module)
        if here and here not in FLOOR:
            found.append(f"{path.relative_to(root)}: the room {here} has no floor")
            continue
        for line, name in imports(path, module):
            there = room_of(name)
            if name.split(".")[0] not in ("ssr_fast", "ssr_kernels") or there in ("", here):
                continue
            if not here or FLOOR.get(there, len(FLOORS)) >= FLOOR[here]:
                found.append(f"{path.relative_to(root)}:{line}: {here or 'ssr_fast'} imports {name}")
    return found


def distributed_imports(root: Path) -> list[str]:
    """torch.distributed outside of engine/, imported or reached through `torch`."""
    found = []
    for path, module in sources(root):
        if room_of(module) == "engine":
            continue
        lines = {line for line, name in imports(path, module) if name.startswith("torch.distributed")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                lines.add(node.lineno)
        found += [f"{path.relative_to(root)}:{line}: torch.distributed belongs to engine/" for line in sorted(lines)]
    return found


def large_parts(root: Path) -> list[str]:
    """Files and functions that are too long, in the packages, the benchmarks, the tests and the build."""
    found = []
    for path in sorted(
        path for top in ("ssr_fast", "kernels", "bench", "tests") for path in (root / top).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        if (count := text.count("\n")) >= FILE_LINES:
            found.append(f"{path.relative_to(root)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= FUNCTION_LINES:
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {node.name} has {length} lines")
    return found


RULES = (upward_imports, distributed_imports, large_parts)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    assert len(list(sources(ROOT))) > 20
    assert rule(ROOT) == []


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


GOOD = {
    "ssr_fast/__init__.py": "",
    "ssr_fast/errors.py": "from ssr_fast import __version__\n",
    "ssr_fast/data/index.py": "from ssr_fast.errors import UserError\nfrom ssr_kernels import counter\n",
    "ssr_fast/models/mit.py": "from .noise import Noise\nfrom ..data import labels\n",
    "ssr_fast/engine/trainer.py": "import torch.distributed as dist\nfrom ssr_fast.methods import ssr\n",
    "kernels/ssr_kernels/align/op.py": "from .. import checks\nfrom . import reference\n",
}
BAD_IMPORTS = {
    "upward": ("ssr_fast/data/plan.py", "from ssr_fast.engine.trainer import Trainer\n"),
    "upward, package": ("ssr_fast/data/plan.py", "from ssr_fast import engine\n"),
    "upward, plain import": ("ssr_fast/data/plan.py", "import ssr_fast.models.mit\n"),
    "upward, relative": ("ssr_fast/data/plan.py", "from ..models import mit\n"),
    "upward, inside a function": ("ssr_fast/data/plan.py", "def f():\n    from ssr_fast import config\n"),
    "upward, for types": ("ssr_fast/errors.py", "if TYPE_CHECKING:\n    from ssr_fast.data import index\n"),
    "sideways": ("ssr_fast/eval/inference.py", "from ssr_fast.models.mit import MixTransformer\n"),
    "sideways, entry points": ("ssr_fast/train.py", "from ssr_fast.evaluate import main\n"),
    "kernels import the trainer": ("kernels/ssr_kernels/align/op.py", "from ssr_fast.errors import UserError\n"),
    "the bare package imports a room": ("ssr_fast/__init__.py", "from ssr_fast.errors import UserError\n"),
    "unknown room": ("ssr_fast/helpers/tools.py", ""),
    "import of an unknown room": ("ssr_fast/train.py", "from ssr_fast.attic import old\n"),
}


def test_a_good_tree_passes_every_rule(tmp_path):
    root = write(tmp_path, GOOD)
    assert [rule(root) for rule in RULES] == [[], [], []]


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_bad_import_is_found(name, tmp_path):
    path, text = BAD_IMPORTS[name]
    found = upward_imports(write(tmp_path, {**GOOD, path: text}))
    assert len(found) == 1 and found[0].startswith(path)


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist\n",
        "from torch import distributed\n",
        "from torch.distributed.tensor import DTensor\n",
        "import torch\n\n\ndef f():\n    return torch.distributed.get_rank()\n",
    ],
)
def test_torch_distributed_outside_of_engine_is_found(text, tmp_path):
    found = distributed_imports(write(tmp_path, {**GOOD, "ssr_fast/eval/run.py": text}))
    assert len(found) == 1 and found[0].startswith("ssr_fast/eval/run.py")


def test_a_long_file_and_a_long_function_are_found(tmp_path):
    body = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
    root = write(tmp_path, {"ssr_fast/data/a.py": body, "tests/b.py": "x = 1\n" * FILE_LINES})
    assert large_parts(root) == ["ssr_fast/data/a.py:1: f has 80 lines", "tests/b.py: 400 lines"]
    write(root, {"ssr_fast/data/a.py": body.removesuffix("    x = 1\n"), "tests/b.py": "x = 1\n" * (FILE_LINES - 1)})
    assert large_parts(root) == []
