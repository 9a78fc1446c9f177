"""`python -m bench overhead`: what is timed as which part, what the bare loop leaves out, and the sums."""

import argparse
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import overhead as command
from bench.__main__ import main
from bench.overhead_run import EACH_STEP, WARM_UP, WATCHED, WATCHING, WRITING, Clock, Job, Measurement, bare, clocked
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.step_guard import StepGuard
from ssr_fast.engine.trainer import Trainer
from ssr_fast.engine.vote import Vote

SCENE = (64, 128)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "SCENE", SCENE)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_job(folder: Path, **changed) -> Job:
    values = {"steps": 8, "rounds": 1, "save_every": 3, "shares": 1, "spikes": False, "scene": SCENE}
    return Job(**{**values, **changed}, folder=str(folder))


def test_a_part_does_not_count_what_another_one_does_inside_of_it():
    clock = Clock()
    inner = clock.timed("optimiser", lambda: time.sleep(0.05))

    def work():
        time.sleep(0.02)
        inner()
        raise KeyError

    outer = clock.timed("log", work)
    started = time.perf_counter()
    with pytest.raises(KeyError):
        outer()
    elapsed = time.perf_counter() - started
    clock.next_step()
    clock.next_step()
    assert 0.02 <= clock.seconds["log"][0] and 0.05 <= clock.seconds["optimiser"][0]
    assert clock.seconds["log"][0] + clock.seconds["optimiser"][0] <= elapsed
    assert clock.seconds["log"][1] == clock.seconds["optimiser"][1] == clock.seconds["vote on a stop"][0] == 0


def test_what_runs_in_the_background_counts_only_there():
    clock = Clock()

    def spin():
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    work = clock.elsewhere(spin)
    work()
    assert clock.background == []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(clock.background) == 1 and clock.background[0] >= 0.02


def test_parts_are_of_one_training_and_the_bare_one_has_none(tmp_path, monkeypatch):
    """Both trainings of a pair, and the one whose parts are timed: what they call, and that all is as before."""
    calls: list[str] = []
    torch.optim.AdamW([torch.zeros(1)])  # the first one gives its class another step, which stays
    before = {place: getattr(*place) for place in {**clocked(Clock()), **bare()}}

    def counting(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments, **options):
            calls.append(f"{owner.__name__}.{name}")
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for place in ((CheckpointStore, "save"), (StepGuard, "_norm"), (StepGuard, "_put_back"), (Vote, "__call__")):
        counting(*place)
    measurement = Measurement(make_job(tmp_path / "run", shares=2, spikes=True), Ranks())
    measurement.train("without-0", bare(), None)
    assert calls == ["CheckpointStore.save"]  # the last one
    calls.clear()
    loop = measurement.train("with-0", {}, None)
    assert calls.count("CheckpointStore.save") == 3 and calls.count("StepGuard._norm") == 8
    assert len(loop.wall) == 8 and loop.wall == sorted(loop.wall) and loop.watch[-1] >= loop.watch[0] > 0
    folders = sorted(path.name for path in (tmp_path / "run" / "with-0" / "checkpoints").iterdir())
    assert folders == ["step-6", "step-8"]
    calls.clear()
    parts = measurement.parts()
    assert calls.count("CheckpointStore.save") == 8  # every step, as 8 steps have to hold some
    assert len(parts["steps"]) == 8 - 1 - WARM_UP
    for name, seconds in parts["each_step"].items():
        assert len(seconds) == 8 - 1 - WARM_UP, name
        if name != "guard: means over shares and ranks":
            assert all(value > 0 for value in seconds), name
    assert all(len(seconds) == 7 for seconds in parts["each_save"].values())
    assert set(parts["each_step"]) == {*EACH_STEP, WATCHED}
    monkeypatch.undo()
    assert {place: getattr(*place) for place in before} == before
    assert Trainer.save.__qualname__ == "Trainer.save"


def test_the_sums():
    each = {name: [0.0] * 5 for name in (*EACH_STEP, WATCHED)}
    each["guard: norm of the gradient"] = [0.002, 0.001, 0.9, 0.001, 0.001]  # the median counts
    each["optimiser"] = each["log"] = [0.05] * 5
    parts = {
        "steps": [0.1, 0.1, 0.1, 7.0, 0.1],
        "each_step": each,
        "step_cpu": 0.05,
        "watching": 0.0005,
        "each_save": {"save": [2.0, 0.04], WRITING: [0.08, 0.08]},
    }
    pairs = [
        {"with": 1.1, "without": 1.0, "with_cpu": 1.0, "without_cpu": 1.0},
        {"with": 1.0, "without": 1.0, "with_cpu": 1.02, "without_cpu": 1.0},
    ]
    job = make_job(Path("run"), save_every=4)
    row = command.evaluate(job, {"parts": parts, "pairs": pairs})
    percent = {part["part"]: part["percent"] for part in row["parts"]}
    assert row["step_ms"]["median"] == pytest.approx(100)
    assert percent["guard: norm of the gradient"] == pytest.approx(1.0) and percent["log"] == pytest.approx(50)
    assert percent[WATCHING] == pytest.approx(1.0)
    assert percent["save"] == pytest.approx(10) and percent[WRITING] == pytest.approx(40)
    assert row["share"] == pytest.approx(52) and row["first_save_extra_s"] == pytest.approx(1.96)
    assert row["pairs_percent"] == {"wall": pytest.approx([10, 0]), "cpu": pytest.approx([0, 2])}


def run(tmp_path: Path, *words: str) -> dict:
    file = tmp_path / "overhead.json"
    code = main(["overhead", "--quick", "--steps", "8", "--save-every", "3", "--json", str(file), *words])
    return {"code": code, **json.loads(file.read_text())}


def check(content: dict, printed: str) -> None:
    assert content["code"] == 0
    assert {"date", "device", "versions", "commit", "dirty", "method", "bound", "rows"} <= set(content)
    (row,) = content["rows"]
    assert row["steps"] == 8 and row["save_every"] == 3 and len(row["pairs"]) == 1 and row["step_ms"]["median"] > 0
    counted = [part["percent"] for part in row["parts"] if part["counted"]]
    assert row["share"] == pytest.approx(sum(counted)) and len(row["parts"]) == len(counted) + 2
    last = printed.strip().splitlines()[-1]
    assert re.fullmatch(r"\w+, \d process\(es\): guard and checkpoints: \d+\.\d % of a step \(bound 2 %\)", last)


def test_one_process(tmp_path, capfd):
    check(run(tmp_path, "--settings", "demo", "--world", "1"), capfd.readouterr().out)


@pytest.mark.slow
def test_two_processes(tmp_path, capfd):
    content = run(tmp_path, "--settings", "stress", "--world", "2")
    check(content, capfd.readouterr().out)
    parts = {part["part"]: part["ms"] for part in content["rows"][0]["parts"]}
    assert parts["guard: means over shares and ranks"] > 0 and parts["guard: buffers between shares"] > 0


def test_what_fails_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(command.SETTINGS, "demo", {"save_every": 3, "shares": 8, "spikes": False})
    content = run(tmp_path, "--settings", "demo", "--world", "1")
    error = capfd.readouterr().err
    assert content["code"] == 1 and error.startswith("demo, 1 process(es): ") and error.count("\n") == 1
    assert "--data.batch_size" in content["rows"][0]["error"]


def test_a_process_that_hangs_after_another_failed_is_ended(monkeypatch):
    monkeypatch.setattr(command, "GRACE_S", 0.2)
    programs = ("import time; time.sleep(600)", "raise SystemExit(3)")
    processes = [command.subprocess.Popen([command.sys.executable, "-c", text], text=True) for text in programs]
    assert command._end(processes) == [-9, 3]


def test_a_mistake_is_one_sentence(capsys):
    for words, hint in (
        (["--steps", "4"], "--steps must be at least 8 (it is 4)"),
        (["--world", "0"], "--world must be at least 1 (it is 0)"),
        (["--steps", "60"], "no save but the last with --save-every 65 (demo): give more steps"),
        (["--json", "file"], "ends in .json"),
    ):
        assert main(["overhead", *words]) == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1


def test_the_settings():
    options = argparse.Namespace(save_every=None)
    assert command._setting("demo", options)["save_every"] == 65  # the preset's own
    assert command._setting("stress", options) == {"save_every": 5, "shares": 2, "spikes": True}
    assert command._setting("stress", argparse.Namespace(save_every=7))["save_every"] == 7
