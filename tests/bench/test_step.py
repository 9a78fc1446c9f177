"""`python -m bench step`: rows, verdicts, JSON, picture; at a minimal size on the CPU."""

import copy
import dataclasses
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from bench import step_picture, stepping, variants
from bench.__main__ import main
from bench.harness import Setting
from bench.measure import Timing
from bench.peaks import Peak, find_peak
from bench.stepping import Comparison, Row
from bench.variants import AUTOCAST, BFLOAT16, GRAPH, ONE_PASS, RELEASED, TRANSFORMERS, VARIANTS
from bench.workload import STEPS, Workload, decided, demo_workload, full_workload
from ssr_fast.methods.method import Method
from ssr_fast.models.segmentor import Segmentor

SOME = [RELEASED, "stochastic depth drawn at once", ONE_PASS, BFLOAT16, GRAPH]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("small_demo")


def run(*words):
    return main(["step", "--device", "cpu", "--quick", *words])


def test_our_rows_are_deterministic_where_a_run_is(monkeypatch):
    wanted = []

    def prepare(asked, device):
        wanted.append((asked, device.type))
        return asked

    monkeypatch.setattr(variants, "prepare_deterministic", prepare)
    monkeypatch.setattr(variants, "on_cuda", lambda step, device, report: step)
    workload = demo_workload(1, 32, 64)
    for name, expected in ((GRAPH, True), (f"{GRAPH}, not deterministic", False), (ONE_PASS, True)):
        step = VARIANTS[name].build(workload.method(torch.device("cpu")), workload.optim, 10, print)
        assert step.deterministic is expected
    assert wanted == [(True, "cpu"), (False, "cpu"), (True, "cpu")]


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


def test_one_picture_of_several_documents(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(step_picture, "draw", lambda path, content: drawn.append(content))
    for name, device in (("a", "H100"), ("b", "H100"), ("c", "H200")):
        rows = [{"size": name, "name": RELEASED}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": {"name": device}, "date": name, "rows": rows}))
    files = [str(tmp_path / f"{name}.json") for name in "abc"]
    assert step_picture.main([*files[:2], "--out", str(tmp_path / "all.png")]) == 0
    assert [row["size"] for row in drawn[0]["rows"]] == ["a", "b"] and drawn[0]["date"] == "b"
    assert step_picture.main([*files, "--out", str(tmp_path / "all.png")]) == 2 and len(drawn) == 1
    assert "several devices (H100, H200)" in capsys.readouterr().err


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
        (["--minutes", "0"], "--minutes takes a number above 0"),
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
    stand_in(monkeypatch)

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


def stand_in(monkeypatch, allocated=7):
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *device: allocated)


class OutOfMemory(torch.autograd.Function):
    """Has none in the backward pass, where the autograd engine carries the exception."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")


@pytest.mark.parametrize("moment", ["build", "forward", "backward", "timed"])
@pytest.mark.parametrize("base", [RELEASED, TRANSFORMERS, ONE_PASS, BFLOAT16])
def test_nothing_of_a_row_without_memory_is_left_for_the_next(base, moment, monkeypatch):
    """Exceptions keep frames, frames keep nets: all of them must be gone when the next row begins."""
    if base == TRANSFORMERS:
        pytest.importorskip("transformers")
    stand_in(monkeypatch)
    monkeypatch.setattr(stepping, "_event", lambda: SimpleNamespace(elapsed_time=lambda last: 20.0))
    kept, right = [], VARIANTS[base].build

    def failing(method, optim, steps, report):
        step = right(method, optim, steps, report)
        kept.extend(weakref.ref(one) for one in (method, step, *method.modules(), *method.parameters()))
        if moment == "build":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

        def fail(module, inputs, output):
            if moment == "forward" and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
            if moment == "backward" and torch.is_grad_enabled():
                return dataclasses.replace(output, logits=OutOfMemory.apply(output.logits))
            return None

        for module in method.modules():
            if isinstance(module, Segmentor):
                module.register_forward_hook(fail)

        def late(batch, number):
            if moment == "timed" and number >= 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
            return step(batch, number)

        return late

    def next_row(method, optim, steps, report):
        assert len(kept) > 100 and not [one for one in kept if one() is not None]
        return variants.ours(method, optim, steps, report)

    monkeypatch.setitem(VARIANTS, base, dataclasses.replace(VARIANTS[base], build=failing))
    monkeypatch.setitem(VARIANTS, "next", variants.Variant(next_row))
    comparison = Comparison(demo_workload(1, 64, 64), [base, "next"], Setting(CPU, True), None)
    monkeypatch.setattr(comparison, "expected", losses_of(comparison))
    comparison.on_gpu = True
    failed, after = comparison.run()
    assert failed.status == "skipped" and "3 TiB" in failed.reasons[0], failed
    assert after.status == "ok" and after.notes == [], after


def losses_of(comparison):
    step = variants.ours(comparison.workload.method(CPU), comparison.workload.optim, STEPS, print)
    return comparison._losses(step, 2)


def test_what_an_earlier_row_has_left_is_told(monkeypatch):
    stand_in(monkeypatch, allocated=10**9)
    monkeypatch.setattr(stepping, "_event", lambda: SimpleNamespace(elapsed_time=lambda last: 20.0))
    comparison = Comparison(demo_workload(1, 64, 64), [ONE_PASS], Setting(CPU, True), None)
    comparison.on_gpu = True
    (row,) = comparison.run()
    assert row.status == "ok" and "1000 MB of an earlier row were still allocated" in row.notes[0]


def test_what_was_measured_before_a_cut_is_in_the_file(tmp_path, monkeypatch):
    """As when a machine's time is over: the rows before it are there, and no half-written file."""
    file, seen = tmp_path / "step.json", []

    def cut(*arguments):
        seen.append(json.loads(file.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setitem(VARIANTS, BFLOAT16, variants.Variant(cut))
    with pytest.raises(KeyboardInterrupt):
        run("--rows", RELEASED, GRAPH, ONE_PASS, BFLOAT16, "--json", str(file))
    content = json.loads(file.read_text())
    assert seen == [content] and content["complete"] is False
    assert [row["name"] for row in content["rows"]] == [RELEASED, GRAPH, ONE_PASS]
    assert content["rows"][2]["loss_error"] <= 1e-5 and content["rows"][2]["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_rows_that_would_begin_too_late_are_skipped(tmp_path, capsys):
    file = tmp_path / "step.json"
    assert run("--rows", RELEASED, ONE_PASS, "--minutes", "1e-9", "--json", str(file)) == 0
    content = json.loads(file.read_text())
    assert content["complete"] is True and content["flops"] == {}
    assert {row["status"] for row in content["rows"]} == {"skipped"}
    assert content["rows"][0]["reasons"] == ["the time that --minutes gives was over"]
    assert run("--rows", ONE_PASS, "--minutes", "100") == 0
    assert f"{ONE_PASS}: ok" in capsys.readouterr().out


def test_the_released_loop_is_run_once_for_all_rows_and_as_long_as_they_need(monkeypatch):
    taken, right = [], variants.LOOP[RELEASED].build

    def counted(*arguments):
        step = right(*arguments)

        def one(batch, number):
            taken.append(number)
            return step(batch, number)

        return one

    monkeypatch.setattr(stepping, "reference_of", lambda sam: counted)
    Comparison(demo_workload(1, 64, 64), [ONE_PASS, BFLOAT16, GRAPH], Setting(CPU, True), None).run()
    assert taken == [0, 1]  # GRAPH, which is judged by more, does not run here


def test_rows_do_without_flops_that_cannot_be_counted(monkeypatch):
    def failing(self, device):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(Workload, "flops", failing)
    comparison = Comparison(demo_workload(1, 64, 64), [ONE_PASS, BFLOAT16], Setting(CPU, True), Peak(4e12, 2e12, 1e12))
    first, second = comparison.run()
    assert first.status == second.status == "ok" and first.step_us and first.mfu is None and second.notes == []
    assert first.notes == ["no MFU: counting the FLOPs of a step failed: RuntimeError: no such operator"]


def test_rows_that_are_compiled_come_last():
    for names in (list(VARIANTS), list(variants.ssr_variants("small"))):
        compiled = [number for number, name in enumerate(names) if variants.COMPILED in name]
        assert compiled == [len(names) - 2, len(names) - 1] and names[0] == RELEASED
        assert names[-1] == variants.COMPILED_GRAPH


def test_logits_of_the_full_workload_are_as_wide_as_trained_ones():
    """Else the losses are the logarithm of 19 whatever the backbone does, and no verdict tells anything."""
    student = full_workload(1, 64).student.train()
    logits = student(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).logits.detach()
    assert 0.5 < float(logits.std()) < 5
    fresh = demo_workload(1, 64, 64).student.eval()
    wide, images = decided(copy.deepcopy(fresh)), torch.ones(1, 3, 64, 64)
    torch.testing.assert_close(wide(images).logits, 10 * fresh(images).logits)


def test_a_row_without_memory_is_skipped(monkeypatch):
    def large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setitem(VARIANTS, ONE_PASS, variants.Variant(large))
    (row,) = Comparison(demo_workload(1, 64, 64), [ONE_PASS], Setting(CPU, True), None).run()
    assert row.status == "skipped" and "3 TiB" in row.reasons[0]
