"""What every test shares: a printed seed, few threads, and the reason why a GPU test is skipped.

PyTorch is imported where it is used: the process that only hands out tests to workers need not wait for it.
"""

import gc
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" in os.environ or (config.getoption("numprocesses", None) and not _is_worker(config)):
        return
    import torch

    # with several pytest workers each gets its share of the cores; more threads than cores only fight
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


def pytest_unconfigure() -> None:
    gc.freeze()  # Python would search every object three more times before the process ends


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for PyTorch: results to the bit, and no thread that waits for a busy core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch, NumPy and random, and printed, so that a failure can be repeated (SSR_TEST_SEED)."""
    value = int(os.environ.get("SSR_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SSR_TEST_SEED={value}")
    import torch

    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value
