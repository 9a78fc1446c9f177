"""The short table: what it says of made-up documents, what is missing, and its size."""

import json
import os
import time

from bench import headlines
from bench.loader_run import Measured
from tests.bench import made_up


def everything():
    sanitizer = {"tool": "memcheck", "errors": 0, "findings": [], "verdict": "clean"}
    steps = [made_up.step_row("released", 150.0), made_up.step_row("graph", 60.0)]
    steps.append(made_up.step_row("compiled", None, status="error", error="RuntimeError: no"))
    sam = [made_up.sam_row("segment-anything fp32", 90.0), made_up.sam_row("segment-anything bf16 compiled", 30.0)]
    sam += [made_up.sam_row("ours flex bf16", 10.0, status="wrong"), made_up.sam_row("ours mask bf16", 15.0)]
    sam += [made_up.sam_row("ours low_rank bf16", 20.0)]
    loader = [made_up.loader_row("torchvision", 20.0), made_up.loader_row("DALI gpu", 0.0, reasons=["no DALI"])]
    loader[1].status = "skipped"
    begun = made_up.loader_row(
        "ours, raw store", 0.0, rounds=[Measured(rate, 1.0, 1.0, 4, 1.0) for rate in (30.0, 50.0)]
    )
    loader.append(begun)
    return {
        "kernels.align": made_up.align(),
        "tests": made_up.tests(["passed"] * 8 + ["failed", "error", "skipped"]),
        "sanitize-memcheck": made_up.document([made_up.kernel("a", "b", "triton", 1.0)], **sanitizer),
        "step-2-512": made_up.document(steps, complete=False),
        "sam": made_up.document(sam),
        "loader": made_up.document(loader),
    }


def test_the_figures_of_the_largest_case():
    lines = headlines.lines(everything())
    text = "\n".join(lines)
    assert lines[0] == (
        "NVIDIA H100 80GB HBM3, driver 570.1, torch 2.11.0, triton 3.6.0, cuda 13.0, commit abc123def456, 2027-01-02"
    )
    first = "align  B=8 crop=1024: triton 1000.0 (900.0..1200.0) us, graph 800.0 (720.0..960.0)"
    at = lines.index(first)
    assert lines[at + 1] == (
        "  eager 9.00x (10.00x), compile 2.00x (1.25x), liger 6.00x, liger 1 error; peak 3.0 MB (eager 90.0 MB)"
    )
    assert lines[at + 2].startswith("align  B=8 crop=1024: cuda WRONG 900.0 (810.0..1080.0) us")
    assert "B=2 crop=512" not in text


def test_every_other_result():
    text = "\n".join(headlines.lines(everything()))
    assert "tests: 8 passed, 1 failed, 1 error, 1 skipped of 11" in text and "skipped: 1 needs 2 GPUs" in text
    assert "failed: t.py::test_8" in text and "failed: t.py::test_9" in text
    assert "memcheck: clean, 1 cases ran" in text and "racecheck: no result" in text
    assert "step  MiT-B5, 2+2@512 (cut off: a part)" in text
    assert "  graph: 60.0 (54.0..72.0) ms, 2.50x, peak 4000.0 MB" in text
    assert "  compiled: error: RuntimeError: no" in text
    assert "sam  vit_b B=1: ours mask bf16 15.0 (13.5..18.0) ms a batch" in text  # the wrong one is not ours
    assert "stock fp32 6.00x, stock bf16 missing, compile 2.00x, transformers missing; peak 1000.0 MB" in text
    assert "  torchvision: 20.0 (18.0..20.0), 1.50x" in text and "  DALI gpu: no DALI" in text
    assert "  ours, raw store: 40.0 (30.0..50.0)\n" in text + "\n"
    assert "kernels.segloss: no result" in text


def test_what_is_missing_says_why():
    row = made_up.kernel("kernels.segloss", "c", "triton", None, status="skipped", reasons=["no Triton"])
    other = made_up.kernel("kernels.segloss", "c", "eager", 5.0)
    text = "\n".join(headlines.lines({"kernels.segloss": made_up.document([other, row])}))
    assert "kernels.segloss: no time of ours: no Triton" in text
    assert headlines.lines({}) == ["nothing was measured"]


def test_it_stays_short():
    documents = everything()
    rows = [made_up.step_row(f"row {k} {'long ' * 60}", 1.0) for k in range(100)]
    documents["step"] = made_up.document(rows)
    lines = headlines.lines(documents)
    assert len(lines) == headlines.LINES and max(map(len, lines)) <= headlines.WIDTH
    assert lines[-1].startswith("... ") and lines[-1].endswith(" more lines: see JSON")
    assert len(headlines.lines(everything())) <= 40


def test_only_documents_of_this_call_are_read(tmp_path):
    for name in ("h100/old", "h100/new", "other/list", "other/.sam.json.12"):
        path = tmp_path / (name if ".json." in name else f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text("[]" if "list" in name else json.dumps({"rows": []}))
    now = time.time()
    os.utime(tmp_path / "h100" / "old.json", (now - 100, now - 100))
    assert set(headlines.read(tmp_path, now - 50)) == {"new"}
    assert headlines.read(tmp_path / "absent", 0) == {}
