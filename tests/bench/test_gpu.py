"""`make gpu`: steps run, are skipped by name with the reason, or fail; packages that files need are found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu

STOCK = Path(sys.executable)


def step(name: str, code: str, reasons: list[str] | None = None, **more) -> gpu.Step:
    return gpu.Step(name, f"the {name}", lambda: [str(STOCK), "-c", code], lambda: reasons or [], **more)


def test_steps_run_skip_and_fail_with_a_closing_table(capfd):
    steps = [
        step("good", "print('ran')"),
        step("bad", "raise SystemExit(3)"),
        step("absent", "raise SystemExit(9)", ["no tool"]),
        step("half", "", notes=lambda: ["libx skipped: no nvcc"]),
        step("unsound", "", problems=lambda: ["liby did not compile"]),
    ]
    assert gpu.main([], steps) == 1
    table = capfd.readouterr().out.split("\nstep")[1].splitlines()[1:]
    assert [line.split()[1:3] for line in table] == [
        ["good", "passed"],
        ["bad", "failed"],
        ["absent", "skipped"],
        ["half", "passed"],
        ["unsound", "failed"],
    ]
    assert "exit code 3" in table[1] and "no tool" in table[2] and "libx skipped: no nvcc" in table[3]
    assert gpu.main(["good", "absent"], steps) == 0
    assert gpu.main(["god"], steps) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these steps run")
def test_without_a_gpu_the_steps_are_skipped_by_name(capfd):
    assert gpu.main(["tests", "sanitizer", "bench"]) == 0
    printed = capfd.readouterr().out
    for title in ("device tests", "sanitizer, memcheck", "sanitizer, racecheck", "benchmarks", "training step"):
        line = next(line for line in printed.splitlines() if line.startswith(title))
        assert "skipped" in line and "there is no GPU that torch can use" in line


def test_the_steps_find_their_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_gpu", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tests, memcheck, racecheck, benchmarks, *_ = gpu.STEPS[1:]
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert "compute-sanitizer" in memcheck.reasons()[0]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text("")
    assert [step.reasons() for step in gpu.STEPS[1:]] == [[]] * (len(gpu.STEPS) - 1)
    assert memcheck.command()[:3] == [str(tmp_path / "bin" / "compute-sanitizer"), "--tool", "memcheck"]
    assert racecheck.command()[2] == "racecheck" and "--error-exitcode=99" in racecheck.command()
    assert "tests/kernels/test_counter.py" in tests.command()
    monkeypatch.setattr(gpu, "_installed", lambda package: package not in ("pytest", "rich", "setuptools"))
    assert "pytest is not installed" in tests.reasons() and benchmarks.reasons() == ["rich is not installed"]
    assert gpu.STEPS[0].reasons() == ["setuptools is not installed"]


def test_a_test_file_that_needs_a_missing_package_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(gpu, "no_gpu", list)
    monkeypatch.setattr(gpu, "gpu_tests", lambda: [Path(gpu.__file__), Path(gpu.__file__).with_name("plot.py")])
    monkeypatch.setattr(gpu, "_installed", lambda package: package != "matplotlib")
    tests = gpu.STEPS[1]
    assert tests.reasons() == [] and tests.command()[-1] == "bench/gpu.py"
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
    monkeypatch.setattr(gpu, "SOURCES", (root,))
    assert gpu.missing_packages([root / "room/door.py"]) == ["gone is not installed", "not_there is not installed"]


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
