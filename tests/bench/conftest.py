"""What tests of several commands of the benchmarks have in common."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from bench import step
from bench.workload import demo_workload


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The demo's size of `bench step`: one image a domain of 64 x 64, two batches, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(step.SIZES, "demo", partial(demo_workload, 1, 64, 64))
    monkeypatch.setattr("bench.workload.SCENES", 2)
    yield
    torch.set_num_threads(threads)
