"""compute-sanitizer's verdict: a fake tool in its place, what it finds, and a run that is cut off."""

import dataclasses
import json
import sys

import pytest
import torch

from bench import document, sanitize, sanitizer
from bench.kernels import align

CLEAN = "========= ERROR SUMMARY: 0 errors"
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)"
FINDING = (
    "========= Invalid __global__ read of size 4 bytes\\n=========     at gram_rows+0x70\\n=========     Host Frame: x"
)


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    return sanitizer.begin("memcheck")


def tool(path, lines=(), code=0, statuses=("ok",), done=True):
    """A process that does what bench.sanitize does to the document, and prints like the tool."""
    rows = [{"status": status} for status in statuses]
    return [
        sys.executable,
        "-c",
        f"import json, pathlib, sys; path = pathlib.Path({str(path)!r}); content = json.loads(path.read_text())\n"
        f"path.write_text(json.dumps(dict(content, rows={rows!r}, cases_done={done})))\n"
        + "".join(f'print("{line}")\n' for line in lines)
        + f"sys.exit({code})",
    ]


@pytest.mark.parametrize(
    ("run", "code", "verdict", "complete"),
    [
        ({"lines": [CLEAN]}, 0, "clean", True),
        ({"lines": [CLEAN], "statuses": ("ok", "wrong"), "code": 1}, 1, "1 cases are wrong", True),
        ({"lines": [FINDING, "========= ERROR SUMMARY: 3 errors"], "code": 99}, 1, "3 findings", True),
        ({"lines": [RACES]}, 1, "2 findings", True),
        ({"lines": ["everything is fine"]}, 1, "none: the tool printed no summary (exit code 0)", False),
        ({"lines": [CLEAN], "code": 7}, 1, "none: exit code 7", True),
        ({"lines": [CLEAN], "done": False}, 1, "clean", False),
    ],
)
def test_verdicts(run, code, verdict, complete, path, capfd):
    assert sanitizer.check(tool(path, **run), path, {}) == code
    content = json.loads(path.read_text())
    assert (content["verdict"], content["complete"], content["tool"]) == (verdict, complete, "memcheck")
    assert content["device"] and content["versions"]["torch"]
    if run["lines"][0] == FINDING:
        assert content["findings"][:2] == ["Invalid __global__ read of size 4 bytes", "at gram_rows+0x70"]
        assert not any("Host Frame" in line for line in content["findings"])
    assert "wrote" in capfd.readouterr().out


def test_a_cut_run_leaves_no_verdict(path):
    content = json.loads(path.read_text())
    assert path.name == "sanitize-memcheck.json" and content["verdict"] == "none: cut off" and not content["complete"]


def test_rows_are_written_one_by_one_and_parts_make_the_whole(path, capsys):
    assert sanitize.main(["reference", "--json", str(path)], [align.BENCH]) == 0
    content = json.loads(path.read_text())
    names = [row["case"] for row in content["rows"]]
    assert content["cases_done"] and not content["complete"] and len(names) == 4
    assert {row["status"] for row in content["rows"]} == {"ok"}
    capsys.readouterr()
    parts = []
    for part in ("0/2", "1/2"):
        assert sanitize.main(["reference", "--part", part], [align.BENCH]) == 0
        printed = capsys.readouterr().out
        parts += [name for name in names if f" {name}: " in printed]
    assert sorted(parts) == sorted(names)


def test_the_reference_is_computed_on_the_cpu(monkeypatch):
    seen, moved = [], []

    def exact(inputs):
        seen.append(inputs)
        return case.exact(inputs)

    def on(device, inputs, really=sanitize._on):
        moved.append(really(device, inputs))
        return moved[-1]

    monkeypatch.setattr(sanitize, "_on", on)
    case, *_ = align.odd_cases(sanitize.Setting(torch.device("cpu")))
    provider = next(one for one in align.PROVIDERS if one.name == "reference")
    watched = dataclasses.replace(case, exact=exact)
    row = sanitize.check(align.BENCH, watched, provider, sanitize.Setting(torch.device("cpu")))
    assert row.status == "ok" and len(seen) == len(moved) == 1 and seen[0] is not moved[0]
    assert all(torch.equal(a, b) for a, b in zip(seen[0].tensors(), moved[0].tensors(), strict=True))


def test_without_the_tool_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    assert sanitizer.main(["racecheck"]) == 1
    assert "there is no compute-sanitizer" in capsys.readouterr().err
