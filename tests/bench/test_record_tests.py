"""The record of a test run: outcomes, reasons and failures, also of a run that is cut off, with and without workers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bench import needs

TESTS = """
import pathlib, time
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no such thing")
def test_setup(broken): pass
def test_long():
    if pathlib.Path("wait").exists():
        pathlib.Path("begun").touch()
        time.sleep(100)
"""
LOST = """
import torch
def test_before(): pass
def test_breaks():
    torch.cuda.is_initialized = lambda: True
    def synchronize(*_): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_behind(): assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def start(tmp_path):
    def start(text: str, *options: str) -> "subprocess.Popen[str]":
        (tmp_path / "test_it.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "bench.record_tests",
            "--record",
            "record.json",
            *options,
        ]
        path = os.pathsep.join(map(str, needs.SOURCES))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "-p", "no:cacheprovider"], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE
        )

    return start


def record(tmp_path):
    content = json.loads((tmp_path / "record.json").read_text())
    return content, {row["name"].rpartition("::")[2]: row for row in content["rows"]}


WAYS = pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "load")], ids=["serial", "workers"])


@WAYS
def test_every_outcome_is_entered(options, start, tmp_path):
    if options:
        pytest.importorskip("xdist")
    process = start(TESTS, *options)
    printed = process.communicate(timeout=100)[0]
    content, rows = record(tmp_path)
    assert process.returncode == 1 and content["complete"] and content["collected"] == 5
    outcomes = {"test_good": "passed", "test_bad": "failed", "test_skipped": "skipped", "test_setup": "error"}
    assert {name: row["outcome"] for name, row in rows.items()} == {**outcomes, "test_long": "passed"}
    assert content["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert content["reasons"] == {"needs two GPUs": 1} and content["versions"]["torch"] and "commit" in content
    assert "one is not two" in rows["test_bad"]["text"] and "no such thing" in rows["test_setup"]["text"]
    assert "FAILED test_it.py::test_bad: AssertionError: one is not two" in printed


@WAYS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cut_run_leaves_what_it_had(number, options, start, tmp_path):
    if options:
        pytest.importorskip("xdist")
    (tmp_path / "wait").touch()
    process = start(TESTS, *options)
    deadline = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # what other workers do meanwhile
    process.send_signal(number)
    printed = process.communicate(timeout=100)[0]
    content, rows = record(tmp_path)
    assert process.returncode and not content["complete"] and rows["test_bad"]["outcome"] == "failed"
    assert "test_long" not in rows or rows["test_long"]["outcome"] != "passed"
    if number == signal.SIGTERM:
        assert "one is not two" in printed.partition("FAILURES")[2]


def test_a_broken_context_ends_a_run_without_workers(start, tmp_path):
    process = start(LOST)
    printed = process.communicate(timeout=100)[0]
    content, rows = record(tmp_path)
    assert process.returncode == 1 and not content["complete"] and set(rows) == {"test_before", "test_breaks"}
    assert "test_breaks broke the device's context (CUDA error: an illegal memory access" in printed


def test_a_broken_context_ends_a_worker_and_the_others_go_on(start, tmp_path):
    pytest.importorskip("xdist")
    process = start(LOST, "-n", "1")
    process.communicate(timeout=100)
    content, rows = record(tmp_path)
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"test_before": "passed", "test_breaks": "failed", "test_behind": "passed"}
    assert "illegal memory access" in rows["test_breaks"]["text"] and content["complete"]
