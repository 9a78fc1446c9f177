"""The tuner's rig without a GPU: traces, what it runs of each op, Triton's interpreter, compiling ahead."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import document
from bench.tune import device, ops, search
from bench.tune.candidates import CANDIDATES
from bench.tune.search import Knob
from ssr_kernels import tables as shipped
from tests.bench.tune_interpreter import CASES as INTERPRETED
from tests.bench.tune_interpreter import ROWS
from tests.kernels.interpreter import interpret

GELU = ("gelu_forward", "gelu_backward")


def event(name, ts, dur, cat="kernel"):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "ph": "X"}


def test_kernel_times_of_a_trace():
    """Two rounds of two runs; `twice` is launched twice in each; events come in any order."""
    events, ts = [], 0
    for number in range(4):
        for name, dur in (("twice", 1 + number), ("once", 10 * number + 5), ("twice", 100), ("twice_more", 1e6)):
            events.insert(0, event(name, ts, dur))
            ts += 1.5
        events += [
            event("once", ts, 1e9, "cpu_op"),
            event("Memset (Device)", ts, 3, "gpu_memset"),
            {"ph": "M", "name": "x"},
        ]
    found = device.by_kernel(events, {"once", "twice", "absent"}, 2, 2)
    assert found == [{"once": [5, 25], "twice": [101, 103]}, {"once": [15, 35], "twice": [102, 104]}]


def test_a_trace_with_lost_launches_is_an_error():
    events = [event("once", number, 1) for number in range(7)]
    with pytest.raises(RuntimeError, match="saw 7 launches of once in 4 x 2 runs"):
        device.by_kernel(events, {"once"}, 2, 4)


# ---- the ops ----


@pytest.mark.parametrize("op", CANDIDATES)
def test_what_is_run_of_an_op_launches_every_kernel_of_its_table(op, monkeypatch):
    """On meta tensors, as where it is compiled ahead."""
    from triton.runtime.jit import JITFunction

    names = set()
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **named: names.add(self.fn.__name__))
    for case in INTERPRETED[op]:
        ops.tunables()[op].run(ops.meta_inputs(ops.shapes_of(case.make(torch.device("cpu"), 0))))
    assert names == {kernel for row in ROWS[op] for kernel in CANDIDATES[op][row]}


def test_the_groups_have_every_row_once():
    for op, tunable in ops.tunables().items():
        assert sorted(row for group in tunable.groups for row in group.rows) == sorted(CANDIDATES[op])
        names = [case.name for group in tunable.groups for case in group.cases]
        assert len(set(names)) == len(names)


def test_the_maps_of_dwconv_use_every_entry_that_has_candidates():
    tunable = ops.tunables()["dwconv"]
    used = set()
    for case in tunable.groups[0].cases:
        x = torch.empty([case.sizes[name] for name in ("batch", "height", "width", "channels")], device="meta")
        kernels = ("dilated_forward", "dilated_dx", "dilated_dw") if case.name.startswith("dilated") else GELU
        used |= {Knob("maps", kernel, tunable.place(kernel, ops.Inputs({"x": x}, {}))) for kernel in kernels}
    assert used == set(search.trials_of(shipped.table("dwconv", "default"), CANDIDATES["dwconv"])) - {
        Knob("maps", "tap_sums")
    }


# ---- the rig, in Triton's interpreter ----


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "op", ["contrast", *(pytest.param(op, marks=pytest.mark.slow) for op in ("align", "dwconv", "segloss"))]
)
def test_a_table_reaches_the_kernels_and_their_results_are_right(op):
    """Every kernel with blocks that are not the shipped ones; each entry's time is that of the blocks it had."""
    found = interpret("tests.bench.tune_interpreter", 0, [op])[op]
    assert not found["faults"] and not found["wrong"] and not found["missing"]


class OneKernel:
    """An op whose one kernel adds 1; a table may make it wrong, unsteady or raise."""

    def __init__(self):
        self.calls = 0

    def run(self, inputs):
        self.calls += 1
        mode = shipped.table("any", "any")["r"]["k"]["BM"]
        if mode == 64:
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        step = {16: 0.0, 32: 1e-3, 128: 1e-9 * self.calls}[mode]
        return {"y": (inputs.leaves["x"].double() + 1 + step)}


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (16, ""),
        (32, "y is off by"),
        (64, "RuntimeError: out of resource: shared memory"),
        (128, "y differs in a second run"),
    ],
)
def test_the_rig_judges_a_table(mode, words):
    case = document.Row("b", "c", {}, "d", "p")  # anything with a name
    case = SimpleNamespace(
        name="c", sizes={}, dtype=torch.float32,
        make=lambda device, seed: ops.Inputs({"x": torch.ones(3)}, {}),
        exact=lambda inputs: {"y": torch.full((3,), 2.0, dtype=torch.float64)},
    )  # fmt: skip
    rig = device.DeviceRig(OneKernel(), [Knob("r", "k")], torch.device("cpu"))
    fault = rig.fault(case, {"r": {"k": {"BM": mode}}})
    assert fault.startswith(words) if words else fault == ""


def test_a_spilling_kernel_is_named_but_the_present_table_may(monkeypatch):
    case = SimpleNamespace(
        name="c", sizes={}, dtype=torch.float32, make=lambda device, seed: ops.Inputs({}, {}), exact=lambda inputs: {}
    )
    kernels = [SimpleNamespace(name="k", n_spills=4), SimpleNamespace(name="other", n_spills=0)]
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "run", lambda self, *a, grid, warmup, **k: kernels[grid])

    def run(inputs):
        for number in (0, 1, 0):
            JITFunction.run(None, grid=number, warmup=False)
        return {}

    rig = device.DeviceRig(ops.Tunable(run, ()), [], torch.device("cpu"))
    assert rig.fault(case, {}) == "k spills"
    assert rig.fault(case, {}, may_spill=True) == ""


def test_without_a_profiler_events_stand_around_each_launch(monkeypatch, capsys):
    """A clock that each launch advances by what its table says."""
    from triton.runtime.jit import JITFunction

    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def launch(self, *, grid, warmup):
        blocks = shipped.table("any", "any")["r"]
        clock[0] += blocks[grid]["BM"] / 1e3
        return SimpleNamespace(name=grid, n_spills=0)

    def run(inputs):
        for kernel in ("a", "b", "a"):
            clock[0] += 1e6  # other work on the device
            JITFunction.run(None, grid=kernel, warmup=False)
        return {}

    class Nothing:
        def __init__(self, **options): ...
        def __enter__(self): ...
        def __exit__(self, *error): ...

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("torch.profiler.profile", Nothing)
    monkeypatch.setattr(device, "_events", lambda profiler: [{"cat": "cpu_op", "name": "a"}])
    monkeypatch.setattr(device, "FLUSH_BYTES", 1)
    case = SimpleNamespace(name="c", make=lambda device, seed: ops.Inputs({}, {}), exact=lambda inputs: {})
    a, b = Knob("r", "a"), Knob("r", "b")
    rig = device.DeviceRig(ops.Tunable(run, ()), [a, b], torch.device("cpu"), rounds=2)
    tables = [{"r": {"a": {"BM": 16}, "b": {"BM": size}}} for size in (16, 64)]
    for _ in range(2):
        first, second = rig.times(case, tables)
        assert first[a] == second[a] == pytest.approx([32, 32])
        assert first[b] == pytest.approx([16, 16]) and second[b] == pytest.approx([64, 64])
    assert capsys.readouterr().out.count("the profiler records no kernel here") == 1


# ---- compiling ahead ----

ROOT = Path(__file__).resolve().parents[2]

AHEAD = """
import sys, torch
from bench.tune import ahead, ops, search
from bench.tune.candidates import CANDIDATES
from ssr_kernels import tables

if __name__ == "__main__":
    case = ops.tunables()["contrast"].groups[0].cases[1]
    inputs = case.make(torch.device("cpu"), 0)
    table = tables.table("contrast", "default")
    sums = CANDIDATES["contrast"]["bfloat16"]["gradient_sums"]
    trials = search.trials_of(table, {"bfloat16": {"gradient_sums": sums}})
    jobs = [ahead.Job("contrast", [ops.shapes_of(inputs)], search.with_trial(table, trials, n)) for n in (0, 1)]
    print(ahead.compile_all(jobs[:1], 90, None))
    print(ahead.compile_all(jobs, 90, None))
    print(ahead.compile_all(jobs, 90, 0.0))
"""


def test_what_is_compiled_ahead_is_found_again(tmp_path):
    """A second time nothing is compiled but the one kernel whose blocks differ; when the time is over it stops."""
    (tmp_path / "program.py").write_text(AHEAD)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={
            **os.environ,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("5 kernels compiled ahead by 1 processes") and "then" not in first
    assert second.startswith("1 kernels")
    assert "TimeoutError, the rest compiles when it runs" in third
