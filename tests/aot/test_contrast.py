"""contrast_loss's Triton kernels compiled ahead of time for GPUs that are not there: they compile, within a budget."""

import pytest
import torch

from tests.aot.contrast_launches import record
from tests.aot.triton_compile import MATRIX, SHARED_LIMIT, Launch, compile_all

REGISTERS = {
    "inverse_norms": (32, 32, 32),
    "row_sums": (176, 168, 176),
    "loss_sum": (128, 128, 128),
    "row_gradients": (255, 255, 255),
    "gradient_sums": (72, 72, 72),
}
"""The most registers a thread of each kernel on sm_80, sm_90 and sm_100, bfloat16; nothing may spill in any dtype."""

WITH_MATRIX = {"row_sums", "row_gradients"}
"""Kernels with a matrix product."""


def within_budget(launches: list[Launch], capabilities: tuple[int, ...], registers: bool = True) -> None:
    problems = []
    for row in compile_all(launches, capabilities):
        name, capability = row["kernel"], row["capability"]
        what = f"{name} on sm_{capability}"
        if "error" in row:
            problems.append(f"{what}: {row['error']}")
            continue
        print(row)
        allowed = REGISTERS[name][tuple(MATRIX).index(capability)]
        if registers and row["registers"] > allowed:
            problems.append(f"{what} takes {row['registers']} registers, more than {allowed}")
        if row["stack"] or row["spills"]:
            problems.append(f"{what} spills: {row['stack']} bytes of stack, {row['spills']} instructions")
        if row["shared"] > SHARED_LIMIT[capability]:
            problems.append(f"{what} takes {row['shared']} bytes of shared memory")
        if (row["matrix"] > 0) != (name in WITH_MATRIX):
            problems.append(f"{what} has {row['matrix']} matrix instructions")
    assert not problems, "\n".join(problems)


def test_every_kernel_of_a_call_has_a_budget():
    assert [launch.kernel for launch in record(torch.bfloat16)] == list(REGISTERS)


def test_the_hottest_kernel_on_hopper():
    """The others, and the other architectures, are among the slow tests."""
    launches = [launch for launch in record(torch.bfloat16) if launch.kernel == "row_gradients"]
    assert len(launches) == 1
    within_budget(launches, (90,))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_on_every_architecture(kernel, dtype):
    # 200: rows that are narrower than their tile
    launches = [launch for width in (256, 200, 64) for launch in record(dtype, width) if launch.kernel == kernel]
    within_budget(launches, tuple(MATRIX), registers=dtype == torch.bfloat16)
