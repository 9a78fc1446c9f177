"""What guard and checkpoints cost of a training step, on the CPU's demo: `python -m bench overhead`.

Two measurements, one process and two (gloo): a training whose parts are timed, and pairs of whole trainings, as they
are and with a bare optimiser step (no guard, vote, watch, or save but the last). Exit code 1: one of them failed;
2: a mistake on the command line. A share above the bound is told, and is no failure: a busy machine is enough for it.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import document, tables
from bench.harness import Setting
from bench.overhead_run import EACH_STEP, NOT_COUNTED, WARM_UP, WATCHED, WATCHING, WRITING, Job

BOUND = 2.0
"""Percent of a step that guard and checkpoints may cost together."""
STRESS = {"save_every": 5, "shares": 2, "spikes": True}
SETTINGS: dict[str, dict[str, Any]] = {"demo": {"save_every": 65, "shares": 1, "spikes": False}, "stress": STRESS}
SCENE: tuple[int, int] | None = None
"""See Job.scene."""
GRACE_S = 5.0
"""For the processes that are left, to say what they know."""
METHOD = {
    "parts": (
        "one training; the main thread's time.perf_counter in each method, without other parts inside of it: median "
        "over steps (of saves: over saves without the first, divided by save_every) as a share of the median step; "
        "CPU time of the threads that write and watch counts in full, as though no core were free, as a share of the "
        "main thread's CPU time of a step, because other programs lengthen the wall time alone"
    ),
    "pairs": (
        "whole trainings in one process, alternating: mean seconds of a step with over without, wall and CPU time of "
        "the process; median and extremes over rounds. The last save and the evaluation are outside of it"
    ),
    "norm": "the guard's norm of the gradient serves --optim.clip_norm too, which the demo has: it is counted here",
    "threads": 1,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = parse(arguments)
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    screen, rows = tables.console(), list[dict[str, Any]]()
    for name in options.settings:
        for world in options.world:
            row = measure(name, world, options)
            rows.append(row)
            if "error" not in row:
                show(row, screen)
    if options.json is not None:
        content = document.document([], Setting(torch.device("cpu"), options.quick), None)
        content |= {"method": METHOD, "bound": BOUND, "rows": document.finite(rows)}
        path = Path(options.json) if options.json else document.default_path("overhead", content["device"])
        document.write(path, content)
        print(f"wrote {path}")
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['setting']}, {row['world']} process(es): {row['error']}", file=sys.stderr)
    for row in rows:
        if "error" not in row:
            where = f"{row['setting']}, {row['world']} process(es)"
            print(f"{where}: guard and checkpoints: {row['share']:.1f} % of a step (bound {BOUND:.0f} %)")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given; what --quick shortens is filled in."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=summary, epilog=details)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--world", nargs="+", type=int, default=[1, 2], metavar="N", help="processes; default: 1 2")
    parser.add_argument("--steps", type=int, metavar="N", help="of each training; default: 130, quick 12")
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs of trainings; default: 3, quick 1")
    parser.add_argument("--save-every", type=int, metavar="N", help="default: 65 (demo), 5 (stress), quick 5")
    target = "bench/results/cpu/overhead.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--quick", action="store_true", help="short trainings that save often")
    options = parser.parse_args(arguments)
    for name, usual, quick in (("steps", 130, 12), ("rounds", 3, 1), ("save_every", None, 5)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    return options


def _problem(options: argparse.Namespace) -> str:
    """What is wrong with the options, one sentence; empty if nothing is."""
    least = 2 * (WARM_UP + 1)
    for name, value, bound in (
        ("steps", options.steps, least),
        ("rounds", options.rounds, 0),
        ("save-every", 1 if options.save_every is None else options.save_every, 1),
        ("world", min(options.world), 1),
    ):
        if value < bound:
            return f"python -m bench overhead: --{name} must be at least {bound} (it is {value})"
    for setting in options.settings:
        every = _setting(setting, options)["save_every"]
        if options.rounds and every >= options.steps:
            return (
                f"python -m bench overhead: a training of {options.steps} --steps has no save but the last with "
                f"--save-every {every} ({setting}): give more steps"
            )
    if options.json and not options.json.endswith(".json"):
        return f"python -m bench overhead: --json takes a file that ends in .json (it got {options.json!r})"
    return ""


def _setting(name: str, options: argparse.Namespace) -> dict[str, Any]:
    changed = {} if options.save_every is None else {"save_every": options.save_every}
    return {**SETTINGS[name], **changed}


def measure(name: str, world: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a setting: its job, parts, pairs and total share in percent; or "error"."""
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        fixed = {"steps": options.steps, "rounds": options.rounds, "scene": SCENE, "folder": str(Path(folder, "run"))}
        job = Job(**fixed, **_setting(name, options))
        measured = run(job, world, Path(folder))
    facts = {key: value for key, value in dataclasses.asdict(job).items() if key not in ("folder", "scene")}
    row = {"setting": name, "world": world, **facts}
    return row | (measured if "error" in measured else evaluate(job, measured))


def run(job: Job, world: int, folder: Path) -> dict[str, Any]:
    """Start the processes and wait for them; rank 0's result, or that of the one that failed, or how it ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "SSR_FAST_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    processes, results = [], [folder / f"result-{rank}.json" for rank in range(world)]
    for rank, file in enumerate(results):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = base | {key: str(value) for key, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", "bench.overhead_run", str(file)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(dataclasses.asdict(job)))
        process.stdin.close()
        processes.append(process)
    codes = _end(processes)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results if path.exists()]
    errors = [content["error"] for content in found if "error" in content]
    if errors or any(codes):
        return {"error": "; ".join(errors) or f"the processes ended with {codes}"}
    measured: dict[str, Any] = found[0]
    return measured


def _end(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Wait for all; where one fails, the others have nothing to wait for."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                time.sleep(GRACE_S)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def evaluate(job: Job, measured: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds and percent of a step by part, the ratios of the pairs, and the sum of the parts that count."""
    parts = measured["parts"]
    cpu = 1e3 * parts["step_cpu"]
    step = _quantiles([1e3 * seconds for seconds in parts["steps"]])
    found = {
        name: _quantiles([1e3 * seconds for seconds in parts["each_step"][name]]) for name in (*EACH_STEP, WATCHED)
    }
    found[WATCHING] = [1e3 * parts["watching"]] * 3
    first = 0.0
    for name, seconds in parts["each_save"].items():
        usual = seconds[1:] or seconds
        found[name] = [1e3 * value / job.save_every for value in _quantiles(usual)]
        first += max(0.0, seconds[0] - statistics.median(usual)) if seconds else 0.0
    table = [
        {
            "part": name,
            "ms": milliseconds[0],
            "p20": milliseconds[1],
            "p80": milliseconds[2],
            "percent": 100 * milliseconds[0] / (cpu if name in (WATCHING, WRITING) else step[0]),
            "counted": name not in NOT_COUNTED,
        }
        for name, milliseconds in found.items()
    ]
    pairs = measured["pairs"]
    ratios = {
        clock: [100 * (pair[f"with{suffix}"] / pair[f"without{suffix}"] - 1) for pair in pairs]
        for clock, suffix in (("wall", ""), ("cpu", "_cpu"))
    }
    return {
        "step_ms": {"median": step[0], "p20": step[1], "p80": step[2], "cpu": cpu},
        "parts": table,
        "first_save_extra_s": first,
        "pairs": pairs,
        "pairs_percent": ratios,
        "share": sum(row["percent"] for row in table if row["counted"]),
    }


def _quantiles(values: Sequence[float]) -> list[float]:
    """Median, 20th and 80th percentile."""
    if len(values) < 2:
        return [*values, *values, *values] or [0.0] * 3
    marks = statistics.quantiles(values, n=5, method="inclusive")
    return [statistics.median(values), marks[0], marks[3]]


def show(row: dict[str, Any], screen: Console) -> None:
    """Print the table of a setting."""
    step = row["step_ms"]
    title = f"{row['setting']}, {row['world']} process(es), step {step['median']:.0f} ms "
    title += f"({step['p20']:.0f}..{step['p80']:.0f}; CPU {step['cpu']:.0f}), a save every {row['save_every']} steps, "
    title += f"{row['shares']} micro-batch(es){', spikes judged' if row['spikes'] else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    for heading in ("ms a step", "p20..p80", "% of it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in row["parts"]:
        name = part["part"] if part["counted"] else f"({part['part']}: not counted)"
        table.add_row(name, f"{part['ms']:.3f}", f"{part['p20']:.3f}..{part['p80']:.3f}", f"{part['percent']:.2f}")
    screen.print(table)
    screen.print(f"  the first save of a process takes {row['first_save_extra_s']:.2f} s more: not counted")
    for clock, percent in row["pairs_percent"].items():
        if percent:
            spread = f"({min(percent):+.1f}..{max(percent):+.1f}, {len(percent)} rounds)"
            screen.print(f"  pairs, {clock} time with over without: {statistics.median(percent):+.1f} % {spread}")
    screen.print(f"  parts that count together: {row['share']:.2f} %")
