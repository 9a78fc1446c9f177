"""The Triton kernels of segloss compiled ahead of time for GPUs that are not there: they compile, within a budget."""

import pytest
import torch

from tests.aot.segloss_launches import record
from tests.aot.triton_compile import MATRIX, SHARED_LIMIT, Launch, compile_all

REGISTERS = {
    "pixel_losses": {19: (72, 72, 72), 150: (72, 72, 72)},
    "loss_sum": {19: (48, 48, 48), 150: (48, 48, 48)},
    "logit_gradients": {19: (72, 72, 72), 150: (128, 128, 128)},
    "surest_classes": {19: (72, 72, 72), 150: (72, 72, 72)},
    "count_sum": {19: (64, 64, 64), 150: (64, 64, 64)},
}
"""The most registers a thread of each kernel and number of classes on sm_80, sm_90 and sm_100; nothing may spill."""

DTYPES = (torch.bfloat16, torch.float32)


def within_budget(launches: list[Launch], capabilities: tuple[int, ...], classes: int | None = None) -> None:
    """What compiles does not spill, and for a number of classes with a budget keeps to that."""
    problems = []
    for row in compile_all(launches, capabilities):
        name, capability = row["kernel"], row["capability"]
        what = f"{name} on sm_{capability}"
        if "error" in row:
            problems.append(f"{what}: {row['error']}")
            continue
        print(row)
        allowed = 255 if classes is None else REGISTERS[name][classes][tuple(MATRIX).index(capability)]
        if row["registers"] > allowed:
            problems.append(f"{what} takes {row['registers']} registers, more than {allowed}")
        if row["stack"] or row["spills"]:
            problems.append(f"{what} spills: {row['stack']} bytes of stack, {row['spills']} instructions")
        if row["shared"] > SHARED_LIMIT[capability]:
            problems.append(f"{what} takes {row['shared']} bytes of shared memory")
    assert not problems, "\n".join(problems)


def test_every_kernel_of_a_call_has_a_budget():
    assert [launch.kernel for launch in record(torch.bfloat16, 19)] == list(REGISTERS)


def test_the_hottest_kernel_on_hopper():
    """The others, and the other architectures, are among the slow tests."""
    launches = [launch for launch in record(torch.bfloat16, 19) if launch.kernel == "logit_gradients"]
    assert len(launches) == 1
    within_budget(launches, (90,), 19)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", REGISTERS)
@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_on_every_architecture(kernel, classes, dtype):
    within_budget([launch for launch in record(dtype, classes) if launch.kernel == kernel], tuple(MATRIX), classes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("classes", [2, 40, 100, 255])
def test_other_numbers_of_classes_do_not_spill(classes):
    within_budget([*record(torch.bfloat16, classes), *record(torch.float32, classes)], (80, 90))
