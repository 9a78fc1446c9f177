"""`make gpu`: steps run, are skipped by name with the reason, or fail; packages that files need are found."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, limits, needs, sanitizer

STOCK = Path(sys.executable)


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    """A folder of its own, and little patience."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(limits, "GRACE_S", 0.2)
    return tmp_path / "results"


def step(name: str, code: str, reasons: list[str] | None = None, seconds: float = 10.0, **more) -> gpu.Step:
    command = [str(STOCK), "-c", code]
    return gpu.Step(name, f"the {name}", seconds, lambda seconds: command, lambda: reasons or [], **more)


def table(printed: str) -> list[str]:
    return printed[printed.rindex("\nstep") :].splitlines()[2:]


def test_steps_run_skip_and_fail_with_a_closing_table(capfd):
    steps = [
        step("good", "print('ran')"),
        step("bad", "raise SystemExit(3)"),
        step("absent", "raise SystemExit(9)", ["no tool"]),
        step("half", "", notes=lambda: ["libx skipped: no nvcc"]),
        step("unsound", "", problems=lambda: ["liby did not compile"]),
    ]
    assert gpu.main([], steps) == 1
    lines = table(capfd.readouterr().out)
    assert [line.split()[1:3] for line in lines[:5]] == [
        ["good", "passed"],
        ["bad", "failed"],
        ["absent", "skipped"],
        ["half", "passed"],
        ["unsound", "failed"],
    ]
    assert "exit code 3" in lines[1] and "no tool" in lines[2] and "libx skipped: no nvcc" in lines[3]
    assert gpu.main(["good", "absent"], steps) == 0
    assert gpu.main(["god"], steps) == 2
    assert gpu.main(["--minutes", "0"], steps) == 2


def test_a_program_that_cannot_be_started_fails_alone(capfd):
    absent = gpu.Step("absent", "absent", 10, lambda seconds: ["/nowhere/at/all"], list)
    assert gpu.main([], [absent, step("good", "")]) == 1
    lines = table(capfd.readouterr().out)
    assert "cannot be started" in lines[0] and lines[1].split()[2] == "passed"


def test_a_fault_of_ours_still_prints_the_tables(capfd):
    def notes() -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gpu.main([], [step("good", ""), step("bad", "", notes=notes)])
    lines = table(capfd.readouterr().out)
    assert lines[0].split()[1:3] == ["good", "passed"] and "nothing was measured" in lines


WRITES = (
    "import json, os, pathlib, time\n"
    "folder = pathlib.Path({folder!r}) / 'gpu'\nfolder.mkdir(parents=True, exist_ok=True)\n"
    "for name, whole in {files!r}.items():\n"
    "    (folder / name).write_text(json.dumps(dict(complete=whole, rows=[])))\n"
    "print('written', flush=True); time.sleep(100)"
)


@pytest.mark.parametrize(
    ("files", "code", "told"),
    [
        ({"a.json": True, "b.json": True}, 0, "a.json is whole, b.json is whole"),
        ({"a.json": True, "b.json": False}, 1, "a.json is whole, b.json is a part"),
        ({"a.json": True}, 1, "b.json was not written"),
    ],
)
def test_a_cut_step_fails_unless_its_results_are_whole(files, code, told, capfd, results, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE_S", 0.0)
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    monkeypatch.setattr(gpu.headlines, "lines", lambda documents: [f"figures of {sorted(documents)}"])
    steps = [step("long", WRITES.format(folder=str(results), files=files), files=("a.json", "b.json"), seconds=1.0)]
    assert gpu.main(["--minutes", "0.07"], steps) == code
    lines = table(capfd.readouterr().out)
    assert lines[0].split()[2] == "cut" and told in lines[0] and 3 < float(lines[0].split()[3]) < 60
    assert f"figures of {sorted(name.removesuffix('.json') for name in files)}" in lines
    assert "cut" in (results / "gpu" / "summary.txt").read_text()


def test_old_results_are_not_this_calls(results, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE_S", 0.0)
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    (results / "gpu").mkdir(parents=True)
    (results / "gpu" / "a.json").write_text(json.dumps({"complete": True, "rows": []}))
    old = time.time() - 1000
    gpu.os.utime(results / "gpu" / "a.json", (old, old))
    assert gpu.main(["--minutes", "0.02"], [step("long", "import time; time.sleep(100)", files=("a.json",))]) == 1
    printed = capfd.readouterr().out
    assert "a.json was not written" in printed and "nothing was measured" in printed


def test_steps_without_time_are_skipped_and_unused_time_goes_on(capfd, monkeypatch):
    told = []
    monkeypatch.setattr(
        gpu.limits, "run_within", lambda command, seconds, *_: told.append(seconds) or limits.Ended(0, 1)
    )
    now = [0.0]
    budget = limits.Budget(100, lambda: now[0])
    steps = [step("a", "", seconds=20), step("b", "", ["no"], seconds=50), step("c", "", seconds=30)]
    results = []
    gpu.run_all(steps, budget, 0.0, results)
    assert told == [pytest.approx(40), pytest.approx(100)]  # b's part is theirs; the fake clock stands still
    now[0] = 95.0
    gpu.run_all(steps, budget, 0.0, results)
    assert [result.status for result in results[3:]] == ["skipped"] * 3 and len(told) == 2
    assert results[3].detail == "no time left (2 s)" and not results[3].failed


def test_the_parts_of_all_steps_are_the_default_budget():
    assert sum(one.seconds for one in gpu.STEPS) <= 60 * gpu.MINUTES
    assert 60 * gpu.MINUTES + limits.GRACE_S + limits.DEAD_S - gpu.RESERVE_S < 600
    for one in gpu.STEPS:
        least = one.seconds * (60 * gpu.MINUTES - gpu.RESERVE_S) / sum(other.seconds for other in gpu.STEPS)
        assert least >= gpu.LEAST_S, one.title


def test_every_benchmark_of_the_kernels_is_a_step():
    from bench.__main__ import BENCHES
    from bench.variants import VARIANTS

    assert set(gpu.STEP_ROWS) <= set(VARIANTS)
    commands = [one.command(100.0) for one in gpu.STEPS if one.name == "bench"]
    assert {bench.name for bench in BENCHES} <= {words[3] for words in commands}
    for words in commands:
        if words[3].startswith("kernels."):
            assert words[4:] == ["--json", "--minutes", "1.25"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these steps run")
def test_without_a_gpu_the_steps_are_skipped_by_name(capfd):
    assert gpu.main(["tests", "sanitizer", "bench"]) == 0
    printed = capfd.readouterr().out
    for title in ("device tests", "sanitizer, memcheck", "sanitizer, racecheck", "kernels, align", "training step"):
        line = next(line for line in printed.splitlines() if line.startswith(title))
        assert "skipped" in line and "there is no GPU that torch can use" in line


def test_the_steps_find_their_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_gpu", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tests, memcheck, racecheck, align, *_ = gpu.STEPS[1:]
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert "compute-sanitizer" in memcheck.reasons()[0]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text("")
    assert sanitizer.find_tool() == tmp_path / "bin" / "compute-sanitizer"
    assert [step.reasons() for step in gpu.STEPS[1:]] == [[]] * (len(gpu.STEPS) - 1)
    assert memcheck.command(1.0)[2:] == ["bench.sanitizer", "memcheck"]
    assert racecheck.command(1.0)[2:] == ["bench.sanitizer", "racecheck"]
    monkeypatch.setattr(gpu, "installed", lambda package: package not in ("pytest", "setuptools"))
    monkeypatch.setattr(needs, "installed", lambda package: package not in ("pytest", "rich"))
    assert "pytest is not installed" in tests.reasons() and align.reasons() == ["rich is not installed"]
    assert gpu.STEPS[0].reasons() == ["setuptools is not installed"]


def test_pytest_runs_the_kernels_first_and_in_parallel_where_it_can(monkeypatch):
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    words = gpu.STEPS[1].command(100.0)
    files = [word for word in words if word.endswith(".py")]
    kernels = [file for file in files if file.startswith("tests/kernels/")]
    assert files[: len(kernels)] == kernels and "tests/kernels/test_counter.py" in kernels
    assert len(files) > len(kernels) > 4 and "tests/bench/test_gpu.py" not in files
    assert words[words.index("-n") + 1] == "8" and words[words.index("--dist") + 1] == "load"
    assert {"-q", "--tb=short", "-rfE", "--durations=10", "bench.record_tests", "--timeout=90"} <= set(words)
    monkeypatch.setattr(gpu, "installed", lambda package: package not in ("xdist", "pytest_timeout"))
    assert not {"-n", "--dist", "--timeout=90"} & set(gpu.STEPS[1].command(100.0))


def test_a_test_file_that_needs_a_missing_package_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(gpu, "no_gpu", list)
    monkeypatch.setattr(gpu, "gpu_tests", lambda: [Path(gpu.__file__), Path(gpu.__file__).with_name("plot.py")])
    monkeypatch.setattr(needs, "installed", lambda package: package != "matplotlib")
    tests = gpu.STEPS[1]
    assert tests.reasons() == [] and tests.command(1.0)[-1] == "bench/gpu.py"
    assert tests.notes() == ["plot.py left out: matplotlib is not installed"]


def test_missing_packages_follows_imports_of_our_own_files(monkeypatch, tmp_path):
    root = tmp_path / "house"
    files = {
        "room/__init__.py": "import os\n",
        "room/door.py": "from . import window\nfrom .deep.cellar import dark\nimport torch\n",
        "room/window.py": "import not_there.at_all\n\n\ndef f():\n    import optional_thing\n",
        "room/deep/__init__.py": "import gone\n",
        "room/deep/cellar.py": "from room import door\ndark = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(needs, "SOURCES", (root,))
    assert needs.missing_packages([root / "room/door.py"]) == ["gone is not installed", "not_there is not installed"]


def test_the_build_tells_a_missing_tool_from_a_failed_compilation(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LIBRARY_NOTES", tmp_path)
    (tmp_path / "libssr_cuda.txt").write_text("there is no nvcc (of the CUDA toolkit)\n")
    (tmp_path / "libssr_cpu.txt").write_text("`cmake --build` failed with exit code 2\nerror: ...\n")
    build = gpu.STEPS[0]
    assert build.problems() == ["libssr_cpu.so: `cmake --build` failed with exit code 2"]
    assert build.notes() == ["libssr_cuda.so skipped: there is no nvcc (of the CUDA toolkit)"]


def test_make_hands_its_arguments_to_the_steps():
    done = subprocess.run(
        ["make", "-s", "gpu", f"PYTHON={sys.executable}", "ARGS=nonsense"], cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "there is no step 'nonsense'" in done.stderr
    done = subprocess.run(
        ["make", "-s", "gpu", f"PYTHON={sys.executable}", "MINUTES=-3"], cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "MINUTES must be above 0 (it is -3)" in done.stderr


@pytest.mark.slow
def test_the_options_of_pytest_only_warn_where_its_plugins_are_missing():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:timeout",
        "-p",
        "no:xdist",
        "-m",
        "gpu",
        "--collect-only",
        "-q",
    ]
    done = subprocess.run([*command, "tests/kernels/test_counter.py"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
