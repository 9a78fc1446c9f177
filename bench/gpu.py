"""The checks of a GPU machine: `make gpu [PYTHON=python3] [ARGS="build tests sanitizer bench"]`.

Nothing is installed and nothing comes from the network: each step runs with this interpreter's packages, or is skipped
by name with what is missing. Exit code 1 if a step failed, 2 for an unknown step; a skipped step is no failure.
"""

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "kernels")
LIBRARY_NOTES = ROOT / "kernels" / "ssr_kernels" / "lib"
MARKER = "gpu"
SANITIZER_FAILED = 99
"""compute-sanitizer's exit code for an error of its own finding; 1 is a wrong result of bench.sanitize."""


@dataclass(frozen=True)
class Step:
    """One command and what it needs."""

    name: str
    """As ARGS chooses it; several commands may share a name."""
    title: str
    command: Callable[[], list[str]]
    reasons: Callable[[], list[str]]
    """Why it cannot run here."""
    variables: dict[str, str] = field(default_factory=dict)
    problems: Callable[[], list[str]] = list
    """What the command left undone although its exit code is 0."""
    notes: Callable[[], list[str]] = list
    """What is missing although the step ran."""


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    title: str
    status: str
    """passed, failed or skipped."""
    detail: str
    seconds: float


def main(arguments: Sequence[str] | None = None, steps: "Sequence[Step] | None" = None) -> int:
    """The command line; returns the exit code."""
    steps = STEPS if steps is None else steps
    names = list(dict.fromkeys(step.name for step in steps))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; default: all")
    chosen = parser.parse_args(arguments).steps or names
    if unknown := [name for name in chosen if name not in names]:
        print(f"make gpu: there is no step {unknown[0]!r}; the steps are {', '.join(names)}", file=sys.stderr)
        return 2
    results = [run(step) for step in steps if step.name in chosen]
    width = max(len(result.title) for result in results)
    print(f"\n{'step':{width}}  {'result':7}  {'seconds':>7}")
    for result in results:
        print(f"{result.title:{width}}  {result.status:7}  {result.seconds:7.0f}  {result.detail}".rstrip())
    return 1 if any(result.status == "failed" for result in results) else 0


def run(step: Step) -> Result:
    """Run a step's command in the repository's root, unless there are reasons against it."""
    if reasons := step.reasons():
        return Result(step.title, "skipped", "; ".join(reasons), 0.0)
    command = step.command()
    print(f"\n== {step.title}: {' '.join(command)}", flush=True)
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **step.variables}).returncode
    elapsed = time.perf_counter() - started
    problems = ([f"exit code {code}"] if code else []) + step.problems()
    return Result(step.title, "failed" if problems else "passed", "; ".join(problems + step.notes()), elapsed)


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
            elif (top := name.split(".")[0]) not in sys.stdlib_module_names and not _installed(top):
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


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def gpu_tests() -> list[Path]:
    """The test files that may hold a test for the GPU: they name the marker. pytest -m gpu then chooses in them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if MARKER in path.read_text(encoding="utf-8")]


def runnable_tests() -> list[Path]:
    return [path for path in gpu_tests() if not missing_packages([path])]


def _against_tests() -> list[str]:
    against = no_gpu() + missing_packages([ROOT / "tests" / "conftest.py"])
    against += [] if _installed("pytest") else ["pytest is not installed"]
    return against or ([] if runnable_tests() else _left_out_tests() or ["no test is marked gpu"])


def _left_out_tests() -> list[str]:
    missing = {path: missing_packages([path]) for path in gpu_tests()}
    return [f"{path.name} left out: {', '.join(packages)}" for path, packages in missing.items() if packages]


def _pytest() -> list[str]:
    files = [str(path.relative_to(ROOT)) for path in runnable_tests()]
    return [sys.executable, "-m", "pytest", "-m", "gpu", *files]


def sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, or where the CUDA toolkit puts it."""
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [home / "bin" for home in (*homes, Path("/usr/local/cuda"))]
    return next((place / "compute-sanitizer" for place in places if (place / "compute-sanitizer").is_file()), None)


def _against_sanitizer() -> list[str]:
    against = (
        [] if sanitizer() else ["compute-sanitizer (of the CUDA toolkit) is neither on PATH nor in /usr/local/cuda/bin"]
    )
    return no_gpu() + against + missing_packages([ROOT / "bench" / "sanitize.py"])


def _sanitize(tool: str) -> Callable[[], list[str]]:
    def command() -> list[str]:
        options = ["--tool", tool, f"--error-exitcode={SANITIZER_FAILED}", "--target-processes=all"]
        return [str(sanitizer()), *options, sys.executable, "-m", "bench.sanitize"]

    return command


def _library_notes() -> dict[str, str]:
    """First line of the note that setup.py leaves for each library that it did not build."""
    notes = sorted(LIBRARY_NOTES.glob("lib*.txt"))
    return {path.with_suffix(".so").name: path.read_text(encoding="utf-8").splitlines()[0] for path in notes}


def _failed_libraries() -> list[str]:
    return [f"{name}: {why}" for name, why in _library_notes().items() if "failed with exit code" in why]


def _missing_libraries() -> list[str]:
    return [f"{name} skipped: {why}" for name, why in _library_notes().items() if "failed with exit code" not in why]


def _against_build() -> list[str]:
    return [] if _installed("setuptools") else ["setuptools is not installed"]


def _against_bench() -> list[str]:
    return no_gpu() + missing_packages([ROOT / "bench" / "__main__.py"])


def _against_loader() -> list[str]:
    return no_gpu() + missing_packages([ROOT / "bench" / "loader.py"])


def _against_step() -> list[str]:
    return no_gpu() + missing_packages([ROOT / "bench" / "step.py"])


# without torch's pool every tensor is an allocation of its own, so that memcheck sees where each ends
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

STEPS = (
    Step(
        "build",
        "build of csrc",
        lambda: [sys.executable, "setup.py", "-q", "build_csrc", "--inplace"],
        _against_build,
        problems=_failed_libraries,
        notes=_missing_libraries,
    ),
    Step("tests", "device tests", _pytest, _against_tests, notes=_left_out_tests),
    Step("sanitizer", "sanitizer, memcheck", _sanitize("memcheck"), _against_sanitizer, UNPOOLED),
    Step("sanitizer", "sanitizer, racecheck", _sanitize("racecheck"), _against_sanitizer),
    Step("bench", "benchmarks", lambda: [sys.executable, "-m", "bench", "--json"], _against_bench),
    Step("bench", "training step", lambda: [sys.executable, "-m", "bench", "step", "--json"], _against_step),
    Step("bench", "SAM's encoders", lambda: [sys.executable, "-m", "bench", "sam", "--json"], _against_bench),
    Step("bench", "input", lambda: [sys.executable, "-m", "bench", "loader", "--quick", "--json"], _against_loader),
)

if __name__ == "__main__":
    sys.exit(main())
