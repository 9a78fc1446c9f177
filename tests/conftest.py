"""What every test shares: a printed seed, few threads, and the reason why a GPU test is skipped."""

import os
import random

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" in os.environ:
        return
    # with several pytest workers each gets its share of the cores; more threads than cores only fight
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch, NumPy and random, and printed, so that a failure can be repeated (SSR_TEST_SEED)."""
    value = int(os.environ.get("SSR_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SSR_TEST_SEED={value}")
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value
