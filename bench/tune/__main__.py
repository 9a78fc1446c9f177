"""Tune the Triton kernels' block sizes on this GPU: `python -m bench tune [OP...] [--write] [--json [FILE]]`.

Tries a fixed list of block sizes of every kernel, judges each against the float64 definition, and keeps what is faster
by each kernel's own time; then the whole op is timed with the old and the new table. --write puts the result into
kernels/ssr_kernels/OP/configs.json as the section of this GPU's architecture; commit it, and run `make test ARGS="-m
slow tests/aot"`. Exit code 0: done; 1: an op could not be tuned; 2: no GPU, or a mistake on the command line.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import document
from bench.harness import Setting, describe
from ssr_kernels import machine
from ssr_kernels import tables as shipped

from . import tables
from .candidates import CANDIDATES
from .search import Knob, Outcome, Table, search, trials_of, with_trial

NOT_SLOWER = 1.005
"""New over old time of the whole op up to which the new table is kept: what two medians of one table differ by."""

AHEAD_SHARE = 0.4
"""Of the time that is left, at most this is spent on compiling ahead."""


@dataclass
class Tuned:
    """What was found of one group of an op's rows.

    Attributes:
        kept: whether the new table is used: it changes something, and the whole op is not slower.
        overall: of each case the whole op's time with the old and the new table, microseconds.
    """

    op: str
    rows: tuple[str, ...]
    outcome: Outcome
    kept: bool
    overall: dict[str, tuple[float, float]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    if problem := _problem(options):
        print(f"python -m bench tune: {problem}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    section = shipped.architecture(device)
    facts = document.document([], Setting(device, options.quick), None)
    ends = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    print(f"{facts['device']['name']}: section {section}", flush=True)
    names = options.ops or list(CANDIDATES)
    old = {op: shipped.table(op, section) for op in names}
    new = dict(old)
    _compile_ahead(old, device, options.quick, ends)
    tuned: list[Tuned] = []
    failed: list[str] = []
    for op in names:
        try:
            with _counting_compilations() as missed:
                for found in tune(op, old[op], device, options.quick, ends):
                    tuned.append(found)
                    new[op] = _joined(old[op], [one for one in tuned if one.op == op])
                    _show(found)
            print(f"{op}: {len(missed)} kernels compiled that were not compiled ahead", flush=True)
        except Exception as error:  # the other ops are still tuned, and what this one found is kept
            failed.append(f"{op}: {describe(error)}")
            print(failed[-1], file=sys.stderr, flush=True)
        if options.write:
            written = tables.write(op, section, new[op], _provenance(facts))
            print(f"{shipped.path(op)}: {'written' if written else 'unchanged'}", flush=True)
        if options.json is not None:
            path = Path(options.json) if options.json else document.default_path("tune", facts["device"])
            document.write(path, {**facts, **_content(section, old, new, tuned, failed)})
            print(f"wrote {path}", flush=True)
    if time.monotonic() > ends:
        print(f"the {options.minutes:g} minutes are over: see what is not finished above")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=summary, epilog=details)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CANDIDATES)}; default: all")
    parser.add_argument("--write", action="store_true", help="put the result into the ops' configs.json")
    target = "bench/results/<device>/tune.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write what was measured, to {target}")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop trying after this time; default: none")
    parser.add_argument("--quick", action="store_true", help="one case of each dtype or number of classes, few rounds")
    return parser.parse_args(arguments)


def _problem(options: argparse.Namespace) -> str:
    """Why it cannot run, one sentence; empty if it can."""
    if unknown := [op for op in options.ops if op not in CANDIDATES]:
        return f"there is no op {unknown[0]!r}; the ops are {', '.join(CANDIDATES)}"
    if options.json and not options.json.endswith(".json"):
        return f"--json takes a file that ends in .json (it got {options.json!r}; OPs go first)"
    if options.minutes is not None and not options.minutes > 0:
        return f"--minutes must be more than 0 (it is {options.minutes:g})"
    if machine.interpreted():
        return "TRITON_INTERPRET=1 is set, and the interpreter has no times: unset it"
    return "; ".join(machine.machine_reasons("triton"))


def tune(op: str, old: Table, device: torch.device, quick: bool, ends: float) -> Iterator[Tuned]:
    """Tune each group of an op's rows; see search.search."""
    from .device import QUICK_ROUNDS, ROUNDS, DeviceRig  # Triton's kernels: only where there is a GPU
    from .ops import tunables

    tunable = tunables()[op]
    for group in tunable.groups:
        trials = _trials(op, old, group.rows)
        rig = DeviceRig(tunable, list(trials), device, QUICK_ROUNDS if quick else ROUNDS)
        cases = group.cases[:1] if quick and op != "dwconv" else group.cases
        outcome = search(old, trials, cases, rig, lambda: time.monotonic() > ends)
        yield judged(op, group.rows, old, outcome, cases, rig.overall)


def judged(
    op: str,
    rows: tuple[str, ...],
    old: Table,
    outcome: Outcome,
    cases: Sequence[Any],
    overall: Callable[[Any, Table, Table], tuple[float, float]],
) -> Tuned:
    """Time the whole op with the old and the new table, if they differ: is the new one to be kept?"""
    if outcome.table == old:
        return Tuned(op, rows, outcome, False)
    times = {case.name: overall(case, old, outcome.table) for case in cases}
    ratio = statistics.geometric_mean(after / before for before, after in times.values())
    return Tuned(op, rows, outcome, ratio <= NOT_SLOWER, times)


def _trials(op: str, table: Table, rows: Sequence[str]) -> dict[Knob, list[dict[str, int]]]:
    return trials_of(table, {row: CANDIDATES[op][row] for row in rows})


def _joined(old: Table, found: Sequence[Tuned]) -> Table:
    """The old table with the rows of all groups whose new ones are kept."""
    return {**old, **{row: one.outcome.table[row] for one in found if one.kept for row in one.rows}}


def _compile_ahead(old: dict[str, Table], device: torch.device, quick: bool, ends: float) -> None:
    """Compile every trial of every op in other processes."""
    from . import ahead
    from .ops import shapes_of, tunables

    jobs = []
    for op, table in old.items():
        for group in tunables()[op].groups:
            cases = group.cases[:1] if quick and op != "dwconv" else group.cases
            shapes = [shapes_of(case.make(device, 0)) for case in cases]
            trials = _trials(op, table, group.rows)
            for number in range(max(len(choices) for choices in trials.values())):
                jobs.append(ahead.Job(op, shapes, with_trial(table, trials, number)))
    torch.cuda.empty_cache()
    major, minor = torch.cuda.get_device_capability(device)
    seconds = AHEAD_SHARE * (ends - time.monotonic()) if ends < math.inf else None
    print(ahead.compile_all(jobs, 10 * major + minor, seconds), flush=True)


@contextmanager
def _counting_compilations() -> Iterator[list[str]]:
    """The names of the kernels that this process compiles inside: those that were not compiled ahead."""
    from triton import knobs

    missed: list[str] = []

    def note(**facts: Any) -> None:
        if not facts["cache_hit"]:
            missed.append(facts["metadata"]["name"])

    with patch.object(knobs.compilation, "listener", note):
        yield missed


def _show(found: Tuned) -> None:
    """What a group found, as lines of a table."""
    outcome = found.outcome
    print(f"\n{found.op} {', '.join(found.rows)}" + (f": {outcome.unfinished}" if outcome.unfinished else ""))
    for choice in outcome.choices:
        us = ["-" if value is None else f"{value:.1f}" for value in (choice.old_us, choice.new_us)]
        changed = f"-> {_blocks(choice.new)}" if choice.new != choice.old else "kept"
        print(f"  {str(choice.knob):32} {us[0]:>9} {us[1]:>9} us  {_blocks(choice.old)} {changed}")
    for line in outcome.dropped:
        print(f"  dropped: {line}")
    for name, (before, after) in found.overall.items():
        print(f"  whole op, {name}: {before:.1f} -> {after:.1f} us")
    if found.overall:
        print(f"  the new table is {'kept' if found.kept else 'NOT kept: the whole op is slower with it'}")
    sys.stdout.flush()


def _blocks(blocks: dict[str, int]) -> str:
    return " ".join(f"{option}={value}" for option, value in blocks.items())


def _provenance(facts: dict[str, Any]) -> dict[str, Any]:
    """Where a section comes from, for configs.json."""
    versions = facts["versions"]
    commit = f"{facts['commit']}-dirty" if facts["dirty"] else facts["commit"]
    found = {"device": facts["device"]["name"], "torch": versions.get("torch"), "triton": versions.get("triton")}
    return {**found, "commit": commit, "date": facts["date"]}


def _content(
    section: str, old: dict[str, Table], new: dict[str, Table], tuned: Sequence[Tuned], failed: Sequence[str]
) -> dict[str, Any]:
    """What a run found, for JSON; times in microseconds."""
    groups = [
        {
            "op": one.op,
            "rows": one.rows,
            "kept": one.kept,
            "kernels": [{**asdict(choice), "knob": str(choice.knob)} for choice in one.outcome.choices],
            "overall": one.overall,
            "dropped": one.outcome.dropped,
            "unfinished": one.outcome.unfinished,
        }
        for one in tuned
    ]
    changes = {op: shipped.difference(old[op], new[op]) for op in new}
    method = {
        "kernels": "torch.profiler's kernel events, or CUDA events around each launch; L2 flushed, tables in turn",
        "overall": "do_bench",
    }
    return {"architecture": section, "changes": changes, "rows": groups, "failed": list(failed), "method": method}


if __name__ == "__main__":
    sys.exit(main())
