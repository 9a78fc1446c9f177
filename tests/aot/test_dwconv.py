"""dwconv's Triton kernels compiled ahead of time for GPUs that are not there: they compile, within a budget."""

from functools import partial

import pytest
import torch

from tests.aot.dwconv_launches import record
from tests.aot.triton_compile import MATRIX, Launch, problems

REGISTERS = {
    "gelu_forward": (176, 176, 176),
    "gelu_backward": (248, 244, 240),
    "dilated_forward": (128, 128, 128),
    "dilated_dx": (128, 128, 128),
    "dilated_dw": (128, 128, 128),
    "tap_sums": (64, 64, 64),
}
"""The most registers a thread of each kernel on sm_80, sm_90 and sm_100; nothing may spill in any dtype."""


def of_kernel(kernel: str, dtype: torch.dtype) -> list[Launch]:
    """The different launches of a kernel at crops of 512 and 1024."""
    found = [launch for crop in (512, 1024) for launch in record(dtype, crop) if launch.kernel == kernel]
    return list({(str(launch.constants), str(launch.options)): launch for launch in found}.values())


def test_every_kernel_of_a_call_has_a_budget():
    assert {launch.kernel for launch in record(torch.bfloat16)} == set(REGISTERS)


def test_the_hottest_kernels_on_hopper():
    """The others, and the other architectures, are among the slow tests."""

    def hottest() -> list[Launch]:
        return [of_kernel(name, torch.bfloat16)[0] for name in ("gelu_backward", "dilated_dx")]

    assert not problems(hottest, (90,), REGISTERS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kernel_on_every_architecture(kernel, dtype):
    assert not problems(partial(of_kernel, kernel, dtype), tuple(MATRIX), REGISTERS)
