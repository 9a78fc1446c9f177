"""contrast_loss's Triton kernels in Triton's interpreter, float32, poisoned buffers, against float64; its layouts."""

from math import ceil

import pytest
import torch

from ssr_kernels.contrast.triton import PARTIAL_ROWS, PROGRAMS, Layout, configs
from tests.kernels.contrast_interpreter import CASES
from tests.kernels.interpreter import interpret

BOUND = 1e-5
NAMES = list(CASES)
SHARES = 2
"""Processes, one after another, so that none takes long."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_equal_the_definition(share, seed):
    names = NAMES[share::SHARES]
    found = interpret("tests.kernels.contrast_interpreter", seed, names)
    for name, case in found.items():
        for what, error in case["errors"].items():
            assert error < BOUND, f"{name}: {what} is off by {error}"
        assert case["equal"] in (True, None), f"{name}: a second run gave other numbers"
        splits = [*case["splits"], 0, 0]  # 0: nothing to launch
        assert case["launches"] == [3 * (splits[0] > 0), 2 * (splits[1] > 0)], name
        if CASES[name].n > 200 and CASES[name].split:
            assert min(case["splits"]) > 1, f"{name}: the columns were not split"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["row_sums", "row_gradients"])
def test_splits_cover_the_columns_and_fill_a_large_gpu(kernel, dtype):
    blocks = configs(dtype, torch.device("cpu"))[kernel]
    rows, columns = blocks["BM"], blocks["BN"]
    for n in (*range(1, 600), 1000, 2048, 4095, 4096, 4097, 8192, 12345, 16384, 16897, 20000, 32768, 65536):
        layout = Layout.of(n, rows, columns)
        steps = ceil(n / columns)
        assert layout.blocks == ceil(n / rows) and layout.span % columns == 0
        assert (layout.splits - 1) * layout.span < n <= layout.splits * layout.span  # all columns, no split empty
        assert layout.splits == 1 or layout.splits * n <= PARTIAL_ROWS
        programs = layout.blocks * layout.splits
        rounds = ceil(programs / PROGRAMS) * (layout.span // columns)
        if steps >= 32:  # few rows cannot fill it
            assert rounds <= 1.6 * layout.blocks * steps / PROGRAMS, (n, layout)
