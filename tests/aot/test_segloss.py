"""The Triton kernels of segloss compiled ahead of time for GPUs that are not there: they compile, within a budget."""

from functools import partial

import pytest
import torch

from tests.aot.segloss_launches import record
from tests.aot.triton_compile import MATRIX, Launch, problems

REGISTERS = {
    "pixel_losses": {19: (72, 72, 72), 150: (72, 72, 72)},
    "loss_sum": {19: (48, 48, 48), 150: (48, 48, 48)},
    "logit_gradients": {19: (72, 72, 72), 150: (128, 128, 128)},
    "surest_classes": {19: (72, 72, 72), 150: (72, 72, 72)},
    "count_sum": {19: (64, 64, 64), 150: (64, 64, 64)},
}
"""The most registers a thread of each kernel and number of classes on sm_80, sm_90 and sm_100; nothing may spill."""

DTYPES = (torch.bfloat16, torch.float32)


def budget(classes: int) -> dict[str, tuple[int, ...]]:
    """The registers of each kernel for a number of classes."""
    return {kernel: by_classes[classes] for kernel, by_classes in REGISTERS.items()}


def of_kernel(kernel: str, dtype: torch.dtype, classes: int) -> list[Launch]:
    """The launches of a kernel."""
    return [launch for launch in record(dtype, classes) if launch.kernel == kernel]


def test_every_kernel_of_a_call_has_a_budget():
    assert [launch.kernel for launch in record(torch.bfloat16, 19)] == list(REGISTERS)


def test_the_hottest_kernel_on_hopper():
    """The others, and the other architectures, are among the slow tests."""
    hottest = partial(of_kernel, "logit_gradients", torch.bfloat16, 19)
    assert len(hottest()) == 1
    assert not problems(hottest, (90,), budget(19))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_on_every_architecture(kernel, classes, dtype):
    assert not problems(partial(of_kernel, kernel, dtype, classes), tuple(MATRIX), budget(classes))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("classes", [2, 40, 100, 255])
def test_other_numbers_of_classes_do_not_spill(classes):
    for dtype in DTYPES:
        assert not problems(partial(record, dtype, classes), (80, 90), None)
