"""Adds one step to the build that pyproject.toml describes: csrc/ is compiled by CMake into ssr_kernels/lib.

The install never fails because of it. A library that cannot be built leaves a note, lib/lib<name>.txt, whose first
line says why; `python -m ssr_fast.info` shows it, and ssr_kernels uses another backend.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("ssr_kernels", "lib")
NVCC_HINT = Path("/usr/local/cuda/bin/nvcc")


class BuildNative(Command):
    """Compile csrc/ into the package's folder `lib`."""

    description = "compile csrc/ with CMake (skipped with one line where a tool is missing)"
    user_options = [("inplace", "i", "put the libraries into the source tree"), ("build-lib=", "b", "build folder")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode
        folder = (ROOT / "kernels" if in_source else Path(self.build_lib or "").resolve()) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        problems: dict[str, list[str]] = {}
        for name in ("ssr_cpu", "ssr_cuda"):
            library, note = folder / f"lib{name}.so", folder / f"lib{name}.txt"
            library.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            problem = missing_tools(name) or compile_library(name, library)
            if problem:
                note.write_text(problem + "\n", encoding="utf-8")
                problems.setdefault(problem, []).append(library.name)
        for problem, names in problems.items():
            print(f"ssr_fast: {' and '.join(names)} not built: {problem}", flush=True)

    def get_outputs(self) -> list[str]:
        return []  # the wheel takes all of build_lib; an editable install reads the source tree

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir()))]


class NativeDistribution(Distribution):
    """A distribution whose wheel is for one platform: it holds compiled libraries."""

    def has_ext_modules(self) -> bool:
        return True


def missing_tools(name: str) -> str:
    """The tools that library `name` needs and that are not found, as half a sentence; empty if none."""
    compilers = (os.environ.get("CXX") or "c++", "g++", "clang++")
    tools = {
        "cmake (`pip install cmake` has it)": shutil.which("cmake"),
        "C++ compiler": any(shutil.which(compiler) for compiler in compilers),
        "make or ninja": shutil.which("ninja") or shutil.which("make"),
    }
    if all(tools.values()) and name == "ssr_cuda":
        tools = {"nvcc (of the CUDA toolkit)": shutil.which("nvcc") or NVCC_HINT.exists()}
    missing = [tool for tool, found in tools.items() if not found]
    return f"there is no {', no '.join(missing)}" if missing else ""


def compile_library(name: str, destination: Path) -> str:
    """Compile one target of CMakeLists.txt and copy it to `destination`; empty, or what failed and all output."""
    folder = ROOT / "build" / name
    generator = ["-G", "Ninja"] if shutil.which("ninja") else ["-G", "Unix Makefiles"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator]
    compile_target = ["cmake", "--build", str(folder), "--target", name, "--parallel"]
    for command in ([*configure, f"-DSSR_CUDA={'ON' if name == 'ssr_cuda' else 'OFF'}"], compile_target):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            return f"`{' '.join(command)}` failed with exit code {done.returncode}\n{done.stdout}"
    shutil.copy2(folder / destination.name, destination)
    return ""


class Build(build):
    """The usual build, and csrc."""

    sub_commands = [*build.sub_commands, ("build_csrc", None)]


setup(cmdclass={"build": Build, "build_csrc": BuildNative}, distclass=NativeDistribution)
