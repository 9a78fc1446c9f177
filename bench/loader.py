"""Input pipelines side by side: `python -m bench loader [--json [FILE]] [--quick] [--list]`.

GTA5 to Cityscapes as the preset reads it, on pictures that are drawn for it. Each row runs in a process of its own, the
rows in turn in every round. The JSON is written anew after each row of a round, "complete": false until the last one.
Exit code 0: all that can run here delivered what it should; 1: a row did not; 2: a mistake on the command line.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import document, tables
from bench.harness import Setting
from bench.loader_run import Measured
from bench.photos import Written, write_sets
from bench.pipelines import (
    BY_NAME,
    FOLDERS,
    JPEG,
    PREFETCH,
    PROVIDERS,
    RAW,
    Job,
    Workload,
    data_config,
    full_workload,
    indices,
)
from bench.process_tree import PeakMemory
from ssr_fast import prepare

METHOD = {
    "samples_per_second": "a sample is one source view with its label and one target view, normalised float32; wall "
    "time of at least --seconds behind a warm-up of every batch that was begun at the start",
    "cpu_seconds": "user and system time of the process and all below it in the measured part, /proc/<pid>/stat",
    "first_seconds": "from asking for batches, in a process that has torch imported and the data checked, to the first",
    "peak_bytes": "largest sum of PSS over the process and all below it, /proc/<pid>/smaps_rollup every 0.2 s from its "
    "start to its end; own_bytes: without pages of mapped files, which are page cache",
    "ratio": "to the first row's samples a second in the same round; median, and least and greatest, over the rounds",
    "spread": "median, and least and greatest, over rounds in which the rows run in turn, every second round backwards",
    "data": "drawn pictures; every file is read once before each round: it comes from the page cache, no disk is in it",
}
"""How each column comes about, for the JSON."""
SEED = 0
LIMIT = 900.0
"""Seconds after which a row's process is ended."""

WORKLOAD: Callable[[], Workload] = full_workload
MAKERS: dict[str, Callable[[Path, Workload], tuple[Path, Path]]] = {
    FOLDERS: lambda folder, workload: (folder / workload.source.set, folder / workload.target.set),
    RAW: lambda folder, workload: _stores(folder, workload, "raw"),
    JPEG: lambda folder, workload: _stores(folder, workload, "jpeg"),
}
"""Form of the data -> what makes it from the drawn folders, and returns source and target."""


def _stores(folder: Path, workload: Workload, image: str) -> tuple[Path, Path]:
    """Prepared stores of both sets."""
    made = []
    for photograph, box, more in (
        (workload.source, workload.source_box, []),
        (workload.target, workload.target_box, ["--unlabelled"]),
    ):
        out = folder / f"{photograph.set}-{image}"
        words = ["store", str(folder / photograph.set), "--out", str(out), "--image", image, *more]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = prepare.main([*words, "--resize", *map(str, box)])
        if code:
            raise RuntimeError(f"prepare store ended with {code}: {said.getvalue()}")
        made.append(out)
    return made[0], made[1]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest over the rounds."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass
class Row:
    """One provider: the JSON's `rows`."""

    name: str
    about: str
    status: str = "ok"
    """ok, skipped or error."""
    reasons: list[str] = field(default_factory=list)
    """Why it cannot run here."""
    error: str = ""
    rounds: list[Measured] = field(default_factory=list)
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Of each figure in `rounds`, and of `ratio`; empty if a round failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = parse(arguments)
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    if options.list:
        for provider in PROVIDERS:
            print(f"{provider.name:28} {provider.about}")
        return 0
    setting = Setting(torch.device(options.device), options.quick)
    screen = tables.console()
    rows = [Row(name, BY_NAME[name].about) for name in options.rows or BY_NAME]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        os.environ["SSR_FAST_CACHE"] = folder  # what is remembered of this data is of no use afterwards
        workload = WORKLOAD()
        content = document.document([], setting, None)
        content |= {"method": METHOD, "workload": dataclasses.asdict(workload)}
        path = Path(options.json) if options.json else document.default_path("loader", content["device"])

        def save(facts: dict[str, Any], complete: bool) -> None:
            if options.json is not None:
                found = document.finite([dataclasses.asdict(row) for row in rows])
                document.write(path, {**content, "complete": complete, "setting": facts, "rows": found})

        facts = run(rows, workload, options, Path(folder), screen, save)
    show(rows, workload, facts, screen)
    if options.json is not None:
        print(f"wrote {path}")
    failed = [row for row in rows if row.status == "error"]
    for row in failed:
        print(f"{row.name}: {row.error}", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given; what --quick shortens is filled in."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench loader", description=summary, epilog=details)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: all of {'; '.join(BY_NAME)}")
    parser.add_argument("--list", action="store_true", help="say what the rows are")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"default: the cores, here {cores}")
    parser.add_argument("--images", type=int, metavar="N", help="pictures drawn of each set; default: 32, quick 8")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5, quick 2")
    parser.add_argument("--seconds", type=float, metavar="S", help="measured in each round; default: 6, quick 2")
    target = "bench/results/<device>/loader.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default here: {here}")
    options = parser.parse_args(arguments)
    for name, usual, quick in (("images", 32, 8), ("rounds", 5, 2), ("seconds", 6.0, 2.0)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    return options


def _problem(options: argparse.Namespace) -> str:
    """What is wrong with the options, one sentence; empty if nothing is."""
    for name in options.rows or ():
        if name not in BY_NAME:
            close = difflib.get_close_matches(name, BY_NAME, 1, 0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"there is {'; '.join(BY_NAME)}"
            return f"python -m bench loader: there is no row {name!r}; {hint}"
    for name, least in (("workers", 1), ("images", 1), ("rounds", 1), ("seconds", 0)):
        if not getattr(options, name) >= least:
            return f"python -m bench loader: --{name} must be at least {least} (it is {getattr(options, name)})"
    if options.json and not options.json.endswith(".json"):
        return f"python -m bench loader: --json takes a file that ends in .json (it got {options.json!r})"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "python -m bench loader: --device=cuda needs a GPU that torch can use (there is none)"
    return ""


def run(
    rows: Sequence[Row],
    workload: Workload,
    options: argparse.Namespace,
    folder: Path,
    screen: Console,
    save: Callable[[dict[str, Any], bool], None] = lambda facts, complete: None,
) -> dict[str, Any]:
    """Draw the data, then fill the rows in, round by round; what the figures depend on.

    `save` is called with that and whether all is done after each row of a round; spreads are over whole rounds.
    """
    for row in rows:
        row.reasons = BY_NAME[row.name].reasons(torch.device(options.device))
        row.status = "skipped" if row.reasons else "ok"
    forms = list(dict.fromkeys(BY_NAME[row.name].form for row in rows if row.status == "ok"))
    screen.print(f"drawing {options.images} pictures of each set into {folder}", soft_wrap=True)
    written = write_sets(folder, (workload.source, workload.target), options.images, SEED)
    roots = {}
    for form in forms:
        source, target = MAKERS[form](folder, workload)
        roots[form] = str(source), str(target)
    facts = _facts(options, written)
    job = Job(
        "", workload, roots, str(folder / "index"), options.workers, PREFETCH * options.workers, options.seconds,
        least=4, device=options.device, seed=SEED,
    )  # fmt: skip
    for form in forms:
        indices(data_config(job, form), job.cache)
    for number in range(options.rounds):
        _warm(folder)
        for row in rows[:: -1 if number % 2 else 1]:
            if row.status == "ok":
                _run_round(row, dataclasses.replace(job, provider=row.name), folder)
                save(facts, False)
        _summarise(rows)
        save(facts, number + 1 == options.rounds)
        screen.print(f"round {number + 1} of {options.rounds} done", soft_wrap=True)
    return facts


def _facts(options: argparse.Namespace, written: dict[str, Written]) -> dict[str, Any]:
    names = ("workers", "images", "rounds", "seconds")
    files = {name: sizes._asdict() for name, sizes in written.items()}
    return {name: getattr(options, name) for name in names} | {"files": files}


def _warm(folder: Path) -> None:
    """Read every file once: the page cache has them then, if it is large enough."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def _run_round(row: Row, job: Job, folder: Path) -> None:
    """One run of a row in a fresh process; an error goes into the row, which is then left out of later rounds."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.loader_run", str(result)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=complaints, stderr=complaints, text=True)
        with PeakMemory(child.pid) as memory:
            try:
                child.communicate(json.dumps(dataclasses.asdict(job)), timeout=LIMIT)
            except subprocess.TimeoutExpired:
                row.error = f"did not end within {LIMIT:.0f} s"
            finally:
                child.kill()  # of one that has ended: nothing
                child.wait()
        complaints.seek(0)
        last = [line.strip() for line in complaints if line.strip()][-1:]
    measured = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if not row.error and "samples_per_second" not in measured:
        row.error = measured.get("error") or f"its process ended with {child.returncode}: {' '.join(last)}"
    if row.error:
        row.status = "error"
        return
    row.rounds.append(Measured(**{**measured, "peak_bytes": memory.peak, "own_bytes": memory.own}))


def _summarise(rows: Sequence[Row]) -> None:
    """Medians and spreads of the rows that went through every round; ratios where the first provider did too."""
    base = next((row for row in rows if row.name == PROVIDERS[0].name and row.status == "ok"), None)
    for row in rows:
        row.spreads = {}
        if row.status != "ok":
            continue
        for figure in dataclasses.fields(Measured):
            row.spreads[figure.name] = Spread.of([getattr(one, figure.name) for one in row.rounds])
        if base is not None:
            pairs = zip(row.rounds, base.rounds, strict=True)
            row.spreads["ratio"] = Spread.of(
                [one.samples_per_second / other.samples_per_second for one, other in pairs]
            )


_SPREAD = "least..greatest"
_COLUMNS = (
    *("samples/s", _SPREAD, "vs row 1", _SPREAD, "CPU ms a sample", _SPREAD, "peak MB", "without files"),
    *("first batch s", _SPREAD, "result"),
)


def show(rows: Sequence[Row], workload: Workload, facts: dict[str, Any], screen: Console) -> None:
    """Print the table, then why rows are missing, what each delivers, and how it was measured."""
    size = f"{workload.batch}+{workload.batch}@{workload.crop[0]}x{workload.crop[1]}"
    table = Table(title=f"loader, GTA5 to Cityscapes, {size}, {facts['workers']} workers", title_justify="left")
    table.add_column("row", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.status != "skipped":
            table.add_row(row.name, *_cells(row))
    screen.print(table)
    for row in rows:
        skipped = " skipped" if row.status == "skipped" else ""
        for line in ([row.error] if row.error else []) + row.reasons + ([] if skipped else [row.about]):
            screen.print(f"  {row.name}{skipped}: {line}", soft_wrap=True)
    for name, sizes in facts["files"].items():
        label = f", a label {sizes['label_bytes'] / 1e3:.0f} kB" if sizes["label_bytes"] else ""
        line = f"{sizes['images']} images of {sizes['image_bytes'] / 1e6:.2f} MB{label} on average"
        screen.print(f"  {name}: {line}", soft_wrap=True)
    for name in ("spread", "ratio", "peak_bytes", "first_seconds", "data"):
        screen.print(f"  {name}: {METHOD[name]}", soft_wrap=True)


def _cells(row: Row) -> list[str]:
    def cell(name: str, factor: float, form: str) -> str:
        return format(factor * row.spreads[name].median, form) if name in row.spreads else "-"

    def spread(name: str, factor: float, form: str) -> str:
        found = row.spreads.get(name)
        return "-" if found is None else f"{factor * found.least:{form}}..{factor * found.greatest:{form}}"

    return [
        cell("samples_per_second", 1.0, ".1f"),
        spread("samples_per_second", 1.0, ".1f"),
        cell("ratio", 1.0, ".2f"),
        spread("ratio", 1.0, ".2f"),
        cell("cpu_seconds", 1e3, ".1f"),
        spread("cpu_seconds", 1e3, ".1f"),
        cell("peak_bytes", 1e-6, ".0f"),
        cell("own_bytes", 1e-6, ".0f"),
        cell("first_seconds", 1.0, ".2f"),
        spread("first_seconds", 1.0, ".2f"),
        row.status if row.status == "ok" else row.status.upper(),
    ]
