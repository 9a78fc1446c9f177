"""The tuner without a GPU: the search with planted times, the rig in Triton's interpreter, files, the command line."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import document
from bench.__main__ import main as bench_main
from bench.tune import __main__ as tune
from bench.tune import ahead, device, ops, search, tables
from bench.tune.candidates import CANDIDATES
from bench.tune.search import Knob
from ssr_kernels import tables as shipped
from tests.bench.tune_interpreter import CASES as INTERPRETED
from tests.bench.tune_interpreter import ROWS
from tests.kernels.interpreter import interpret

GELU = ("gelu_forward", "gelu_backward")

TABLE = {
    "r": {"a": {"BM": 16, "num_warps": 4}, "b": {"BM": 16}, "l": [{"TW": 8, "BC": 16}, {"TW": 16, "BC": 16}]},
    "other": {"c": {"BM": 16}},
}
TRIED = {
    "r": {
        "a": [{"BM": 32}, {"BM": 64}, {"BM": 128}],
        "b": [{"BM": 32}, {"BM": 64}],
        "l": [[{"BC": 32}], [{"BC": 64}]],
    }
}
A, B, L0, L1 = Knob("r", "a"), Knob("r", "b"), Knob("r", "l", 0), Knob("r", "l", 1)
CASES = [SimpleNamespace(name="small"), SimpleNamespace(name="large")]


class Planted:
    """A rig of planted times, relative to 100: by knob and the candidate's number; by case where it is a tuple."""

    def __init__(self, factors, faults=None, noise=0.0, uses=lambda case, knob: True):
        self.factors, self.faults, self.noise, self.uses = factors, faults or {}, noise, uses
        self.tried: list[tuple[str, dict]] = []

    def number(self, table, knob):
        return search.trials_of(TABLE, TRIED)[knob].index(knob.get(table))

    def fault(self, case, table, may_spill=False):
        self.tried.append((case.name, {knob: self.number(table, knob) for knob in (A, B, L0, L1)}))
        hits = [why for (knob, number), why in self.faults.items() if knob and self.number(table, knob) == number]
        if not hits and None in [knob for knob, _ in self.faults]:
            together = sum(self.number(table, knob) == 1 for knob in (A, B, L0, L1))
            return "only together" if together > 1 else ""
        return "; ".join(hits)

    def times(self, case, tables):
        found = []
        for table in tables:
            entry = {}
            for knob in (A, B, L0, L1):
                if not self.uses(case, knob):
                    continue
                number = self.number(table, knob)
                factor = self.factors.get((knob, number), 1.0) if number else 1.0
                factor = factor[CASES.index(case)] if isinstance(factor, tuple) else factor
                wobble = [1 + self.noise * (-1) ** i * (i % 3) for i in range(10)]
                entry[knob] = [100 * factor * (w if number else 1) for w in wobble]
            found.append(entry)
        return found


def run(rig, cases=CASES, spent=lambda: False):
    return search.search(TABLE, search.trials_of(TABLE, TRIED), cases, rig, spent)


def test_the_planted_best_is_chosen_of_each_kernel():
    planted = {(A, 1): 0.9, (A, 2): 0.7, (A, 3): 0.8, (B, 1): 1.3, (B, 2): 1.2, (L1, 1): 0.5, (L0, 1): 1.1}
    outcome = run(Planted(planted))
    assert outcome.table == {
        "r": {"a": {"BM": 64, "num_warps": 4}, "b": {"BM": 16}, "l": [{"TW": 8, "BC": 16}, {"TW": 16, "BC": 64}]},
        "other": {"c": {"BM": 16}},
    }
    assert TABLE["r"]["a"]["BM"] == 16 and not outcome.dropped and not outcome.unfinished
    first = outcome.choices[0]
    assert (first.knob, first.old["BM"], first.new["BM"]) == (A, 16, 64)
    assert first.old_us == pytest.approx(100) and first.new_us == pytest.approx(70)
    assert run(Planted(planted)) == outcome  # deterministic


def test_cases_count_by_their_geometric_mean():
    outcome = run(Planted({(A, 1): (0.5, 1.5), (A, 2): (0.5, 1.7), (A, 3): (0.9, 0.9), (B, 1): (0.5, 2.5)}))
    assert outcome.choices[0].new["BM"] == 32  # 0.866 < 0.9 < 0.92
    assert outcome.choices[1].new == outcome.choices[1].old


@pytest.mark.parametrize(
    ("factor", "noise", "changed"), [(0.985, 0, 0), (0.979, 0, 1), (0.97, 0.04, 0), (0.9, 0.04, 1)]
)
def test_a_gain_within_the_noise_or_under_two_percent_keeps_the_present(factor, noise, changed):
    outcome = run(Planted({(A, 2): factor}, noise=noise))
    assert (outcome.choices[0].new["BM"] == 64) == changed
    assert outcome.choices[1].new == outcome.choices[1].old


def test_a_kernel_that_a_case_does_not_use_is_judged_on_the_others():
    rig = Planted(
        {(L0, 1): (5.0, 0.5), (L1, 1): 0.1}, uses=lambda c, knob: knob != L1 and (knob != L0 or c == CASES[1])
    )
    outcome = run(rig)
    assert outcome.table["r"]["l"] == [{"TW": 8, "BC": 32}, {"TW": 16, "BC": 16}]
    assert outcome.choices[3].old_us is None


def test_the_faulty_are_found_alone_dropped_and_named():
    rig = Planted({(A, 1): 0.5, (A, 2): 0.6, (B, 1): 0.7}, {(A, 1): "loss is off by 1e-1", (B, 2): "b spills"})
    outcome = run(rig)
    assert outcome.table["r"]["a"]["BM"] == 64 and outcome.table["r"]["b"]["BM"] == 32
    assert [line.split(": ")[-1] for line in outcome.dropped] == ["loss is off by 1e-1", "b spills"]
    assert outcome.dropped[0].startswith("r a {'BM': 32, 'num_warps': 4} on small")
    on_small = [tried for name, tried in rig.tried if name == "small"]
    assert on_small[0] == {A: 0, B: 0, L0: 0, L1: 0}  # the present first
    assert on_small[1] == {A: 1, B: 1, L0: 1, L1: 1}
    assert on_small[2:6] == [{knob: int(knob == one) for knob in (A, B, L0, L1)} for one in (A, B, L0, L1)]
    assert [tried for name, tried in rig.tried if name == "large"][1:] == [
        {A: 0, B: 1, L0: 1, L1: 1},  # what failed on the small case is not tried again
        {A: 2, B: 0, L0: 0, L1: 0},
        {A: 3, B: 0, L0: 0, L1: 0},
    ]


def test_what_fails_only_together_is_dropped_together():
    outcome = run(Planted({(A, 1): 0.5, (A, 2): 0.6}, {(None, 1): "x"}))
    assert outcome.table["r"]["a"]["BM"] == 64
    assert len(outcome.dropped) == 4 and "fails together with the others' candidate 1" in outcome.dropped[0]


def test_a_present_table_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the present table fails on small: no memory"):
        run(Planted({}, {(A, 0): "no memory"}))


@pytest.mark.parametrize(("calls", "measured"), [(0, 0), (3, 0), (5, 1), (100, 2)])
def test_when_the_time_is_over_what_was_found_is_kept(calls, measured):
    """spent() is asked once before a case, before each of three trials, and once before it is timed."""
    asked = []

    def spent():
        asked.append(1)
        return len(asked) > calls

    outcome = run(Planted({(A, 1): (0.5, 1.9), (A, 2): (0.9, 0.5)}), spent=spent)
    assert outcome.table["r"]["a"]["BM"] == {0: 16, 1: 32, 2: 64}[measured]
    assert outcome.unfinished == (f"{2 - measured} of 2 cases not measured" if measured < 2 else "")


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


def test_a_trial_has_the_tables_own_blocks_first_and_nothing_twice():
    table = {"r": {"k": {"BM": 16, "num_warps": 4}}}
    trials = search.trials_of(
        table, {"r": {"k": [{"BM": 32}, {"BM": 16}, {"BM": 32, "num_warps": 4}, {"num_warps": 8}]}}
    )
    assert trials[Knob("r", "k")] == [
        {"BM": 16, "num_warps": 4},
        {"BM": 32, "num_warps": 4},
        {"BM": 16, "num_warps": 8},
    ]
    assert search.with_trial(table, trials, 9) == table


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
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("5 kernels compiled ahead by 1 processes") and "then" not in first
    assert second.startswith("1 kernels")
    assert "TimeoutError, the rest compiles when it runs" in third


# ---- files ----


@pytest.mark.parametrize("op", CANDIDATES)
def test_the_shipped_files_have_the_writers_style(op):
    assert tables.text(shipped.read(op)) == shipped.path(op).read_text(encoding="utf-8")


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Copies of the shipped files without tuned sections, read and written by everyone."""
    for op in CANDIDATES:
        content = {"default": shipped.read(op)["default"]}
        (tmp_path / f"{op}.json").write_text(tables.text(content), encoding="utf-8")
    for module in (shipped, tables):
        monkeypatch.setattr(module, "path", lambda op: tmp_path / f"{op}.json")
    shipped.table.cache_clear()
    yield tmp_path
    shipped.table.cache_clear()


def test_a_section_is_written_and_read_back(files):
    before = (files / "dwconv.json").read_bytes()
    table = shipped.table("dwconv", "sm_90")
    assert not tables.write("dwconv", "sm_90", table, {"device": "x"})
    assert (files / "dwconv.json").read_bytes() == before
    changed = Knob("maps", "gelu_backward", 1).put(table, {"TW": 32, "BC": 16, "num_warps": 4, "STAGES": 2})
    changed = Knob("maps", "tap_sums").put(changed, {"BS": 64, "BC": 32, "num_warps": 8})
    for device_name in ("an H100", "a later one"):
        written = tables.write("dwconv", "sm_90", changed, {"device": device_name, "commit": "abc"})
        shipped.table.cache_clear()
        assert shipped.table("dwconv", "sm_90") == changed and shipped.table("dwconv", "sm_80") == table
    assert not written  # the second time nothing changed, so neither does where it comes from
    text = (files / "dwconv.json").read_text()
    assert text.startswith(before.decode().removesuffix("\n}\n"))
    assert text.endswith(
        """  },
  "sm_90": {
    "maps": {
      "gelu_backward": [
        {"TW": 16, "BC": 32, "num_warps": 4, "STAGES": 3},
        {"TW": 32, "BC": 16, "num_warps": 4, "STAGES": 2},
        {"TW": 64, "BC": 16, "num_warps": 8, "STAGES": 3}
      ],
      "tap_sums": {"num_warps": 8}
    }
  },
  "provenance": {
    "sm_90": {"device": "an H100", "commit": "abc"}
  }
}
"""
    )
    assert tables.write("dwconv", "sm_80", changed, {"device": "an A100"})
    assert list(shipped.read("dwconv")) == ["default", "sm_80", "sm_90", "provenance"]
    assert tables.write("dwconv", "sm_80", table, {}) and tables.write("dwconv", "sm_90", table, {})
    assert (files / "dwconv.json").read_bytes() == before  # what is as the default needs no section


# ---- the command line ----


class FakeRig:
    """A GPU on which candidate 1 of every kernel takes half of the time; the whole op with it `ratio` times as long."""

    ratio = 0.7

    def __init__(self, op, knobs, device, rounds):
        self.knobs, self.rounds = knobs, rounds

    def fault(self, case, table, may_spill=False):
        return ""

    def times(self, case, tables):
        return [
            {knob: [50.0 if number == 1 else 100.0] * self.rounds for knob in self.knobs}
            for number in range(len(tables))
        ]

    def overall(self, case, old, new):
        return 10.0, 10.0 * self.ratio


@pytest.fixture
def gpu(monkeypatch, files):
    """A machine that seems to have a GPU."""
    facts = {
        "device": {"name": "A GPU"},
        "versions": {"torch": "2", "triton": "3"},
        "commit": "abc",
        "dirty": True,
        "date": "d",
    }
    monkeypatch.setattr(tune.machine, "machine_reasons", lambda name: [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(shipped, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(document, "document", lambda rows, setting, peaks: facts)
    monkeypatch.setattr(document, "default_path", lambda name, device: files / f"{name}.json")
    monkeypatch.setattr(tune, "_compile_ahead", lambda *arguments: None)
    monkeypatch.setattr(device, "DeviceRig", FakeRig)
    return files


def test_without_a_gpu_one_sentence_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(tune.machine, "machine_reasons", lambda name: ["there is no CUDA device"])
    assert bench_main(["tune"]) == 2
    assert capsys.readouterr().err == "python -m bench tune: there is no CUDA device\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["alin"], "there is no op 'alin'"),
        (["--json", "align"], "--json takes a file that ends in .json"),
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--minutes", "nan"], "--minutes must be more than 0"),
    ],
)
def test_mistakes_on_the_command_line(words, problem, capsys, gpu):
    assert tune.main(words) == 2
    assert problem in capsys.readouterr().err


def test_the_interpreter_is_no_gpu(monkeypatch, capsys, gpu):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main([]) == 2 and "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_a_run_without_write_changes_no_table(gpu, capsys):
    before = {op: (gpu / f"{op}.json").read_bytes() for op in CANDIDATES}
    assert tune.main(["contrast", "--json"]) == 0
    assert {op: (gpu / f"{op}.json").read_bytes() for op in CANDIDATES} == before
    printed = capsys.readouterr().out
    assert "bfloat16 row_sums" in printed and "the new table is kept" in printed and "10.0 -> 7.0 us" in printed
    found = json.loads((gpu / "tune.json").read_text())
    assert found["architecture"] == "sm_90" and found["commit"] == "abc" and not found["failed"]
    first = CANDIDATES["contrast"]["bfloat16"]["row_sums"][0]
    assert found["changes"]["contrast"]["bfloat16"]["row_sums"].items() <= first.items()
    assert {"op", "rows", "kept", "kernels", "overall", "dropped", "unfinished"} == found["rows"][0].keys()


def test_write_puts_every_op_into_its_section(gpu):
    tables_before = {op: shipped.table(op, "sm_90") for op in CANDIDATES}
    assert tune.main(["--write"]) == 0
    shipped.table.cache_clear()
    for op, rows in CANDIDATES.items():
        table = shipped.table(op, "sm_90")
        trials = search.trials_of(tables_before[op], rows)
        assert all(knob.get(table) == choices[1] for knob, choices in trials.items())
        assert shipped.read(op)["provenance"]["sm_90"] == {
            "device": "A GPU", "torch": "2", "triton": "3", "commit": "abc-dirty", "date": "d",
        }  # fmt: skip


def test_a_table_that_makes_the_op_slower_is_not_kept(gpu, monkeypatch, capsys):
    monkeypatch.setattr(FakeRig, "ratio", 1.01)
    before = (gpu / "contrast.json").read_bytes()
    assert tune.main(["contrast", "--write"]) == 0
    assert (gpu / "contrast.json").read_bytes() == before
    assert "NOT kept: the whole op is slower" in capsys.readouterr().out


def test_an_op_that_fails_does_not_stop_the_others(gpu, monkeypatch, capsys):
    def fault(self, case, table, may_spill=False):
        return "no memory" if "B=2" in case.name or "half" in table else ""

    monkeypatch.setattr(FakeRig, "fault", fault)
    before = (gpu / "align.json").read_bytes()
    assert tune.main(["align", "contrast", "--write", "--json"]) == 1
    assert "align: RuntimeError: the present table fails" in capsys.readouterr().err
    assert (gpu / "align.json").read_bytes() == before and "sm_90" in json.loads((gpu / "contrast.json").read_text())
    assert len(json.loads((gpu / "tune.json").read_text())["failed"]) == 1


def test_when_the_minutes_are_over_it_says_so(gpu, capsys):
    before = (gpu / "segloss.json").read_bytes()
    assert tune.main(["segloss", "--minutes", "1e-9", "--write"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 cases not measured" in printed and "minutes are over" in printed
    assert (gpu / "segloss.json").read_bytes() == before


def test_a_quick_run_takes_one_case_of_each_group(gpu):
    assert tune.main(["align", "--quick", "--json"]) == 0
    found = json.loads((gpu / "tune.json").read_text())
    assert [len(group["overall"]) for group in found["rows"]] == [1, 1]


def test_the_jobs_of_compiling_ahead(monkeypatch, files):
    """Every table that the search will run, with the shapes of every case."""
    taken = []
    monkeypatch.setattr(
        ahead, "compile_all", lambda jobs, capability, seconds: taken.append((jobs, capability, seconds)) or ""
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    table = shipped.table("contrast", "default")
    tune._compile_ahead({"contrast": table}, torch.device("cpu"), True, float("inf"))
    [(jobs, capability, seconds)] = taken
    assert capability == 103 and seconds is None
    most = [max(len(tried) for tried in row.values()) for row in CANDIDATES["contrast"].values()]
    assert jobs[0].table == table and len(jobs) == sum(1 + number for number in most)
    assert jobs[0].shapes == [
        {
            "leaves": {"x": ((8192, 256), torch.bfloat16)},
            "constants": {"group": ((8192,), torch.int32), "klass": ((8192,), torch.int32)},
        }
    ]
    assert ops.meta_inputs(jobs[0].shapes[0]).leaves["x"].device.type == "meta"
