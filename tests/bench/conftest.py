"""What tests of several commands of the benchmarks have in common."""

from functools import partial

import pytest

from bench import step
from bench.workload import demo_workload


@pytest.fixture
def small_demo(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's size of `bench step`: one image a domain of 64 x 64, two batches, one thread."""
    monkeypatch.setitem(step.SIZES, "demo", partial(demo_workload, 1, 64, 64))
    monkeypatch.setattr("bench.workload.SCENES", 2)
