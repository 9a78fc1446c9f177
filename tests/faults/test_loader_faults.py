"""Loader processes killed in training: one sentence, exit code 2, every finished step saved, resumed bit for bit."""

import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest

from ssr_fast.data.torch_loader import StepDataset
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.evaluator import Evaluator
from ssr_fast.train import main
from tests.faults.test_resume import check_equal, no_report, rows, stage_rows  # noqa: F401 a fixture
from tests.methods.run_support import TINY, children, start

WORKERS = ["--data.workers=2"]
LONGER = [*TINY, "--run.steps=40", "--run.evaluate_every=20", "--run.save_every=15"]
SENTENCE = r"error: (a loader process|2 loader processes)[^\n]*SIG[^\n]*after step (\d+)[^\n]*--resume [^\n]*\n"


pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


def workers():
    return [process for process in multiprocessing.active_children() if "Process-" in process.name]


def kill_all(number=signal.SIGKILL):
    for process in workers():
        os.kill(process.pid, number)


def test_workers_killed_in_the_midst_of_a_step_lose_nothing(tmp_path, monkeypatch):
    """The step that is under way when they die is finished, saved, and not done again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--run.dir", str(whole)]) == 0
    at = random.Random().choice([0, 1, 3, 4, 6])  # the steps 3 and 6 are saved anyway
    print("killed in step", at)
    train_step, steps = Trainer.train_step, []

    def struck(self, batch, step):
        steps.append(step)
        if len(steps) == at + 1:
            kill_all()
            time.sleep(0.3)  # PyTorch's handler would raise here, before the optimiser's step
        return train_step(self, batch, step)

    monkeypatch.setattr(Trainer, "train_step", struck)
    with pytest.raises(UserError) as caught:
        main([*TINY, *WORKERS, "--run.dir", str(parts)])
    sentence = str(caught.value)
    assert "SIGKILL" in sentence and "probably for want of memory" in sentence and "\n" not in sentence
    assert f"saved after step {at + 1}: " in sentence and f"--resume {parts}" in sentence and not workers()
    assert main(["--resume", str(parts)]) == 0
    assert steps == list(range(8))
    check_equal(parts, whole)


def test_a_worker_killed_while_the_run_evaluates(tmp_path, monkeypatch):
    scores = Evaluator.scores

    def struck(self, *arguments):
        kill_all(signal.SIGBUS)
        time.sleep(0.3)
        return scores(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "scores", struck)
        with pytest.raises(UserError, match=r"SIGBUS.*/dev/shm is full.*saved after step 4"):
            main([*TINY, *WORKERS, "--run.evaluate_every=4", "--run.dir", str(tmp_path / "run")])
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/miou" in row] == [4]


@pytest.mark.slow
def test_workers_that_die_before_the_first_batch(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--run.dir", str(whole)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(StepDataset, "__getitem__", lambda self, step: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=rf"no step was done yet: .* start again with --resume {parts}$"):
            main([*TINY, *WORKERS, "--run.dir", str(parts)])
    assert CheckpointStore(parts / "checkpoints").latest() is None
    train_step = Trainer.train_step

    def stopped(self, batch, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopped)
        assert main(["--resume", str(parts)]) == 3
    kept = sorted((parts / "checkpoints").iterdir()), (parts / "checkpoints" / "step-5").stat().st_ino
    with monkeypatch.context() as patched:
        patched.setattr(StepDataset, "__getitem__", lambda self, step: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match="saved after step 5: "):  # where the run had begun: no second time
            main(["--resume", str(parts)])
    assert kept == (sorted((parts / "checkpoints").iterdir()), (parts / "checkpoints" / "step-5").stat().st_ino)
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


def test_a_death_and_a_full_disk_are_both_said(tmp_path, monkeypatch):
    train_step, save = Trainer.train_step, CheckpointStore.save

    def struck(self, batch, step):
        if step == 4:
            kill_all()
        return train_step(self, batch, step)

    def full(self, step, *arguments, **options):
        if step == 5:
            raise UserError("the disk is full: make room")
        save(self, step, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_step", struck)
    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(UserError) as caught:
        main([*TINY, *WORKERS, "--run.dir", str(tmp_path / "run")])
    sentence = str(caught.value)
    assert "SIGKILL" in sentence and "saving after step 5 failed too (the disk is full: make room)" in sentence
    assert "from the last checkpoint (step 3)" in sentence and "\n" not in sentence


def struck_run(folder, cwd, strike, options=LONGER):
    """Starts a run with workers, calls strike(pid of it) at a random row; its exit code, standard error, seconds."""
    wait_for = random.Random().randrange(2, 31, 2)
    print("struck after the row of step", wait_for)
    process = start(*options, *WORKERS, "--run.dir", str(folder), cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(rf"\b{wait_for}/40\b", line):
            time.sleep(random.random() * 0.02)
            strike(process.pid)
            break
    started = time.monotonic()
    _, err = process.communicate(timeout=120)
    return process.returncode, err, time.monotonic() - started


def test_a_process_whose_worker_is_killed_ends_in_one_sentence(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*LONGER, "--run.dir", str(whole)]) == 0
    struck = []

    def strike(pid):
        struck.extend(children(pid))
        os.kill(random.choice(struck), signal.SIGKILL)

    code, err, seconds = struck_run(parts, tmp_path, strike)
    assert code == 2 and re.fullmatch(SENTENCE, err), err
    assert len(struck) == 2 and seconds < 30 and not any(os.path.exists(f"/proc/{pid}") for pid in struck)
    saved = int(re.search(SENTENCE, err).group(2))
    assert CheckpointStore(parts / "checkpoints").latest().name == f"step-{saved}"
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
@pytest.mark.parametrize("victims", [1, 2])
@pytest.mark.parametrize("others_hang", [False, True])
def test_whatever_kills_however_many(tmp_path, number, victims, others_hang):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*LONGER, "--run.dir", str(whole)]) == 0

    def strike(pid):
        pids = children(pid)
        for position, worker in enumerate(random.sample(pids, len(pids))):
            if position < victims:
                os.kill(worker, number)
            elif others_hang:
                os.kill(worker, signal.SIGSTOP)

    code, err, seconds = struck_run(parts, tmp_path, strike)
    assert code == 2 and seconds < 30 and re.fullmatch(SENTENCE, err) and number.name in err, err
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["workers", "group"])
def test_sigterm_to_the_workers_and_to_the_group(tmp_path, whom):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*LONGER, "--run.dir", str(whole)]) == 0

    def strike(pid):
        for worker in children(pid):
            for _ in range(3):
                os.kill(worker, signal.SIGTERM)
        if whom == "group":
            os.killpg(pid, signal.SIGTERM)

    code, err, _ = struck_run(parts, tmp_path, strike)
    assert (code, err) == (0, "") if whom == "workers" else (code == 3 and "stopped by SIGTERM: saved" in err), err
    if whom == "group":
        assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


@pytest.mark.slow
def test_a_run_killed_with_9_leaves_no_worker(tmp_path):
    pids = []

    def strike(pid):
        pids.extend(children(pid))
        os.kill(pid, signal.SIGKILL)

    code, _, seconds = struck_run(tmp_path / "run", tmp_path, strike)
    assert code == -9 and len(pids) == 2
    deadline = time.monotonic() + 30 - seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.slow
def test_a_stage_of_several_whose_worker_is_killed_stops_the_others_with_their_state(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stages = [*LONGER[:-4], *LONGER[-3:], "--run.stages=[supervised,ssr]"]
    assert main([*stages, "--run.dir", str(whole)]) == 0

    def strike(pid):
        families = [children(child) for server in python_children(pid) for child in python_children(server)]
        os.kill(random.choice([worker for family in families for worker in family]), signal.SIGKILL)

    code, err, seconds = struck_run(parts, tmp_path, strike, stages)
    assert code == 2 and seconds < 30 and re.fullmatch(SENTENCE, err), err
    assert main(["--resume", str(parts)]) == 0
    assert stage_rows(parts) == stage_rows(whole)


def python_children(pid):
    return [child for name in ("python", "python3", "pt_main_thread") for child in children(pid, name)]


def test_the_share_of_waiting_is_in_every_row_of_a_run(tmp_path):
    assert main([*TINY, *WORKERS, "--run.dir", str(tmp_path)]) == 0
    text = (tmp_path / "metrics.jsonl").read_text()
    windows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    assert [row["step"] for row in windows] == [2, 4, 6, 8]
    assert all(0.0 < row["data_share"] < 1.0 and "waited" not in row for row in windows)


def test_the_time_of_a_checkpoint_is_no_training_time(tmp_path, monkeypatch):
    save = CheckpointStore.save

    def slow(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        if step == 3:
            time.sleep(3.0)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    assert main([*TINY, "--run.dir", str(tmp_path)]) == 0
    windows = {row["step"]: row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert windows[4]["images_per_second"] > 4 / 3.0  # 4 images in a window of at least 3 s, if the pause counted
