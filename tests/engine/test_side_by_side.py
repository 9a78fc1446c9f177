"""Jobs in processes of their own: results, order, stops, mistakes, crashes, and a parent that is killed."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.side_by_side import share, side_by_side
from ssr_fast.engine.trainer import Stopped
from ssr_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def job(kind: str, folder: str) -> tuple[str, int]:
    """Succeed, fail, die, or work until a signal asks to stop."""
    with StopSignal() as stop:
        Path(folder, f"{kind}.started").write_text(str(os.getpid()))
        if kind == "mistake":
            raise UserError("--data.root /x is missing")
        if kind == "crash":
            raise ZeroDivisionError("a fault of ours")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "patient":
            if stop.requested:
                Path(folder, "patient.saved").write_text("")
                raise Stopped(stop.requested, 7)
            time.sleep(0.02)
    return kind, torch.get_num_threads()


def collections() -> tuple[bool, int]:
    """Whether this process collects garbage, and how many objects it leaves alone."""
    return gc.isenabled(), gc.get_freeze_count()


def run(*kinds: str, folder: Path, at_once: int = 2) -> dict[str, tuple[str, int]]:
    with StopSignal() as stop:
        jobs = [(kind, (kind, str(folder))) for kind in kinds]
        return dict(side_by_side(job, jobs, at_once, 1, stop))


def test_results_come_back_by_name_and_threads_are_shared(tmp_path: Path) -> None:
    assert run("a", "b", "c", folder=tmp_path) == {"a": ("a", 1), "b": ("b", 1), "c": ("c", 1)}


def test_a_job_collects_its_own_garbage_and_not_what_was_imported() -> None:
    with StopSignal() as stop:
        ((_, (enabled, frozen)),) = side_by_side(collections, [("a", ())], 1, 1, stop)
    assert enabled and frozen > 100_000


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("mistake", UserError, "--data.root /x is missing"),
        pytest.param("crash", RuntimeError, "process of crash died with exit code 1", marks=pytest.mark.slow),
        pytest.param("killed", RuntimeError, "process of killed died with exit code -9", marks=pytest.mark.slow),
    ],
)
def test_one_failure_stops_the_others_and_is_raised(
    kind: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(kind, "patient", "never", folder=tmp_path)
    assert not (tmp_path / "never.started").exists()
    assert (tmp_path / "patient.saved").exists() or not (tmp_path / "patient.started").exists()


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_that_trains_on(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.engine.test_side_by_side import run\n"
        f"if __name__ == '__main__': run('patient', folder=Path({str(tmp_path)!r}))"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, cwd=tmp_path)
    _wait_for(tmp_path / "patient.started")
    parent.kill()
    parent.wait()
    _wait_for(tmp_path / "patient.saved")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.05)


def test_share() -> None:
    cores = len(os.sched_getaffinity(0))
    assert share(1) == (1, cores)
    assert share(1000) == (cores, 1)
    assert share(2) == (min(2, cores), max(1, cores // 2))
