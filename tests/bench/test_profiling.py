"""`python -m bench profile`: on a CPU, and what it makes of a GPU's trace."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity

from bench import profiling, variants
from bench.__main__ import main
from bench.profiling import Found, ProfileError, found_in
from bench.variants import BFLOAT16, GRAPH, ONE_PASS, VARIANTS
from tests.bench.test_kernel_times import replays

pytestmark = pytest.mark.usefixtures("small_demo")


def run(*words):
    return main(["profile", "--device", "cpu", "--steps", "2", *words])


def test_the_operators_of_a_cpu(tmp_path, capsys):
    file = tmp_path / "out" / "profile.json"
    assert run("--row", BFLOAT16, "--json", str(file)) == 0
    content = json.loads(file.read_text())
    assert {"date", "device", "versions", "commit", "dirty", "method"} <= set(content)
    assert content["row"] == BFLOAT16 and content["size"] == "demo, 1+1@64x64" and content["steps"] == 2
    assert content["busy_ms"] is None and content["idle_percent"] is None and profiling.NO_IDLE in content["notes"]
    assert len(content["largest"]) == profiling.LARGEST and content["wall_ms"] > 0
    times = [one["ms"] for one in content["largest"]]
    assert times == sorted(times, reverse=True)
    products = next(one for one in content["kinds"] if one["kind"] == "matrix products")
    assert products["calls"] > 20 and sum(one["percent"] for one in content["kinds"]) == pytest.approx(100)
    assert sum(one["ms"] for one in content["kinds"]) < 1.05 * content["profiled_ms"]  # each operator's own time
    printed = capsys.readouterr().out
    assert "idle share: on a CPU" in printed and f"{BFLOAT16}, demo, 1+1@64x64" in printed


def test_the_last_row_that_runs_here_and_sam(capsys):
    assert run("--sam", "small") == 0
    assert f"{BFLOAT16}, demo, 1+1@64x64, SAM small online" in capsys.readouterr().out


def test_a_mistake_is_one_sentence(capsys):
    for words, hint in (
        (["--row", "bf61"], "did you mean 'bf16'?"),
        (["--size", "3@7"], "there is no size '3@7'"),
        (["--sam", "vit_x"], "there is no encoder 'vit_x'; did you mean 'vit_"),
        (["--row", GRAPH], "does not run here: timed on a GPU only"),
        (["--sam", "small", "--row", "attention without maps"], "there is no row 'attention without maps'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--json", "file"], "ends in .json"),
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1, error


def test_a_row_that_did_not_do_what_it_is_named_after_has_no_profile(monkeypatch, capsys):
    def told(method, optim, steps, report):
        report("no CUDA graph: out of luck")
        return variants.ours(method, optim, steps, report)

    monkeypatch.setitem(VARIANTS, ONE_PASS, variants.Variant(told, said="replay a CUDA graph"))
    assert run("--row", ONE_PASS) == 1
    assert f"{ONE_PASS}: no CUDA graph: out of luck" in capsys.readouterr().err


def test_what_a_trace_says():
    found = found_in(replays(3), 3, wall_ms=0.025)
    assert found.busy_ms == pytest.approx(0.020) and found.profiled_ms == pytest.approx(0.070 / 3)
    assert found.idle() == (pytest.approx(100 * (1 - 60 / 70)), pytest.approx(20))
    assert found.notes == []
    odd = found_in(replays(3), 2, wall_ms=0.025)
    assert "calls of gelu_forward, Memcpy DtoD (Device -> Device) are no multiple of the steps" in odd.notes[0]
    entries = profiling.as_entries(found, "size", "row", 3)
    assert entries["calls"] == 4 and entries["idle_percent"]["without_profiler"] == pytest.approx(20)
    assert json.loads(json.dumps(entries, allow_nan=False))["largest"][0]["short"] == "gemm"


def test_a_trace_without_kernels_is_no_profile():
    without = [event for event in replays()["traceEvents"] if event.get("cat") != "kernel"]
    with pytest.raises(ProfileError, match="recorded no kernel"):
        found_in({"traceEvents": without}, 3, 1.0)


def test_a_trace_has_the_wanted_steps_alone(monkeypatch):
    """The profiler's schedule, on a CPU's activities."""
    taken, waits = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(taken)))

    def step():
        taken.append(None)
        with torch.profiler.record_function(f"step number {len(taken)}"):
            torch.ones(3).exp()

    trace = profiling._trace(step, 3, ProfilerActivity.CPU)
    names = [event["name"] for event in trace["traceEvents"] if str(event.get("name", "")).startswith("step number")]
    first = profiling.DISCARDED + 1
    assert sorted(set(names)) == [f"step number {number}" for number in range(first, first + 3)]
    assert waits[:2] == [profiling.DISCARDED, profiling.DISCARDED + 3] and len(taken) == waits[1]
    with pytest.raises(ProfileError, match="recorded no kernel"):
        found_in(trace, 3, 1.0)


def test_the_idle_share_of_a_cpu_is_left_out():
    assert Found(1.0, 1.0, None, [], []).idle() is None
