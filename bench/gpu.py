"""The checks of a GPU machine: `make gpu [PYTHON=python3] [ARGS="build tests sanitizer bench"] [MINUTES=9.5]`.

Nothing is installed and nothing comes from the network: each step runs with this interpreter's packages, or is skipped
by name with what is missing. Each has a part of MINUTES; one whose time is out is cut off with all its processes, and
what it has written so far stays in bench/results/<device>/. A table of the steps and one of the figures come last,
after Ctrl-C too. Exit code 1 if a step failed or was cut off before its results were whole, 2 for a mistake on the
command line, 130 after a signal; a skipped step is no failure.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import headlines, limits
from bench.needs import ROOT, SOURCES, installed, missing_packages, no_gpu
from bench.sanitizer import find_tool

LIBRARY_NOTES = ROOT / "kernels" / "ssr_kernels" / "lib"
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"\bmark\.gpu\b")
MINUTES = 9.5
RESERVE_S = 10.0
"""Of the budget, for the tables and for ending the last step."""
LEAST_S = 10.0
"""A step is not begun with less."""
WORKERS = 8
"""Of pytest: Triton compiles on the host, and each worker has a context of its own on the device."""


@dataclass(frozen=True)
class Step:
    """One command and what it needs."""

    name: str
    """As ARGS chooses it; several commands may share a name."""
    title: str
    seconds: float
    """Its part of the budget; all parts together are the default budget."""
    command: Callable[[float], list[str]]
    """Seconds that it has -> program and arguments."""
    reasons: Callable[[], list[str]]
    """Why it cannot run here."""
    variables: dict[str, str] = field(default_factory=dict)
    problems: Callable[[], list[str]] = list
    """What the command left undone although its exit code is 0."""
    notes: Callable[[], list[str]] = list
    """What is missing although the step ran."""
    files: tuple[str, ...] = ()
    """What it writes in bench/results/<device>/."""


@dataclass(frozen=True)
class Result:
    """What became of a step."""

    title: str
    status: str
    """passed, failed, cut or skipped."""
    detail: str
    seconds: float
    failed: bool = False


def main(arguments: Sequence[str] | None = None, steps: "Sequence[Step] | None" = None) -> int:
    """The command line; returns the exit code."""
    steps = STEPS if steps is None else steps
    names = list(dict.fromkeys(step.name for step in steps))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"for everything; {MINUTES:g}")
    options = parser.parse_args(arguments)
    chosen = options.steps or names
    if unknown := [name for name in chosen if name not in names]:
        print(f"make gpu: there is no step {unknown[0]!r}; the steps are {', '.join(names)}", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"make gpu: MINUTES must be above 0 (it is {options.minutes:g})", file=sys.stderr)
        return 2
    begun, results = time.time(), list[Result]()
    budget = limits.Budget(60 * options.minutes - RESERVE_S)
    stopped = ""
    try:
        with limits.stoppable():
            run_all([step for step in steps if step.name in chosen], budget, begun, results)
    except limits.Stopped as signal:
        stopped = str(signal)
        print(f"\nstopped by {stopped}: what follows was not run", flush=True)
    finally:  # whatever happened, what is known is told
        close(results, begun)
    return 130 if stopped else 1 if any(result.failed for result in results) else 0


def run_all(steps: Sequence[Step], budget: limits.Budget, begun: float, results: list[Result]) -> None:
    """Run the steps one after another and enter what became of them.

    Raises:
        limits.Stopped: a signal came; the step that it met has been entered too.
    """
    against = [step.reasons() for step in steps]
    for index, step in enumerate(steps):
        if against[index]:
            results.append(Result(step.title, "skipped", "; ".join(against[index]), 0.0))
            continue
        later = [steps[k].seconds for k in range(index + 1, len(steps)) if not against[k]]
        seconds = budget.share(step.seconds, later)
        if seconds < LEAST_S:
            results.append(Result(step.title, "skipped", f"no time left ({seconds:.0f} s)", 0.0))
            continue
        run(step, seconds, begun, results)


def run(step: Step, seconds: float, begun: float, results: list[Result]) -> None:
    """Run a step's command in the repository's root for at most `seconds` and enter what became of it."""
    command = step.command(seconds)
    print(f"\n== {step.title} (at most {seconds:.0f} s): {shlex.join(command)}", flush=True)
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **step.variables}
    started = time.perf_counter()
    try:
        ended = limits.run_within(command, seconds, ROOT, variables)
    except limits.Stopped as signal:
        taken = time.perf_counter() - started
        results.append(Result(step.title, "cut", f"{signal}; {_written(step, begun)[1]}", taken, True))
        raise
    except OSError as error:
        results.append(Result(step.title, "failed", f"{command[0]} cannot be started: {error}", 0.0, True))
        return
    if ended.code is None:
        whole, written = _written(step, begun)
        detail = f"its {seconds:.0f} s were over; {written}"
        results.append(Result(step.title, "cut", detail, ended.seconds, not whole))
        return
    problems = ([f"exit code {ended.code}"] if ended.code else []) + step.problems()
    detail = "; ".join(problems + step.notes())
    results.append(Result(step.title, "failed" if problems else "passed", detail, ended.seconds, bool(problems)))


def _written(step: Step, begun: float) -> tuple[bool, str]:
    """Whether all results of a step are whole, and what is there of them."""
    documents = headlines.read(RESULTS, begun)
    said = []
    for name in step.files:
        found = documents.get(name.removesuffix(".json"))
        state = "was not written" if found is None else "is whole" if found.get("complete") else "is a part"
        said.append(f"{name} {state}")
    return bool(said) and all(one.endswith("is whole") for one in said), ", ".join(said) or "it writes no results"


def close(results: Sequence[Result], begun: float) -> None:
    """Print the table of the steps and that of the figures, and write both beside the results."""
    width = max([len(result.title) for result in results] + [4])
    lines = [f"{'step':{width}}  {'result':7}  {'seconds':>7}"]
    for result in results:
        line = f"{result.title:{width}}  {result.status:7}  {result.seconds:7.0f}  {result.detail}"
        lines.append(line.rstrip())
    try:
        documents = headlines.read(RESULTS, begun)
        lines += ["", *headlines.lines(documents)]
    except Exception as error:  # the steps' table is worth more than a headline
        documents = {}
        lines.append(f"the figures cannot be shown: {type(error).__name__}: {error}")
    print("\n" + "\n".join(lines), flush=True)
    for folder in {path.parent for path in headlines.fresh(RESULTS, begun)}:
        (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gpu_tests() -> list[Path]:
    """The test files with a test for the GPU, those of the kernels first. pytest -m gpu then chooses in them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.parent.name != "kernels", path))
    return [path for path in files if MARKED.search(path.read_text(encoding="utf-8"))]


def runnable_tests() -> list[Path]:
    return [path for path in gpu_tests() if not missing_packages([path])]


def _against_tests() -> list[str]:
    against = no_gpu() + missing_packages([ROOT / "tests" / "conftest.py", ROOT / "bench" / "record_tests.py"])
    against += [] if installed("pytest") else ["pytest is not installed"]
    return list(dict.fromkeys(against)) or ([] if runnable_tests() else _left_out_tests() or ["no test is marked gpu"])


def _left_out_tests() -> list[str]:
    missing = {path: missing_packages([path]) for path in gpu_tests()}
    return [f"{path.name} left out: {', '.join(packages)}" for path, packages in missing.items() if packages]


def _pytest(seconds: float) -> list[str]:
    files = [str(path.relative_to(ROOT)) for path in runnable_tests()]
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) // 2))
    # "load" hands the tests out in their order, so that a run that is cut off has seen the kernels
    parallel = ["-n", str(workers), "--dist", "load"] if installed("xdist") and workers > 1 else []
    parallel += ["--timeout=90"] if installed("pytest_timeout") else []  # one that hangs must not take all the time
    short = ["-q", "--tb=short", "-rfE", "--durations=10", "-p", "bench.record_tests", *parallel]
    return [sys.executable, "-m", "pytest", "-m", "gpu", *short, *files]


def _against_sanitizer() -> list[str]:
    missing = "compute-sanitizer (of the CUDA toolkit) is neither on PATH nor in /usr/local/cuda/bin"
    files = [ROOT / "bench" / "sanitize.py", ROOT / "bench" / "sanitizer.py"]
    return no_gpu() + ([] if find_tool() else [missing]) + missing_packages(files)


def _library_notes() -> dict[str, str]:
    """First line of the note that setup.py leaves for each library that it did not build."""
    notes = sorted(LIBRARY_NOTES.glob("lib*.txt"))
    return {path.with_suffix(".so").name: path.read_text(encoding="utf-8").splitlines()[0] for path in notes}


def _failed_libraries() -> list[str]:
    return [f"{name}: {why}" for name, why in _library_notes().items() if "failed with exit code" in why]


def _missing_libraries() -> list[str]:
    return [f"{name} skipped: {why}" for name, why in _library_notes().items() if "failed with exit code" not in why]


def _against_build() -> list[str]:
    return [] if installed("setuptools") else ["setuptools is not installed"]


def _build(seconds: float) -> list[str]:
    return [sys.executable, "setup.py", "-q", "build_csrc", "--inplace"]


def _needs(file: str) -> Callable[[], list[str]]:
    return lambda: no_gpu() + missing_packages([ROOT / "bench" / file])


def _sanitizer(tool: str, share: float) -> Step:
    return Step(
        "sanitizer", f"sanitizer, {tool}", share, lambda seconds: [sys.executable, "-m", "bench.sanitizer", tool],
        _against_sanitizer, files=(f"sanitize-{tool}.json",),
    )  # fmt: skip


def _bench(
    title: str, share: float, words: Sequence[str], file: str = "__main__.py", minutes: bool = True, result: str = ""
) -> Step:
    """A benchmark.

    Args:
        title, share: of the step.
        words: of the command line.
        file: what it imports.
        minutes: it is told its time, so that it ends by itself behind a whole case or row.
        result: name of its document; "": that of the benchmark.
    """

    def command(seconds: float) -> list[str]:
        # what it takes to start and to end is not the cases'
        more = ["--minutes", f"{max(0.85 * seconds - 10, 1) / 60:.2f}"] if minutes else []
        return [sys.executable, "-m", "bench", *words, "--json", *more]

    return Step("bench", title, share, command, _needs(file), files=(f"{result or words[0]}.json",))


def _kernels(name: str, share: float) -> Step:
    """One op in a process of its own: what one kernel breaks is not the next one's failure."""
    return _bench(f"kernels, {name}", share, [f"kernels.{name}"])


STEP_ROWS = [
    *("released loop", "released loop, autocast", "transformers' Segformer, plain loop", "one pass, one backward"),
    *("bf16", "bf16, CUDA graph", "bf16, compiled blocks, CUDA graph"),
]
"""Of `bench step`; all its rows take several minutes."""
STEP_WORDS = ["step", "--quick", "--rows", *STEP_ROWS, "--size", "2@512"]

STEPS = (
    Step("build", "build of csrc", 50, _build, _against_build, problems=_failed_libraries, notes=_missing_libraries),
    Step("tests", "device tests", 100, _pytest, _against_tests, notes=_left_out_tests, files=("tests.json",)),
    _sanitizer("memcheck", 50),
    _sanitizer("racecheck", 35),
    _kernels("align", 45),
    _kernels("contrast", 30),
    _kernels("contrast_sample", 15),
    _kernels("dwconv", 35),
    _kernels("dwconv_dilated", 20),
    _kernels("segloss", 25),
    _bench("training step", 90, STEP_WORDS, "step.py", result="step-2-512"),
    _bench("SAM's encoders", 40, ["sam"]),
    _bench("input", 35, ["loader", "--quick", "--rounds", "1", "--images", "4", "--workers", "8"], "loader.py", False),
)

if __name__ == "__main__":
    sys.exit(main())
