"""Align's Triton kernels compiled ahead of time for GPUs that are not there: they compile, and stay within a budget."""

from functools import partial

import pytest
import torch

from tests.aot.align_launches import record
from tests.aot.triton_compile import MATRIX, Launch, problems

REGISTERS = {
    "direct_rows": (255, 240, 220),
    "direct_dx": (190, 190, 150),
    "direct_dw": (255, 215, 175),
    "gram_tables": (240, 220, 200),
    "gram_rows": (180, 140, 170),
    "gram_dx": (170, 150, 140),
    "gram_adjoint": (64, 64, 64),
    "token_sums": (104, 104, 120),
    "moments": (180, 140, 130),
    "weight_gradients": (176, 136, 152),
    "loss_sums": (64, 64, 64),
}
"""The most registers a thread of each kernel on sm_80, sm_90 and sm_100, bfloat16; nothing may spill in any dtype."""

PRODUCTS = set(REGISTERS) - {"gram_adjoint", "loss_sums"}
"""Kernels with a matrix product."""


def of_kernels(kernels: tuple[str, ...], dtype: torch.dtype) -> list[Launch]:
    """The launches of some kernels."""
    return [launch for launch in record(dtype) if launch.kernel in kernels]


def test_every_kernel_of_a_call_has_a_budget():
    assert {launch.kernel for launch in record(torch.bfloat16)} == set(REGISTERS)


def test_the_hottest_kernels_on_hopper():
    """The others, and the other architectures, are among the slow tests."""
    hottest = partial(of_kernels, ("direct_dx", "gram_rows"), torch.bfloat16)
    assert len(hottest()) == 2
    assert not problems(hottest, (90,), REGISTERS, PRODUCTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kernel_on_every_architecture(kernel, dtype):
    registers = REGISTERS if dtype == torch.bfloat16 else None
    assert not problems(partial(of_kernels, (kernel,), dtype), tuple(MATRIX), registers, PRODUCTS)
