"""Where a training step's time goes: `python -m bench profile [--size 2@512] [--row NAME] [--sam vit_b] [--json FILE]`.

torch.profiler over steady steps of one row of `bench step`, the last one that runs here unless told: the ten largest
kernels, all by kind, and how long the device is idle; on a CPU the operators. Exit code 1: the row did not do what it
is named after, or the profiler recorded nothing; 2: a mistake on the command line.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from bench import document, kernel_times, tables
from bench.harness import Setting
from bench.kernel_times import Share
from bench.step import DEFAULT, SIZES, choice_problem, document_path
from bench.stepping import WARM_UP, allow_tf32, precision_of
from bench.variants import Variant, as_released, variants_of
from bench.workload import STEPS, Workload
from ssr_fast.models.sam import SHAPES

LARGEST, PROFILED, DISCARDED = 10, 10, 2
"""Kernels that are shown, steps that are profiled, steps before them under the profiler, which sets itself up."""
NO_IDLE = "idle share: on a CPU the step is what the host computes, so nothing waits for a launch"

METHOD = {
    "wall": "steps one after another without the profiler, before it was ever attached, between two waits for the "
    "device; host and device overlap as in training",
    "profiled": f"torch.profiler, device activities alone, {DISCARDED} steps discarded before the recorded ones",
    "busy": "union over all streams of the intervals in which a kernel, copy or fill runs",
    "idle": "1 - busy / (first beginning to last end) in the profile; beside it 1 - busy a step / wall a step, as the "
    "profiler makes what is launched kernel by kernel slower",
    "percent": "of the sum of all kernels' times, which exceeds busy where some run side by side",
    "cpu": "operators by their own time, without what they call; the rest of the wall time is Python",
}


class ProfileError(Exception):
    """One sentence: why there is no profile."""


@dataclass(frozen=True)
class Found:
    """Of one step, milliseconds. On a CPU there is no busy time."""

    wall_ms: float
    profiled_ms: float
    busy_ms: float | None
    shares: list[Share]
    notes: list[str]

    def idle(self) -> tuple[float, float] | None:
        """Percent of the profiled time, and of the time without the profiler."""
        if self.busy_ms is None:
            return None
        return 100 * (1 - self.busy_ms / self.profiled_ms), 100 * (1 - self.busy_ms / self.wall_ms)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = parse(arguments)
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in `bench step`
    variants = variants_of(options.sam)
    name = options.row or [name for name, one in variants.items() if not one.against(device.type == "cuda")][-1]
    if reason := variants[name].against(device.type == "cuda"):
        print(f"python -m bench profile: the row {name!r} does not run here: {reason}", file=sys.stderr)
        return 2
    workload = SIZES[options.size or DEFAULT[options.device][0]](sam=options.sam)
    try:
        found = profile_row(workload, variants[name], device, options.steps)
    except ProfileError as error:
        print(f"python -m bench profile: {workload.name}: {name}: {error}", file=sys.stderr)
        return 1
    content = document.document([], Setting(device), None) | as_entries(found, workload.name, name, options.steps)
    show(found, content)
    if options.json is not None:
        path = document_path(options.json, "profile", [options.size] if options.size else [], options.sam, content)
        document.write(path, content)
        print(f"wrote {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=summary, epilog=details)
    parser.add_argument("--size", metavar="B@CROP", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--row", metavar="ROW", help="of `bench step`; default: the last one that runs here")
    parser.add_argument("--sam", default="", metavar="NAME", help=f"SSR with that encoder: {', '.join(SHAPES)}")
    parser.add_argument("--steps", type=int, default=PROFILED, help=f"to profile (default: {PROFILED})")
    target = "bench/results/<device>/profile[-SIZE][-NAME].json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default here: {here}")
    return parser.parse_args(arguments)


def _problem(options: argparse.Namespace) -> str:
    """What is wrong with the options, one sentence; empty if nothing is."""
    found = choice_problem([options.size] if options.size else [], options.sam, [options.row] if options.row else [])
    if not found and options.steps < 1:
        found = f"--steps must be at least 1 (it is {options.steps})"
    if not found and options.json and not options.json.endswith(".json"):
        found = f"--json takes a file that ends in .json (it got {options.json!r})"
    if not found and options.device == "cuda" and not torch.cuda.is_available():
        found = "--device=cuda needs a GPU that torch can use (torch.cuda.is_available() is False)"
    return f"python -m bench profile: {found}" if found else ""


def profile_row(workload: Workload, variant: Variant, device: torch.device, steps: int) -> Found:
    """Take a row to its steady state, time it, then profile it.

    Raises:
        ProfileError: it did not do what it is named after, or nothing was recorded.
    """
    on_gpu, notes, number = device.type == "cuda", list[str](), count()
    allow_tf32(False)
    run = variant.build(workload.method(device), workload.optim, STEPS, notes.append)
    batches = [batch.to(device) for batch in workload.batches]

    def step() -> None:
        place = next(number)
        run(batches[place % len(batches)], place)

    allow_tf32(precision_of(variant, on_gpu) == "tf32")
    try:
        for _ in range(variant.judged):
            step()
        if variant.said and not any(variant.said in note for note in notes):
            raise ProfileError("; ".join(notes) or f"it did not {variant.said}")
        as_released(run)
        for _ in range(WARM_UP):
            step()
        wall_ms = _wall_ms(step, steps, on_gpu)
        if not on_gpu:
            return _of_cpu(step, steps, wall_ms, notes)
        return found_in(_trace(step, steps), steps, wall_ms, notes)
    finally:
        allow_tf32(False)


def _wall_ms(step: Callable[[], None], steps: int, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps


def _trace(step: Callable[[], None], steps: int, activity: ProfilerActivity = ProfilerActivity.CUDA) -> dict[str, Any]:
    """A trace of some steps on a GPU.

    The profiler comes once in a process and late: after an empty session CUPTI may record nothing more (seen with
    CUDA 13), and after any session the process may stay slower; a graph that was captured before is recorded all the
    same.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(
            activities=[activity],
            schedule=schedule(wait=0, warmup=DISCARDED, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            acc_events=True,
        ) as profiler:
            for number in range(DISCARDED + steps):
                step()
                if number + 1 in (DISCARDED, DISCARDED + steps):
                    torch.cuda.synchronize()  # no kernel of a discarded step in the trace, none of a recorded one lost
                profiler.step()
        trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return trace


def found_in(trace: dict[str, Any], steps: int, wall_ms: float, notes: Sequence[str] = ()) -> Found:
    """What a trace of some steps on a GPU says.

    Raises:
        ProfileError: no kernel is in it.
    """
    events = kernel_times.device_events(trace)
    if not any(event.get("cat") == "kernel" for event in trace["traceEvents"]):
        raise ProfileError("the profiler recorded no kernel (does another profiler hold the GPU?)")
    by_name = kernel_times.totals(events)
    found = list(notes)
    if odd := kernel_times.incomplete(by_name, steps):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        found.append(f"calls of {', '.join(odd[:3])}{more} are no multiple of the steps: steps differ, or events lack")
    shares = kernel_times.shares(by_name, steps, kernel_times.own_kernels())
    busy, wall = kernel_times.busy(events) / 1e3 / steps, kernel_times.wall(events) / 1e3 / steps
    return Found(wall_ms, wall, busy, shares, found)


def _of_cpu(step: Callable[[], None], steps: int, wall_ms: float, notes: Sequence[str]) -> Found:
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        profiled_ms = 1e3 * (time.perf_counter() - started) / steps
    by_name = {entry.key: (int(entry.count), float(entry.self_cpu_time_total)) for entry in profiler.key_averages()}
    shares = kernel_times.shares(by_name, steps, kernel_times.own_kernels())
    return Found(wall_ms, profiled_ms, None, shares, [*notes, NO_IDLE])


def as_entries(found: Found, size: str, row: str, steps: int) -> dict[str, Any]:
    """The document's entries."""
    idle = found.idle()
    return {
        "method": METHOD,
        "size": size,
        "row": row,
        "steps": steps,
        "wall_ms": found.wall_ms,
        "profiled_ms": found.profiled_ms,
        "busy_ms": found.busy_ms,
        "idle_percent": None if idle is None else {"profiled": idle[0], "without_profiler": idle[1]},
        "calls": sum(share.calls for share in found.shares),
        "kinds": [
            {"kind": kind, "calls": calls, "ms": ms, "percent": percent}
            for kind, (calls, ms, percent) in kernel_times.by_kind(found.shares).items()
        ],
        "largest": [dataclasses.asdict(share) for share in found.shares[:LARGEST]],
        "notes": found.notes,
    }


def show(found: Found, content: dict[str, Any]) -> None:
    """Print the largest kernels, the kinds, and the idle share."""
    screen, what = tables.console(), "operator" if found.busy_ms is None else "kernel"
    title = f"{content['row']}, {content['size']}, {content['device']['name']}: {content['calls']:.0f} calls a step"
    for heading, rows in (
        (f"largest {what}s", [(s.short, s.calls, s.ms, s.percent, s.kind) for s in found.shares[:LARGEST]]),
        ("kind", [(k["kind"], k["calls"], k["ms"], k["percent"], "") for k in content["kinds"]]),
    ):
        table = Table(title=title if heading != "kind" else None, title_justify="left")
        table.add_column(heading, no_wrap=True)
        for name in ("calls", "ms", "%"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for short, calls, ms, percent, kind in rows:
            table.add_row(short, f"{calls:.1f}".removesuffix(".0"), f"{ms:.3f}", f"{percent:.1f}", kind)
        screen.print(table)
    screen.print(f"  a step: {found.wall_ms:.2f} ms, under the profiler {found.profiled_ms:.2f} ms")
    if idle := found.idle():
        line = f"  device busy {found.busy_ms:.2f} ms a step: idle {idle[0]:.1f}% of the profiled time, "
        screen.print(line + f"{idle[1]:.1f}% of the time without the profiler", soft_wrap=True)
    for note in found.notes:
        screen.print(f"  {note}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
