"""The benchmark harness: rows, verdicts, counters, floors, JSON; on the CPU, and the GPU's path with stand-ins."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.__main__ as command
from bench import document, harness, measure, plot, sanitize, tables
from bench.harness import Bench, Case, Inputs, Outputs, Pair, Provider, Row, Setting, Task, Work, by_autograd
from bench.kernels import align
from bench.measure import Peaks, Timing
from ssr_kernels.align import ALIGN

CPU = torch.device("cpu")
H100 = Peaks(3.0e12, 800e12)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def loss_of(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: (inputs.leaves["x"] ** 2 * inputs.constants["y"]).sum()


def exact(inputs: Inputs) -> Outputs:
    x, y = inputs.leaves["x"].detach().double(), inputs.constants["y"].double()
    return {"loss": (x**2 * y).sum(), "x": 2 * x * y}


def make(device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x, y = (torch.rand(8, 16, generator=generator) + 0.5 for _ in range(2))
    return Inputs({"x": x.requires_grad_()}, {"y": y})


CASE = Case("8 x 16", {"rows": 8}, torch.float32, make, exact, Work(3_000_000, 8), Work(1_500_000, 4))


def square(task: Task) -> Pair:
    return by_autograd(loss_of(task.inputs), task.inputs)


def spoiled(name: str, value: float) -> Callable[[Task], Pair]:
    """A provider whose output `name` has one element replaced."""

    def build(task: Task) -> Pair:
        pair = square(task)

        def both() -> Outputs:
            outputs = {key: output.clone() for key, output in pair.both().items()}
            outputs[name].view(-1)[0] = value
            return outputs

        return Pair(pair.forward, both)

    return build


def raising(task: Task) -> Pair:
    raise RuntimeError("no such kernel\nand a second line")


def a_bench(*providers: Provider) -> Bench:
    return Bench("fake", "a task for tests", lambda setting: [CASE], providers, lambda setting: [CASE])


def rows_of(*providers: Provider) -> dict[str, Row]:
    rows = harness.run(a_bench(*providers), Setting(CPU, quick=True), None, lambda case, rows: None)
    return {row.provider: row for row in rows}


def test_the_list_names_every_benchmark(capsys):
    assert command.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*(bench.name for bench in command.BENCHES), *command.COMMANDS]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["kernels.aling"], "no benchmark 'kernels.aling'; did you mean kernels.align?"),
        (["zzz"], "no benchmark 'zzz'; there is kernels.align, kernels.contrast"),
        (["--json", "kernels.align"], "--json takes a file that ends in .json"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, expected, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1


def test_align_on_a_cpu_end_to_end(tmp_path, capsys):
    path = tmp_path / "results" / "align.json"
    assert command.main(["kernels.align", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] and content["versions"]["python"] and content["device"]["kind"] == "cpu"
    assert content["peaks"] is None and content["quick"] and content["date"].endswith("+00:00")
    assert (content["commit"] is None) == (content["dirty"] is None)
    names = [provider.name for provider in align.PROVIDERS]
    cases = [case.name for case in align.cases(Setting(CPU, quick=True))]
    assert [(row["case"], row["provider"]) for row in content["rows"]] == [(c, n) for c in cases for n in names]
    for row in content["rows"]:
        assert row["status"] in ("ok", "skipped"), row
        if row["status"] == "skipped":
            assert row["reasons"] and row["both_us"] is None
            continue
        assert {"loss", "x1", "weight4", "bias4"} <= set(row["errors"]) == set(row["eager_errors"])
        assert 0 < max(row["errors"].values()) < harness.BOUNDS[torch.float32]
        assert row["both_us"]["p20"] <= row["both_us"]["median"] <= row["both_us"]["p80"]
        assert row["floor_us"] is None and row["peak_bytes"] is None and "floor" in row["notes"]
    saved = {row["provider"]: row["saved_bytes"] for row in content["rows"] if row["case"] == cases[0]}
    assert saved["eager"] > 0
    printed = capsys.readouterr().out
    for name in names:  # in the table, or below it with the reason
        assert f" {name} " in printed
    for reason in ALIGN.reasons("cuda"):
        assert f"cuda skipped: {reason}" in printed or "cuda skipped" in printed


def test_json_without_a_file_goes_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "BENCHES", (a_bench(Provider("eager", square)),))
    assert command.main(["--quick", "--device", "cpu", "--json"]) == 0
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == [Path("cpu/fake.json")]
    gpu = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    assert document.default_path("kernels.align", gpu) == tmp_path / "nvidia-h100-80gb-hbm3/kernels.align.json"


def test_the_commit_of_a_tree_without_git_comes_from_the_environment(monkeypatch):
    facts = {**document.environment(), "commit": None}
    monkeypatch.setattr(document, "environment", lambda: facts)
    setting = Setting(CPU)
    monkeypatch.delenv(document.COMMIT, raising=False)
    assert document.document([], setting, None)["commit"] is None
    monkeypatch.setenv(document.COMMIT, "abc123-dirty")
    content = document.document([], setting, None)
    assert (content["commit"], content["dirty"]) == ("abc123", True)


def test_a_right_provider_is_ok_and_eagers_error_stands_beside():
    rows = rows_of(Provider("eager", square), Provider("other", square))
    assert rows["other"].status == "ok" and not rows["other"].failed
    assert rows["other"].eager_errors == rows["eager"].errors


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3])
@pytest.mark.parametrize("name", ["loss", "x"])
def test_a_wrong_result_is_marked(name, value):
    row = rows_of(Provider("eager", square), Provider("bad", spoiled(name, value)))["bad"]
    assert row.status == "wrong" and row.failed
    assert not row.errors[name] <= harness.BOUNDS[torch.float32] and row.reasons[0].startswith(f"{name} is off by")


def test_a_missing_gradient_and_another_shape_are_wrong():
    def build(task: Task) -> Pair:
        return Pair(square(task).forward, lambda: {"loss": torch.zeros(3)})

    row = rows_of(Provider("bad", build))["bad"]
    assert row.status == "wrong" and row.errors == {"loss": math.inf, "x": math.inf}


def test_what_raises_and_what_is_wrong_fail_the_run_by_name(monkeypatch, tmp_path, capsys):
    def raises_late(task: Task) -> Pair:
        pair = square(task)
        calls = iter([pair.both])
        return Pair(pair.forward, lambda: next(calls)())

    def raising_reasons(task: Task) -> list[str]:
        raise KeyError("broken")

    providers = (
        Provider("eager", square),
        Provider("raises", raising),
        Provider("raises late", raises_late),
        Provider("raising reasons", square, raising_reasons),
        Provider("garbage", spoiled("x", math.nan)),
        Provider("absent", raising, lambda task: ["is [not] installed"]),
    )
    monkeypatch.setattr(command, "BENCHES", (a_bench(*providers),))
    path = tmp_path / "out.json"
    assert command.main(["--quick", "--device", "cpu", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert (
        "raises: RuntimeError: no such kernel\n" in printed.out and "absent skipped: is [not] installed" in printed.out
    )
    for name, status in {
        "raises": "error",
        "raises late": "error",
        "raising reasons": "error",
        "garbage": "wrong",
    }.items():
        assert f"fake 8 x 16: {name}: {status}\n" in printed.err
    assert "absent" not in printed.err and "eager" not in printed.err
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["garbage"]["errors"]["x"] == "inf" and rows["eager"]["both_us"]["median"] > 0


def test_saved_bytes_counts_each_storage_once_and_no_input():
    x = torch.rand(64, 32, requires_grad=True)
    y = torch.rand(64, 32)

    def forward() -> torch.Tensor:
        z = x * y  # keeps x and y: inputs
        e = z.exp()  # keeps its result: 64 x 32 x 4 bytes
        return (e.view(32, 64)[:4] * e.view(32, 64)[4:8]).sum()  # keeps two views of the same storage

    assert measure.saved_bytes(forward, [x, y]) == 64 * 32 * 4
    assert measure.saved_bytes(forward, [x]) == 2 * 64 * 32 * 4
    assert measure.saved_bytes(lambda: x.sum(), [x]) == 0


@pytest.mark.parametrize(("batch", "crop", "us"), [(2, 512, 28), (8, 512, 110), (2, 1024, 64), (16, 1024, 516)])
def test_the_floor_agrees_with_the_design(batch, crop, us):
    """The figures of kernels.md section 4, for 3.0 TB/s and 800 TFLOP/s."""
    shape = align.Shape.of_crop(batch, crop)
    found = align.floor(shape, 2).microseconds(H100)
    assert found == pytest.approx(us, rel=0.05)
    assert align.least(shape, 2).microseconds(H100) < found


def test_the_floor_of_one_point_counted_by_hand():
    shape = align.Shape(1, ((2, 3),), (64,), (4, 5))
    x, target, parameters = 6 * 64, 20 * 256, 256 * 64 + 256
    assert align.floor(shape, 2) == Work(2 * (4 * x + 3 * target + 4 * parameters) + 36 * 6, 8 * 6 * 256 * 64)
    assert align.least(shape, 2).bytes == 2 * (2 * x + target + 2 * parameters)
    assert Work(3_000_000, 8).microseconds(H100) == pytest.approx(1.0)
    assert Work(3, 800_000_000).microseconds(H100) == pytest.approx(1.0)


def test_the_exact_result_by_parts_is_the_definition():
    setting = Setting(CPU)
    for case in align.odd_cases(setting):
        inputs = case.make(CPU, 1)
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
        constants = {name: tensor.double() for name, tensor in inputs.constants.items()}
        doubled = Inputs(leaves, constants)
        whole = align._eager(Task(case, doubled, setting)).both()
        for name, part in case.exact(inputs).items():
            assert harness.relative_error(part, whole[name]) < 1e-12, (case.name, name)


def test_liger_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(align.importlib.util, "find_spec", lambda name: None)
    task = Task(CASE, make(CPU, 0), Setting(CPU))
    assert align._against_liger(task) == ["liger-kernel is not installed (pip install liger-kernel)"]


def stand_in_gpu(monkeypatch, replay: Callable[[Outputs], None]) -> None:
    """Replace the instruments that need a GPU; `replay` does what a graph's replay would to its outputs."""
    timing = Timing(10.0, 9.0, 11.0)
    monkeypatch.setattr(measure, "poison", lambda size, device: None)
    monkeypatch.setattr(measure, "peak_bytes", lambda work: 5)
    monkeypatch.setattr(measure, "launches", lambda work: (3, ""))
    monkeypatch.setattr(measure, "time_gpu", lambda work: work() and timing or timing)

    def capture(work: Callable[[], Outputs]) -> tuple[SimpleNamespace, Outputs]:
        outputs = {name: output.clone() for name, output in work().items()}
        return SimpleNamespace(replay=lambda: replay(outputs)), outputs

    monkeypatch.setattr(measure, "capture", capture)


def gpu_row(provider: Provider) -> Row:
    task = Task(CASE, make(CPU, 0), Setting(CPU))
    row = Row("fake", CASE.name, CASE.sizes, "torch.float32", provider.name)
    harness._guarded(row, lambda: harness._measure_gpu(row, provider, task, exact(task.inputs)))
    harness._enter_floor(row, CASE, H100)
    return row


def test_a_row_of_a_gpu_has_every_column(monkeypatch):
    inputs = make(CPU, 0)
    stand_in_gpu(monkeypatch, lambda outputs: [outputs[n].copy_(v) for n, v in exact(inputs).items()] and None)
    row = gpu_row(Provider("fast", square))
    assert row.status == "ok" and row.launches == 3 and row.peak_bytes == 5 and row.saved_bytes == 0
    assert row.floor_us == pytest.approx(1.0) and row.floor_percent == pytest.approx(10.0)
    assert row.least_us == pytest.approx(0.5) and None not in (row.forward_us, row.both_us, row.graph_us)
    row = gpu_row(Provider("uncapturable", square, graph_reasons=("it reads on the host",)))
    assert row.status == "ok" and row.graph_us is None and row.notes == {"graph": "it reads on the host"}
    assert row.floor_percent == pytest.approx(10.0)
    row = gpu_row(Provider("unhooked", square, hook_reasons=("it refuses hooks",)))
    assert row.saved_bytes is None and row.notes["saved bytes"] == "it refuses hooks"


def test_a_graph_that_writes_nothing_is_wrong(monkeypatch):
    stand_in_gpu(monkeypatch, lambda outputs: None)
    row = gpu_row(Provider("lazy", square))
    assert row.status == "wrong" and "in graph replay loss is off" in row.reasons[0]


def test_a_capture_that_raises_keeps_what_was_measured_before(monkeypatch):
    stand_in_gpu(monkeypatch, lambda outputs: None)
    monkeypatch.setattr(measure, "capture", lambda work: raising(None))
    row = gpu_row(Provider("syncs", square))
    assert row.status == "error" and row.error == "RuntimeError: no such kernel" and row.both_us


def a_timed_row(provider: str, us: float, case: str = "B=2 crop=1024") -> Row:
    timing = Timing(us, us, us)
    row = Row("kernels.align", case, {"crop": 1024}, "torch.bfloat16", provider, both_us=timing, forward_us=timing)
    row.graph_us, row.floor_us, row.saved_bytes, row.floor_percent = timing, 60.0, int(us), 6000 / us
    row.errors, row.eager_errors = {"loss": 1e-4, "x1": 6e-3}, {"loss": 1e-6, "x1": 3e-3}
    return row


def test_goals_are_judged_from_the_rows():
    case = next(case for case in align.cases(Setting(torch.device("cuda"))) if case.name == "B=2 crop=1024")
    rows = {name: a_timed_row(name, us) for name, us in {"eager": 1600, "torch.compile": 210, "cuda": 100}.items()}
    for provider in align.PROVIDERS:
        rows.setdefault(provider.name, Row("kernels.align", case.name, {}, "", provider.name, "skipped"))
    assert align.goals(case, rows) == [
        "cuda: 2.10x torch.compile, 2.10x in graph replay; goal 2x reached",
        "cuda: 16.00x eager, 16.00x in graph replay; goal 15x reached",
        "cuda: graph replay 1.67x the floor; goal 2x reached",
    ]
    rows["cuda"] = a_timed_row("cuda", 121)
    assert [line.split()[-1] for line in align.goals(case, rows)] == ["MISSED", "MISSED", "MISSED"]


def test_an_error_well_above_eagers_is_remarked_but_one_number_is_luck():
    assert tables.loose(a_timed_row("cuda", 1.0)) == {"x1": pytest.approx(2.0)}


def test_the_plot_writes_pngs(tmp_path, capsys):
    rows = [a_timed_row(name, us) for name, us in {"eager": 1600, "torch.compile": 210, "cuda": 100}.items()]
    content = document.document(rows, Setting(CPU), H100)
    document.write(tmp_path / "run.json", content)
    assert plot.main([str(tmp_path / "run.json"), "--out", str(tmp_path / "pictures")]) == 0
    pictures = {path.name: path for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {f"kernels.align-{kind}.png" for kind in ("speed", "floor", "saved")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())
    assert content["device"]["name"] in plot._title(content, "kernels.align")


def test_the_plot_says_what_it_cannot_draw_and_refuses_another_file(tmp_path, capsys):
    row = dataclasses.replace(a_timed_row("eager", 5.0), floor_percent=None, graph_us=None)
    document.write(tmp_path / "run.json", document.document([row], Setting(CPU), None))
    assert plot.main([str(tmp_path / "run.json"), "--out", str(tmp_path / "out")]) == 0
    assert "kernels.align-floor.png not drawn" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("[]")
    assert plot.main([str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2


def test_sanitize_checks_odd_sizes_of_what_it_is_given(capsys):
    assert sanitize.main(["reference"]) == 0
    printed = capsys.readouterr().out
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [case for bench in command.BENCHES for case in bench.odd_cases(setting)]
    assert printed.count(": reference: ok") == len(cases) and f"{len(cases)} ran, 0 failed" in printed
    assert sanitize.main(["kuda"]) == 2


def test_sanitize_fails_on_a_wrong_result_and_on_an_exception(capsys):
    for provider in (Provider("bad", spoiled("x", math.nan), ours=True), Provider("bad", raising, ours=True)):
        assert sanitize.main([], [a_bench(provider, Provider("absent", square, lambda task: ["no"], ours=True))]) == 1
        printed = capsys.readouterr().out
        assert "absent: skipped: no" in printed and "1 ran, 1 failed" in printed
    assert sanitize.main([], [a_bench(Provider("absent", square, lambda task: ["no"], ours=True))]) == 1
