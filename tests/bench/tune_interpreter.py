"""Run as a program under TRITON_INTERPRET=1: the tuner's rig on the CPU, float32, small odd cases.

Prints one JSON object an op: what is wrong with candidates of every kernel at once; and whether each entry of the table
has the times of the blocks that it had in that run, where a launch "takes" what fake_time makes of its blocks.
"""

import copy
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction

from bench.kernels import align, contrast, dwconv, segloss
from bench.tune import device
from bench.tune.candidates import CANDIDATES
from bench.tune.ops import Tunable, exact_segloss, tunables
from bench.tune.search import trials_of
from ssr_kernels import tables

FLOAT = torch.float32
STAGES = align.Shape(1, ((3, 5), (2, 2)), (20, 7), target_grid=(2, 3))
CASES = {
    "align": [align.make_case("odd", STAGES, FLOAT)],
    "contrast": [contrast.make_case(70, 24, FLOAT)],
    "dwconv": [
        dwconv.make_case(1, 2, 10, 3, FLOAT),
        dwconv.make_case(1, 1, 30, 3, FLOAT),
        dwconv.make_case(1, 1, 61, 3, FLOAT),
        dwconv.make_case(1, 1, 100, 3, FLOAT, 3),
    ],
    "segloss": [replace(segloss.make_case((1, 2, 3, 19), (8, 12), FLOAT), exact=exact_segloss)],
}
ROWS = {"align": ("float32",), "contrast": ("float32",), "dwconv": ("maps",), "segloss": ("32", "sums")}
ROUNDS = 2
LAUNCHES = {"gram_tables": 2}
"""Launches of a kernel in one forward and backward, where they are not one."""


def fake_time(blocks: dict[str, int]) -> float:
    """Another number for other blocks."""
    return float(sum(value * (number + 7) ** 2 for number, value in enumerate(blocks[key] for key in sorted(blocks))))


class Trace:
    """In the place of the profiler: the launches since it started, as events of its trace."""

    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []

    @contextmanager
    def profile(self, **options):
        self.events = []
        yield self

    def launch(self, function: InterpretedFunction, arguments: dict[str, object], options: set[str]) -> None:
        taken = fake_time({name: int(arguments[name]) for name in options})
        name = function.fn.__name__
        self.events.append({"cat": "kernel", "name": name, "ts": len(self.events), "dur": taken})
        self.events.append({"cat": "gpu_memset", "name": "Memset", "ts": len(self.events), "dur": 9.0})


def check(op: Tunable, name: str, trace: Trace) -> dict[str, object]:
    """Run candidates of every kernel at once."""
    table = tables.table(name, "default")
    trials = trials_of(table, {row: CANDIDATES[name][row] for row in ROWS[name]})
    changed = {"first": copy.deepcopy(table), "last": copy.deepcopy(table)}
    for knob, choices in trials.items():
        changed["first"] = knob.put(changed["first"], choices[1])
        changed["last"] = knob.put(changed["last"], choices[-1])
    rig = device.DeviceRig(op, list(trials), torch.device("cpu"), ROUNDS)
    faults, wrong, seen = [], [], set()
    runs = [table, *changed.values()]
    for case in CASES[name]:
        faults += [rig.fault(case, changed[which]) for which in changed]
        for number, times in enumerate(rig.times(case, runs)):
            seen |= set(times)
            for knob, found in times.items():
                expected = LAUNCHES.get(knob.kernel, 1) * fake_time(knob.get(runs[number]))
                if found != [expected] * ROUNDS:
                    wrong.append(f"{case.name}, run {number}: {knob} took {found}, not {expected}")
    missing = [str(knob) for knob in trials if knob not in seen]
    return {"name": name, "faults": [fault for fault in faults if fault], "wrong": wrong, "missing": missing}


def options_of(name: str) -> dict[str, set[str]]:
    """The options of each kernel in an op's table."""
    found = {}
    for kernels in tables.table(name, "default").values():
        for kernel, blocks in kernels.items():
            found[kernel] = set(blocks[0] if isinstance(blocks, list) else blocks)
    return found


def main() -> None:
    trace = Trace()
    run = InterpretedFunction.run
    for name in sys.argv[2:]:
        options = options_of(name)

        def launch(self, *arguments, options=options, **named):
            trace.launch(self, named, options[self.fn.__name__])
            return run(self, *arguments, **named)

        with (
            patch.object(InterpretedFunction, "run", launch),
            patch.object(device, "FLUSH_BYTES", 1),
            patch.object(device, "_events", lambda profiler: profiler.events),
            patch("torch.profiler.profile", trace.profile),
            patch("torch.cuda.synchronize", lambda: None),
        ):
            print(json.dumps(check(tunables()[name], name, trace)), flush=True)


if __name__ == "__main__":
    main()
