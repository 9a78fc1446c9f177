"""The build of csrc: with a compiler, without one, with a broken source; what the library loader says of each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssr_kernels import library

ROOT = Path(__file__).parents[2]
WITHOUT_COMPILER = "there is no cmake (`pip install cmake` has it), no C++ compiler, no make or ninja"

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++") and (shutil.which("ninja") or shutil.which("make"))),
    reason="needs cmake, make and a C++ compiler",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the build reads, copied."""
    root = tmp_path / "checkout"
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("")
    hint = '"/usr/local/cuda/bin/nvcc"'  # found without PATH: compiling for every architecture takes minutes
    text = (root / "setup.py").read_text()
    assert text.count(hint) == 1
    (root / "setup.py").write_text(text.replace(hint, repr(str(tmp_path / "no nvcc"))))
    ignore = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(ROOT / "kernels" / "ssr_kernels", root / "kernels" / "ssr_kernels", ignore=ignore)
    (root / "ssr_fast").mkdir()
    shutil.copy(ROOT / "ssr_fast" / "__init__.py", root / "ssr_fast")
    return root


def without_nvcc(tmp_path: Path) -> str:
    """A PATH with the compiler's tools and nothing else, so that the test does not wait for nvcc."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("cmake", "c++", "make", "ninja", "ld", "as", "ar", "ranlib", "nm", "strip", "sh", "uname"):
        if path := shutil.which(tool):
            (folder / tool).symlink_to(path)
    return str(folder)


def setup(checkout: Path, path: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py of `checkout` with this PATH."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": path}
    words = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=240)


def imported(checkout: Path) -> dict[str, list[str]]:
    """What a fresh interpreter says about the libraries of this checkout."""
    code = (
        "import json; from ssr_kernels import library as l; print(json.dumps({n: l.reasons(n) for n in l.LIBRARIES}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_without_a_compiler_the_build_succeeds_with_one_line(checkout, tmp_path):
    (tmp_path / "empty").mkdir()
    done = setup(checkout, str(tmp_path / "empty"), "build_csrc", "--inplace")
    assert done.returncode == 0, done.stderr
    line = f"libssr_cpu.so and libssr_cuda.so not built: {WITHOUT_COMPILER}"
    assert done.stdout == f"ssr_fast: {line}\n"
    reasons = imported(checkout)
    assert reasons["ssr_cpu"] == [f"libssr_cpu.so not built: {WITHOUT_COMPILER}"]
    assert reasons["ssr_cuda"] == [f"libssr_cuda.so not built: {WITHOUT_COMPILER}"]


def test_the_whole_build_without_a_compiler(checkout, tmp_path):
    """What pip runs for a wheel: the packages are there, the libraries' notes too, and none of bench or tests."""
    (tmp_path / "empty").mkdir()
    (checkout / "tests").mkdir()
    (checkout / "tests" / "__init__.py").write_text("")
    done = setup(checkout, str(tmp_path / "empty"), "build", "--build-lib", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ssr_fast", "ssr_kernels"]
    assert (tmp_path / "out/ssr_kernels/align/op.py").exists()
    assert (tmp_path / "out/ssr_kernels/lib/libssr_cpu.txt").read_text() == f"{WITHOUT_COMPILER}\n"
    assert not (checkout / "kernels/ssr_kernels/lib").exists()


@needs_compiler
def test_with_a_compiler_the_cpu_library_loads_and_knows_its_sources(checkout, tmp_path):
    done = setup(checkout, without_nvcc(tmp_path), "build_csrc", "--inplace")
    assert done.returncode == 0, done.stderr
    folder = checkout / "kernels/ssr_kernels/lib"
    loaded = library.open_library("ssr_cpu", folder, checkout / "csrc")
    assert not isinstance(loaded, str), (loaded, done.stdout)
    assert loaded.ssr_version().decode() == library.digest(checkout / "csrc")
    assert imported(checkout)["ssr_cpu"] == []

    source = checkout / "csrc/version.cpp"
    source.write_text(source.read_text() + "// changed\n")
    stale = library.open_library("ssr_cpu", folder, checkout / "csrc")
    assert isinstance(stale, str) and "stale" in stale and library.REBUILD in stale
    assert not isinstance(library.open_library("ssr_cpu", folder, tmp_path / "no sources"), str)


@needs_compiler
def test_a_compile_error_is_shown_and_the_build_succeeds(checkout, tmp_path):
    (checkout / "csrc/broken.cpp").write_text("int broken( {\n")
    done = setup(checkout, without_nvcc(tmp_path), "build_csrc", "--inplace")
    assert done.returncode == 0, done.stderr
    assert "libssr_cpu.so not built: `cmake --build" in done.stdout and "failed with exit code" in done.stdout
    assert "broken.cpp:1" in done.stdout
    [reason] = imported(checkout)["ssr_cpu"]
    assert "failed with exit code" in reason and "\n" not in reason
    report = subprocess.run(
        [sys.executable, "-m", "ssr_kernels.library"], cwd=checkout / "kernels", capture_output=True, text=True
    )
    assert "broken.cpp:1" in report.stdout and report.stdout.count("\nssr_fast: libssr_cpu.so not built") == 1


def test_a_library_that_is_none_is_named(tmp_path):
    (tmp_path / "libssr_cpu.so").write_bytes(b"not a library")
    reason = library.open_library("ssr_cpu", tmp_path, tmp_path / "csrc")
    assert isinstance(reason, str) and "libssr_cpu.so cannot be loaded" in reason and library.REBUILD in reason
    reason = library.open_library("ssr_cuda", tmp_path, tmp_path / "csrc")
    assert reason == f"libssr_cuda.so not built: build it with `{library.REBUILD}`"


def test_load_raises_what_reasons_say():
    for name in library.LIBRARIES:
        if reasons := library.reasons(name):
            with pytest.raises(OSError, match=f"lib{name}.so"):
                library.load(name)
            assert len(reasons) == 1 and "\n" not in reasons[0]
        else:
            assert library.load(name) is library.load(name)
