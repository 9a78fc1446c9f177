"""csrc/align.cu compiled with nvcc for each architecture, no GPU needed: registers, spills, shared memory, HMMA.

The resources are those that ptxas reports; the instructions are read with nvdisasm of triton's wheel.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

# kernel, architecture: most registers a thread, most bytes of static shared memory, whether it multiplies matrices.
# Three blocks of 128 threads an SM of the row passes (168 registers), five of the adjoint (96).
BUDGET = {
    ("row_pass<__nv_bfloat16, false>", "80"): (168, 0, True),
    ("row_pass<__nv_bfloat16, true>", "80"): (168, 0, True),
    ("row_pass<__half, false>", "80"): (168, 0, True),
    ("row_pass<__half, true>", "80"): (168, 0, True),
    ("adjoint_pass<__nv_bfloat16>", "80"): (96, 0, False),
    ("adjoint_pass<__half>", "80"): (96, 0, False),
    ("row_pass<__nv_bfloat16, false>", "90a"): (168, 0, True),
    ("row_pass<__nv_bfloat16, true>", "90a"): (168, 0, True),
    ("row_pass<__half, false>", "90a"): (168, 0, True),
    ("row_pass<__half, true>", "90a"): (168, 0, True),
    ("adjoint_pass<__nv_bfloat16>", "90a"): (96, 0, False),
    ("adjoint_pass<__half>", "90a"): (96, 0, False),
    ("row_pass<__nv_bfloat16, false>", "100"): (168, 0, True),
    ("row_pass<__nv_bfloat16, true>", "100"): (168, 0, True),
    ("row_pass<__half, false>", "100"): (168, 0, True),
    ("row_pass<__half, true>", "100"): (168, 0, True),
    ("adjoint_pass<__nv_bfloat16>", "100"): (96, 0, False),
    ("adjoint_pass<__half>", "100"): (96, 0, False),
}
# what a kernel's mangled name has between its own name and the end of its template arguments
MANGLED = {
    "row_pass<__nv_bfloat16, false>": "row_passI13__nv_bfloat16Lb0EE",
    "row_pass<__nv_bfloat16, true>": "row_passI13__nv_bfloat16Lb1EE",
    "row_pass<__half, false>": "row_passI6__halfLb0EE",
    "row_pass<__half, true>": "row_passI6__halfLb1EE",
    "adjoint_pass<__nv_bfloat16>": "adjoint_passI13__nv_bfloat16E",
    "adjoint_pass<__half>": "adjoint_passI6__halfE",
}
# the sampler: registers and static shared memory of each kernel, on every architecture
SAMPLER = {"count_sizes": (32, 0), "choose": (64, 0), "sort_tiles": (128, 0), "merge": (40, 0)}
ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def tool(name: str) -> str:
    """A program of triton's wheel; skips the test where there is none."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    if not (folder / name).exists():
        pytest.skip(f"needs {name} (triton's wheel has it)")
    return str(folder / name)


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    """{mangled name: (registers, static shared bytes, bytes of stack and spills)} of ptxas -v's report."""
    found, entry, spilled = {}, "", 0
    for line in report.splitlines():
        if match := ENTRY.search(line):
            entry = match[1]
        elif match := SPILLS.search(line):
            spilled = sum(map(int, match.groups()))
        elif (match := USED.search(line)) and entry:
            static = STATIC.search(line)
            found[entry] = (int(match[1]), int(static[1]) if static else 0, spilled)
            entry = ""
    return found


def matrix_instructions(disassembly: str) -> dict[str, int]:
    """{section name: how many HMMA} of nvdisasm's output."""
    counts: dict[str, int] = {}
    section = ""
    for line in disassembly.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            section = match[1]
        elif re.search(r"\bHMMA\.", line):
            counts[section] = counts.get(section, 0) + 1
    return counts


def test_the_reports_are_read_right():
    report = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 64 bytes smem, 1312 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers
"""
    assert resources(report) == {"_Z1fv": (80, 64, 28), "_Z1gv": (9, 0, 0)}
    text = '\t.section\t.text._Z1fv,"ax"\n  HMMA.16816.F32 R4, R8\n\t.section\t.text._Z1gv,"ax"\n  FFMA R1'
    assert matrix_instructions(text) == {"_Z1fv": 1}


SLOW = pytest.mark.slow


ARCHITECTURES = [pytest.param("80", marks=SLOW), "90a", pytest.param("100", marks=SLOW)]


def compiled(source: str, architecture: str, cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Compile csrc/<source> into `cubin`; what resources reads of ptxas's report."""
    words = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", '-DSSR_SOURCES="x"']
    done = subprocess.run([*words, str(CSRC / source), "-o", str(cubin)], capture_output=True, text=True, timeout=280)
    if "Unsupported gpu architecture" in done.stderr or "is not defined for option 'gpu-architecture'" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    assert done.returncode == 0, done.stderr
    return resources(done.stdout + done.stderr)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources_of_the_sampler(architecture, tmp_path):
    used = compiled("contrast.cu", architecture, tmp_path / "contrast.cubin")
    assert len(used) == len(SAMPLER), list(used)
    for kernel, (registers, static) in SAMPLER.items():
        [name] = [name for name in used if f"{len(kernel)}{kernel}E" in name]
        print(f"sm_{architecture} {kernel}: registers, static shared, spills {used[name]}")
        assert used[name][0] <= registers and used[name][1] <= static and used[name][2] == 0, (kernel, used[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources_of_align(architecture, tmp_path):
    cubin = tmp_path / "align.cubin"
    used = compiled("align.cu", architecture, cubin)
    disassembly = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    multiplies = matrix_instructions(disassembly.stdout)
    budgets = {kernel: row for (kernel, where), row in BUDGET.items() if where == architecture}
    assert len(used) == len(budgets), list(used)
    for kernel, (registers, static, matrices) in budgets.items():
        [name] = [name for name in used if MANGLED[kernel] in name]
        print(f"sm_{architecture} {kernel}: registers, static shared, spills {used[name]}, HMMA {multiplies.get(name)}")
        assert used[name][0] <= registers, f"{kernel}: {used[name][0]} registers, at most {registers}"
        assert used[name][1] <= static, f"{kernel}: {used[name][1]} bytes of static shared memory"
        assert used[name][2] == 0, f"{kernel}: {used[name][2]} bytes of stack and spills"
        assert (multiplies.get(name, 0) > 0) == matrices, f"{kernel}: {multiplies.get(name, 0)} HMMA"
