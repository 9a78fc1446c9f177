"""contrast_loss's Triton kernels compiled ahead of time for GPUs that are not there: they compile, within a budget."""

from functools import partial

import pytest
import torch

from tests.aot.contrast_launches import record
from tests.aot.triton_compile import MATRIX, Launch, problems

REGISTERS = {
    "inverse_norms": (32, 32, 32),
    "row_sums": (176, 168, 176),
    "loss_sum": (128, 128, 128),
    "row_gradients": (255, 255, 255),
    "gradient_sums": (72, 72, 72),
}
"""The most registers a thread of each kernel on sm_80, sm_90 and sm_100, bfloat16; nothing may spill in any dtype."""

PRODUCTS = {"row_sums", "row_gradients"}
"""Kernels with a matrix product."""


def of_kernel(kernel: str, dtype: torch.dtype, widths: tuple[int, ...]) -> list[Launch]:
    """The launches of a kernel for rows of these widths."""
    return [launch for width in widths for launch in record(dtype, width) if launch.kernel == kernel]


def test_every_kernel_of_a_call_has_a_budget():
    assert [launch.kernel for launch in record(torch.bfloat16)] == list(REGISTERS)


def test_the_hottest_kernel_on_hopper():
    """The others, and the other architectures, are among the slow tests."""
    hottest = partial(of_kernel, "row_gradients", torch.bfloat16, (256,))
    assert len(hottest()) == 1
    assert not problems(hottest, (90,), REGISTERS, PRODUCTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_on_every_architecture(kernel, dtype):
    # 200: rows that are narrower than their tile
    registers = REGISTERS if dtype == torch.bfloat16 else None
    assert not problems(partial(of_kernel, kernel, dtype, (256, 200, 64)), tuple(MATRIX), registers, PRODUCTS)
