"""A training step, the released DAFormer-shaped loop's and ours, lever by lever: `python -m bench step`.

Timed on a GPU with MiT-B5 and the DAFormer head, on a CPU with the demo's network; with --sam SSR's step, SAM online.
Each row's losses are compared with the released loop's in the same run. What --json names is written anew after each
row, "complete" false until the end. Exit code 1: a row raised or is wrong; 2: a mistake on the command line.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import document, tables
from bench.harness import Setting
from bench.peaks import find_peak
from bench.step_picture import draw
from bench.stepping import METHOD, Comparison, Row
from bench.variants import VARIANTS, variants_of
from bench.workload import Workload, demo_workload, full_workload
from ssr_fast.models.sam import SHAPES

SIZES: dict[str, Callable[..., Workload]] = {
    "demo": demo_workload,
    "2@512": partial(full_workload, 2, 512),
    "8@512": partial(full_workload, 8, 512),
    "2@1024": partial(full_workload, 2, 1024),
}
"""(sam="", one of SHAPES) -> images a domain and crop of MiT-B5, and the demo's network on whole scenes."""
DEFAULT = {"cpu": ("demo",), "cuda": ("2@512", "8@512")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = parse(arguments)
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    setting = Setting(torch.device(options.device), options.quick)
    if setting.device.type == "cpu":
        torch.set_num_threads(1)  # a thread that waits for a busy core would decide what is measured
    screen = tables.console()
    content = document.document([], setting, None)
    peak = find_peak(content["device"]["name"]) if setting.device.type == "cuda" else None
    content |= {"complete": False, "method": METHOD, "peaks": peak and dataclasses.asdict(peak), "flops": {}}
    path = None
    if options.json is not None:
        path = document_path(options.json, "step", options.size or (), options.sam, content)
    rows: list[Row] = []
    for size in options.size or DEFAULT[setting.device.type]:
        comparison = Comparison(SIZES[size](sam=options.sam), options.rows, setting, peak, deadline)

        def report(row: Row) -> None:
            screen.print(f"{row.size}: {_line(row)}", soft_wrap=True)
            rows.append(row)
            _save(path, content, rows)

        done = comparison.run(report)
        if comparison.flops is not None:
            content["flops"][comparison.workload.name] = comparison.flops
        show(done, content, screen)
    content["complete"] = True
    _save(path, content, rows)
    if path is not None:
        print(f"wrote {path}")
    if options.picture is not None:
        draw(options.picture, content)
        print(f"wrote {options.picture}")
    failed = [row for row in rows if row.failed]
    for row in failed:
        print(f"{row.size}: {row.name}: {row.status}: {row.error or '; '.join(row.reasons)}", file=sys.stderr)
    return 1 if failed else 0


def document_path(target: str, bench: str, sizes: Sequence[str], sam: str, content: dict[str, Any]) -> Path:
    """Where the document goes: `target`, or, where that is empty, a place for what was asked for."""
    words = [bench, *(size.replace("@", "-") for size in sizes), *([sam] if sam else [])]
    return Path(target) if target else document.default_path("-".join(words), content["device"])


def _save(path: Path | None, content: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put the rows into the document and, if there is a path, write it."""
    content["rows"] = document.finite([dataclasses.asdict(row) for row in rows])
    if path is not None:
        document.write(path, content)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench step", description=summary, epilog=details)
    parser.add_argument("--size", action="append", metavar="B@CROP", help=f"of {', '.join(SIZES)}; may be repeated")
    parser.add_argument("--sam", default="", metavar="NAME", help=f"SSR with that encoder: {', '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: all of {'; '.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, metavar="M", help="rows that would begin later are skipped")
    target = "bench/results/<device>/step[-SIZE][-NAME].json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the waterfall, a PNG")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default here: {here}")
    return parser.parse_args(arguments)


def _problem(options: argparse.Namespace) -> str:
    """What is wrong with the options, one sentence; empty if nothing is."""
    found = choice_problem(options.size or [], options.sam, options.rows or [])
    if not found and options.json and not options.json.endswith(".json"):
        found = f"--json takes a file that ends in .json (it got {options.json!r})"
    if not found and options.minutes is not None and not options.minutes > 0:
        found = f"--minutes takes a number above 0 (it got {options.minutes})"
    if not found and options.device == "cuda" and not torch.cuda.is_available():
        found = "--device=cuda needs a GPU that torch can use (torch.cuda.is_available() is False)"
    return f"python -m bench step: {found}" if found else ""


def choice_problem(sizes: Sequence[str], sam: str, rows: Sequence[str]) -> str:
    """Which size, encoder or row there is not; empty if there are all."""
    known_rows = variants_of(sam if sam in SHAPES else "")
    encoders = [sam] if sam else []
    for kind, given, known in (("size", sizes, SIZES), ("encoder", encoders, SHAPES), ("row", rows, known_rows)):
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1, 0.4)
                hint = f"did you mean {close[0]!r}?" if close else f"there is {'; '.join(known)}"
                return f"there is no {kind} {name!r}; {hint}"
    return ""


_COLUMNS = ("precision", "ms", "p20..p80", "steps", "images/s", "speed", "peak MB", "MFU", "loss off by", "result")


def show(rows: Sequence[Row], content: dict[str, Any], screen: Console) -> None:
    """Print the table of one size, then why rows and columns are missing."""
    device, flops = content["device"]["name"], content["flops"].get(rows[0].size)
    counted = f"; {flops / 1e12:.4g} TFLOP" if flops else ""
    table = Table(title=f"a step, {rows[0].size}, {device}{counted}", title_justify="left")
    table.add_column("row", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.status != "skipped":
            table.add_row(row.name, row.precision, *_cells(row))
    screen.print(table)
    for row in rows:
        skipped = " skipped" if row.status == "skipped" else ""
        for line in ([row.error] if row.error else []) + row.reasons + row.notes:
            screen.print(f"  {row.name}{skipped}: {line}", soft_wrap=True)
    if content["peaks"] is None:
        screen.print(f"  MFU: no peak of {device} in bench/peaks.py", soft_wrap=True)
    screen.print(f"  times: {METHOD[content['device']['kind'].replace('cuda', 'gpu')]}", soft_wrap=True)


def _line(row: Row) -> str:
    """What is known of a row as soon as it is done."""
    found = [row.status if not row.failed else row.status.upper()]
    found += [f"{row.step_us.median / 1e3:.1f} ms"] if row.step_us else []
    found += [f"{row.peak_bytes / 1e6:.0f} MB"] if row.peak_bytes else []
    found += [f"loss off by {row.loss_error:.1e}"] if row.loss_error is not None else []
    return f"{row.name}: {', '.join(found)} ({row.seconds or 0.0:.0f} s)"


def _cells(row: Row) -> list[str]:
    timing = row.step_us
    return [
        "-" if timing is None else f"{timing.median / 1e3:.1f}",
        "-" if timing is None else f"{timing.p20 / 1e3:.1f}..{timing.p80 / 1e3:.1f}",
        str(row.samples),
        "-" if row.images_per_second is None else f"{row.images_per_second:.1f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        "-" if row.mfu is None else f"{row.mfu:.1f}%",
        "-" if row.loss_error is None else f"{row.loss_error:.1e}",
        row.status if not row.failed else row.status.upper(),
    ]
