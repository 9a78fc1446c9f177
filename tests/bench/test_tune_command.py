"""The tuner's files and command line, with a rig of planted times in the place of a GPU."""

import json

import pytest
import torch

from bench import document
from bench.__main__ import main as bench_main
from bench.tune import __main__ as tune
from bench.tune import ahead, device, ops, search, tables
from bench.tune.candidates import CANDIDATES
from bench.tune.search import Knob
from ssr_kernels import tables as shipped

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
