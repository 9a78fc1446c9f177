"""A benchmark that is cut off leaves a valid document, marked as a part; a lost device and little time end it early."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import document, harness, loader, needs, sam
from bench.device import DeviceLost, check_device
from bench.harness import Bench, Case, Inputs, Pair, Provider, Task, Work, by_autograd

CPU = torch.device("cpu")


def cases(setting):
    def make(device, seed):
        return Inputs({"x": torch.ones(3, device=device, requires_grad=True)}, {})

    def exact(inputs):
        return {"loss": torch.tensor(3.0, dtype=torch.float64), "x": torch.full((3,), 2.0, dtype=torch.float64)}

    return [Case(name, {}, torch.float32, make, exact, Work(1, 1), Work(1, 1)) for name in ("small", "middle", "large")]


def square(task: Task) -> Pair:
    return by_autograd(lambda: (task.inputs.leaves["x"] ** 2).sum(), task.inputs)


def fake(name="fake", *providers):
    return Bench(name, "", cases, providers or (Provider("eager", square),), cases)


def test_a_killed_run_leaves_what_it_had(tmp_path):
    file = tmp_path / "out.json"
    words = ["-m", "bench", "kernels.segloss", "kernels.contrast", "--quick", "--device", "cpu", "--json", str(file)]
    path = os.pathsep.join(map(str, needs.SOURCES))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = json.loads(file.read_text())
    assert (
        not content["complete"]
        and content["device"]
        and {row["bench"] for row in content["rows"]} == {"kernels.segloss"}
    )
    assert len(content["missing"]) == 1 and content["missing"][0].startswith("kernels.contrast ")


def test_a_document_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    document.write(path, {"old": 1})
    assert not list(path.parent.glob(".*"))
    with pytest.raises(ValueError):
        document.write(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}

    def full(self, *_, **__):
        Path.open(self, "w").write("{")
        raise OSError("no space left")

    def stopped(self, target):
        raise KeyboardInterrupt  # the process ends between writing and replacing

    for name, broken, raised in (("write_text", full, OSError), ("replace", stopped, KeyboardInterrupt)):
        monkeypatch.setattr(Path, name, broken)
        with pytest.raises(raised):
            document.write(path, {"new": 2})
        monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1} and not list(path.parent.glob(".*"))


def states(monkeypatch, tmp_path):
    """What stands in each file after each write."""
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    seen = []

    def write(path, content, really=document.write):
        really(path, content)
        seen.append((path.name, content["complete"], content.get("missing"), len(content["rows"])))

    monkeypatch.setattr(document, "write", write)
    return seen


def test_each_case_is_written_to_the_file_of_its_benchmark(monkeypatch, tmp_path):
    seen = states(monkeypatch, tmp_path)
    monkeypatch.setattr(command, "BENCHES", (fake("a"), fake("b")))
    assert command.main(["--quick", "--device", "cpu", "--json"]) == 0
    left = [["small", "middle", "large"][count:] for count in (1, 2, 3)]
    assert seen == [
        (f"{name}.json", not names, [f"{name} {one}" for one in names], 3 - len(names))
        for name in ("a", "b")
        for names in left
    ]


def test_without_time_the_rest_is_left_out_by_name(monkeypatch, tmp_path, capsys):
    seen = states(monkeypatch, tmp_path)
    monkeypatch.setattr(command, "BENCHES", (fake(),))
    assert command.main(["--quick", "--device", "cpu", "--json", "--minutes", "0"]) == 0
    assert seen == [("fake.json", False, ["fake middle", "fake large"], 1)]
    assert "not to be done within 0 minutes: fake middle; fake large" in capsys.readouterr().out


def test_a_lost_device_ends_the_run_and_fails(monkeypatch, tmp_path, capsys):
    seen = states(monkeypatch, tmp_path)
    asked = []

    def check(device):
        asked.append(device)
        if len(asked) == 2:
            raise DeviceLost("an illegal memory access was encountered")

    monkeypatch.setattr(harness, "check_device", check)
    monkeypatch.setattr(command, "BENCHES", (fake("a"), fake("b")))
    assert command.main(["--quick", "--device", "cpu", "--json"]) == 1
    assert [one[1:] for one in seen] == [(False, ["a middle", "a large"], 1), (False, ["a large"], 2)]
    assert "a: the device does not answer any more" in capsys.readouterr().err


def test_check_device(monkeypatch):
    check_device(CPU)

    def synchronize(device):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLost, match="^CUDA error: misaligned address$"):
        check_device(torch.device("cuda"))


def test_providers_behind_the_one_that_breaks_the_context_are_not_blamed(monkeypatch):
    lost = []

    def measure_gpu(row, provider, task, exact):
        if provider.name == "breaks":
            lost.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness, "_measure_gpu", measure_gpu)
    monkeypatch.setattr(harness, "is_lost", lambda device: bool(lost))
    names = ("torch.compile", "eager", "breaks", "behind")
    bench = fake("a", *(Provider(name, square) for name in names))

    @dataclass
    class Cuda:
        type: str = "cuda"

    inputs = Inputs({"x": torch.ones(3, requires_grad=True)}, {})
    case = replace(cases(None)[0], make=lambda device, seed: inputs)
    seen = []
    rows = harness.run_case(bench, case, harness.Setting(Cuda()), None, 0, lambda rows: seen.append(len(rows)))
    assert {row.provider: row.status for row in rows} == dict(
        zip(names, ("skipped", "ok", "error", "skipped"), strict=True)  # what compiles comes last
    )
    assert [row.provider for row in rows] == list(names) and seen == [1, 2, 3, 4]
    assert rows[3].reasons == rows[0].reasons == ["breaks broke the device's context"]


def test_on_a_gpu_each_row_is_written(monkeypatch, tmp_path):
    seen = states(monkeypatch, tmp_path)
    bench, setting = fake(), harness.Setting(CPU)
    record = command.Record("", [bench], setting, None)
    case, rows = cases(None)[0], harness.run_case(bench, cases(None)[0], harness.Setting(CPU, True), None, 0)
    record.write("fake", case, rows)
    record.add("fake", case, rows)
    assert seen == [
        ("fake.json", False, ["fake small", "fake middle", "fake large"], 1),
        ("fake.json", False, ["fake middle", "fake large"], 1),
    ]


def test_sam_writes_each_row(monkeypatch, tmp_path):
    seen = states(monkeypatch, tmp_path)
    few = sam.providers(torch.float32)[:1] + [one for one in sam.providers(torch.float32) if "transformers" in one.name]
    monkeypatch.setattr(sam, "providers", lambda dtype: few)
    assert command.main(["sam", "--quick", "--device", "cpu", "--json"]) == 0
    assert seen == [("sam.json", False, ["small B=1"], 1), ("sam.json", True, [], 2)]


@dataclass
class Options:
    device: str = "cpu"
    images: int = 1
    rounds: int = 2
    seconds: float = 0.1
    workers: int = 1
    rows: list = field(default_factory=list)


def test_the_loader_saves_behind_each_row(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "write_sets", lambda *_: {})
    monkeypatch.setattr(loader, "MAKERS", dict.fromkeys(loader.MAKERS, lambda folder, workload: (folder, folder)))
    monkeypatch.setattr(loader, "indices", lambda *_: None)
    monkeypatch.setattr(loader, "data_config", lambda *_: None)

    def run_round(row, job, folder):
        if row.name == names[1] and row.rounds:
            row.status, row.error = "error", "gone"
        else:
            row.rounds.append(loader.Measured(10.0, 1.0, 1.0, 4, 1.0))

    monkeypatch.setattr(loader, "_run_round", run_round)
    names = [provider.name for provider in loader.PROVIDERS if not provider.reasons(CPU)][:2]
    rows = [loader.Row(name, "") for name in names]
    saved = []

    def save(facts, complete):
        saved.append((complete, [len(row.rounds) for row in rows], [bool(row.spreads) for row in rows]))

    screen = loader.tables.console()
    loader.run(rows, loader.full_workload(), Options(), tmp_path, screen, save)
    assert saved == [
        (False, [1, 0], [False, False]),
        (False, [1, 1], [False, False]),
        (False, [1, 1], [True, True]),
        (False, [1, 1], [True, True]),  # backwards: the second row fails
        (False, [2, 1], [True, True]),
        (True, [2, 1], [True, False]),
    ]
