"""The Triton kernels of segloss in Triton's interpreter, float32, poisoned buffers, against float64; their reach."""

import pytest
import torch
import triton

from ssr_kernels.segloss import forms
from ssr_kernels.segloss.triton import SMALLEST, configs, reach
from tests.kernels.interpreter import interpret
from tests.kernels.segloss_interpreter import CASES

BOUND = 1e-5
NAMES = list(CASES)
SHARES = 4
"""Processes, one after another, so that none takes long."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.slow) for part in range(2, SHARES))])
def test_kernels_equal_the_definition(part, seed):
    names = NAMES[part::SHARES]
    found = interpret("tests.kernels.segloss_interpreter", seed, names)
    for name, case in found.items():
        for what, error in case["errors"].items():
            assert error < BOUND, f"{name}: {what} is off by {error}"
        assert case["equal"] in (True, None), f"{name}: a second run gave other numbers"
        assert case["launches"] == ([3, 2] if CASES[name].shape[0] else [0, 0]), name


def test_the_reach_covers_all_pixels_to_which_one_contributes():
    for coarse in (1, 2, 3, 5, 7, 16, 33, 64):
        for fine in (1, 2, 3, 6, 9, 10, 12, 16, 20, 28, 31, 48, 64, 99, 132, 256, 257):
            matrix = forms.resampling_matrix(*forms.taps(fine, coarse, torch.zeros(0, dtype=torch.float64)), coarse)
            most = 0
            for pixel in range(coarse):
                places = (matrix[:, pixel] > 0).nonzero()[:, 0].tolist()
                first = (max((2 * pixel - 1) * fine - coarse, 0) + 2 * coarse - 1) // (2 * coarse)  # the kernels' own
                assert all(first <= place < first + reach(fine, coarse) for place in places), (fine, coarse, pixel)
                most = max([most, *(place - first + 1 for place in places)])
            assert coarse < 3 or reach(fine, coarse) <= most + 2
    assert reach(1024, 256) == 8


def test_every_number_of_classes_has_a_configuration():
    for classes in range(1, 257):
        padded = max(SMALLEST, triton.next_power_of_2(classes))
        found = configs(padded, torch.device("cpu"))
        assert padded >= classes and all(padded % blocks.get("KL", 1) == 0 for blocks in found.values())
        assert set(found) == set(configs(32, torch.device("cpu")))
