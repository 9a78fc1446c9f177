"""`python -m bench step`: rows, verdicts, JSON, picture; at a minimal size on the CPU."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import step as command
from bench import stepping, variants
from bench.__main__ import main
from bench.harness import Setting
from bench.measure import Timing
from bench.peaks import Peak, find_peak
from bench.stepping import Comparison, Row
from bench.variants import AUTOCAST, BFLOAT16, GRAPH, ONE_PASS, RELEASED, VARIANTS
from bench.workload import demo_workload
from ssr_fast.methods.method import Method

SOME = [RELEASED, "stochastic depth drawn at once", ONE_PASS, BFLOAT16, GRAPH]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(command.SIZES, "demo", partial(demo_workload, 1, 64, 64))
    monkeypatch.setattr("bench.workload.SCENES", 2)
    yield
    torch.set_num_threads(threads)


def run(*words):
    return main(["step", "--device", "cpu", "--quick", *words])


def test_rows_json_and_picture(tmp_path, capsys):
    file, picture = tmp_path / "out" / "step.json", tmp_path / "step.png"
    assert run("--rows", *SOME, "--json", str(file), "--picture", str(picture)) == 0
    content = json.loads(file.read_text())
    assert {"date", "device", "versions", "commit", "dirty", "method", "peaks", "flops", "rows"} <= set(content)
    assert content["peaks"] is None and content["method"]["mfu"] and content["device"]["kind"] == "cpu"
    assert list(content["flops"]) == ["demo, 1+1@64x64"] and content["flops"]["demo, 1+1@64x64"] > 1e6
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == SOME and rows[GRAPH]["status"] == "skipped" and rows[GRAPH]["reasons"] == [variants.GPU_ONLY]
    for name in SOME[:-1]:
        row = rows[name]
        assert row["status"] == "ok" and row["step_us"]["median"] > 0 and row["samples"] >= 2, row
        assert row["images_per_second"] == pytest.approx(2e6 / row["step_us"]["median"])
        assert row["mfu"] is None and row["peak_bytes"] > 1e5 and row["loss_error"] <= row["bound"]
        assert row["losses"][0]["loss"] > 0.5
    assert rows[RELEASED]["speedup"] == 1.0
    assert rows[BFLOAT16]["bound"] == 2e-2 and rows[ONE_PASS]["bound"] == 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{GRAPH} skipped: timed on a GPU only" in printed and "MFU: no peak of" in printed


def test_a_wrong_row_and_one_that_raises_are_noticed(monkeypatch, capsys):
    right = Method.cross_entropy
    monkeypatch.setattr(Method, "cross_entropy", lambda *arguments: 1.0001 * right(*arguments))
    assert run("--rows", RELEASED, ONE_PASS) == 1
    printed = capsys.readouterr()
    assert f"{ONE_PASS}: wrong: a loss is off by 1.0e-04" in printed.err
    assert printed.err.count("\n") == 1  # the released loop has losses of its own
    assert "WRONG" in printed.out

    def raising(*arguments, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(VARIANTS, ONE_PASS, variants.Variant(raising))
    assert run("--rows", ONE_PASS) == 1
    assert f"{ONE_PASS}: error: RuntimeError: no such kernel\n" in capsys.readouterr().err


def test_a_mistake_is_one_sentence(capsys):
    for words, hint in (
        (["--rows", "released lop"], "did you mean 'released loop'?"),
        (["--size", "3@7"], "there is no size '3@7'"),
        (["--json", "file"], "ends in .json"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1


def test_a_row_that_did_not_do_what_it_is_named_after_is_an_error():
    variant = variants.Variant(variants.ours, said="replay a CUDA graph")
    comparison = Comparison(demo_workload(1, 64, 64), [ONE_PASS], Setting(CPU, True), None)
    row = comparison.rows[ONE_PASS]
    row.notes.append("no CUDA graph: out of luck")
    comparison._ready(row, variant)
    assert row.failed and row.reasons == ["no CUDA graph: out of luck"]


def test_rates_of_a_device_with_a_known_peak():
    comparison = Comparison(demo_workload(1, 64, 64), [ONE_PASS, BFLOAT16], Setting(CPU, True), Peak(4e12, 2e12, 1e12))
    comparison.flops = 5 * 10**9
    for row in comparison.rows.values():
        row.step_us = Timing(10_000.0, 9_000.0, 11_000.0)
        comparison._enter_rates(row)
        assert row.images_per_second == pytest.approx(200) and row.speedup is None
    assert comparison.rows[ONE_PASS].mfu == pytest.approx(50) and comparison.rows[BFLOAT16].mfu == pytest.approx(12.5)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_known_peaks(name, bf16):
    assert find_peak(name).bf16 == bf16


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA L40", "AMD EPYC"])
def test_unknown_peaks(name):
    assert find_peak(name) is None


def test_a_loss_that_is_not_finite_is_wrong():
    row = Row("size", "name", "fp32", losses=[{"loss": float("nan"), "loss/source": 1.0, "loss/mixed": 1.0}])
    stepping.judge(row, [{"loss": 1.0, "loss/source": 1.0, "loss/mixed": 1.0}], 1e-5)
    assert row.failed


def test_the_path_of_a_gpu_with_stand_ins(monkeypatch):
    """Rows are judged with TF32 off, timed with it, and one row's nets are gone before the next."""
    moments, seen = iter(range(1000)), []
    monkeypatch.setattr(stepping, "_event", lambda: SimpleNamespace(at=next(moments), elapsed_time=elapsed))
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 7)

    def elapsed(last):
        return 20.0

    def loop(*arguments):
        step = variants.released_loop(*arguments)

        def watched(batch, number):
            seen.append(torch.backends.cudnn.allow_tf32)
            return step(batch, number)

        return watched

    comparison = Comparison(demo_workload(1, 64, 64), [RELEASED, AUTOCAST], Setting(CPU, True), Peak(4e12, 2e12, 1e12))
    comparison.on_gpu = True
    comparison.rows = {name: Row("size", name, stepping.precision_of(VARIANTS[name], True)) for name in comparison.rows}
    monkeypatch.setitem(VARIANTS, RELEASED, variants.Variant(loop))
    rows = comparison.run()
    assert [row.precision for row in rows] == ["tf32", "bf16"]
    for row in rows:
        assert row.status == "ok" and row.step_us.median == pytest.approx(20_000) and row.peak_bytes == 7, row
        assert row.mfu == pytest.approx(100 * comparison.flops / 0.02 / (2e12 if row.precision == "tf32" else 4e12))
    assert seen[:2] == [False, False] and all(seen[2:]) and len(seen) == 2 + stepping.WARM_UP + rows[0].samples


def test_a_row_without_memory_is_skipped(monkeypatch):
    def large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setitem(VARIANTS, ONE_PASS, variants.Variant(large))
    (row,) = Comparison(demo_workload(1, 64, 64), [ONE_PASS], Setting(CPU, True), None).run()
    assert row.status == "skipped" and "3 TiB" in row.reasons[0]
