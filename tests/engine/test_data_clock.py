"""The share of waiting for data: measured with the clock of the images per second, and told once, with the cure."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssr_fast.data.advice import Advice, advise
from ssr_fast.engine.data_clock import DataClock
from ssr_fast.engine.metrics import MetricLog

ADVICE = Advice("give --data.workers 4")


class Run:
    """Steps of 1 s in a simulated time; `waits` has the seconds that each batch takes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], advice: Advice = ADVICE):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.told: list[str] = []
        self.log = MetricLog(folder, "ssr", 2, file="metrics.jsonl")
        self.clock = DataClock(self._batches(waits), advice, self.told.append)
        self.folder, self.done = folder, 0

    def _batches(self, waits: list[float]) -> Iterator[int]:
        for number, wait in enumerate(waits):
            self.now += wait
            yield number

    def train(self, steps: int | None = None) -> None:
        for _ in range(steps) if steps is not None else iter(int, 1):
            if next(self.clock, None) is None:
                return
            self.now += 1.0
            self.done += 1
            numbers = {"loss": torch.tensor(1.0), "images": 4, "waited": self.clock.waited}
            self.clock.judge(self.log.add(self.done, numbers))

    def rows(self) -> list[dict]:
        self.log.close()
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_share_is_of_the_same_time_as_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, [3.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    run.train()
    rows = run.rows()
    assert [row["data_share"] for row in rows] == pytest.approx([4 / 6, 0.0, 1 / 3])
    assert [row["images_per_second"] for row in rows] == pytest.approx([8 / 6, 4.0, 8 / 3])
    assert all("waited" not in row for row in rows)
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ssr"))
    board.Reload()
    assert [event.value for event in board.Scalars("data_share")] == pytest.approx([4 / 6, 0.0, 1 / 3])


def test_an_evaluation_in_a_window_counts_neither_as_time_nor_its_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, [0.0, 0.0, 9.0, 1.0])
    run.train(3)
    run.now += 1000.0
    run.log.evaluation(3, 50.0, {})
    run.train(1)
    assert run.rows()[-1]["data_share"] == pytest.approx(0.5)  # 1 s of the 2 s since the evaluation


def test_one_line_a_stage_and_not_for_the_first_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, [9.0, 0.0, 0.05, 0.05, 0.06, 0.06, 5.0, 5.0])
    run.train(4)
    assert run.told == []  # the start, and 4.8 %
    run.train()
    assert run.told == ["ssr waits for its data in 5.7 % of its time (step 6): give --data.workers 4"]


def test_windows_in_which_a_cache_is_filled_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, [1.0] * 10, Advice("more memory", settled=5))
    run.train(7)
    assert run.told == []  # the window of the steps 5 and 6 began before
    run.train(1)
    assert len(run.told) == 1 and "50.0 %" in run.told[0] and "step 8" in run.told[0]


def test_without_a_cure_the_number_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, [1.0] * 4, Advice())
    run.train()
    assert run.told == ["ssr waits for its data in 50.0 % of its time (step 4)"]


def test_a_stage_that_branches_off_takes_the_rows_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, [1.0, 1.0, 1.0])
    run.train()
    other = MetricLog(tmp_path, "source_only", 2, file="other.jsonl")
    run.log.copy_to(other, ())
    state = other.state_dict()
    other.close()
    copied = json.loads((tmp_path / "other.jsonl").read_text())
    assert copied == run.rows()[0] | {"stage": "source_only"} and copied["data_share"] == pytest.approx(0.5)
    continued = MetricLog(tmp_path, "source_only", 2, file="other.jsonl")
    continued.load_state_dict(state)
    run.now += 3.0
    row = continued.add(4, {"loss": torch.tensor(1.0), "images": 4, "waited": 1.5})
    assert row is not None and row["data_share"] == pytest.approx(0.5)  # of the time since it was loaded
    continued.close()


def test_an_error_of_the_loader_comes_through_and_closing_reaches_it() -> None:
    closed = []

    def batches() -> Iterator[int]:
        try:
            yield 1
            raise KeyError("of the loader")
        finally:
            closed.append(True)

    clock = DataClock(batches(), ADVICE, print)
    assert next(clock) == 1
    clock.close()
    assert closed == [True]
    clock = DataClock(batches(), ADVICE, print)
    with pytest.raises(KeyError, match="of the loader"):
        list(clock)
    DataClock(iter([1]), ADVICE, print).close()  # an iterator that cannot be closed


OWN = {
    "workers": 0, "cores": 8, "batch_size": 2, "images": (24966, 2975), "cached": False, "from_files": True,
    "dali": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({}, ["--data.workers 4", "prepare store"], ["cache"]),
        ({"cores": 2}, ["--data.workers 2"], []),
        ({"cores": 1}, ["prepare store"], ["workers"]),
        ({"workers": 4}, ["raise --data.workers (it is 4, and there are 8 cores)"], []),
        ({"workers": 8}, ["prepare store"], ["workers"]),
        ({"images": (305, 62)}, ["367 images in memory (--data.cache true)"], []),
        ({"images": (305, 62), "from_files": False, "dali": True}, ["--data.workers"], ["cache"]),
        ({"from_files": False}, ["--data.workers"], ["store", "cache"]),
        ({"images": (305,), "cached": True}, ["--data.workers 4"], ["store", "cache"]),
        ({"workers": 8, "from_files": False}, ["more cores or a faster disk"], ["--"]),
    ],
)
def test_the_cure_is_what_is_not_in_use_yet(change: dict, said: list[str], unsaid: list[str]) -> None:
    cure = advise(**(OWN | change)).cure
    assert all(part in cure for part in said) and not any(part in cure for part in unsaid)


def test_a_cache_is_filled_after_three_passes_of_the_larger_set_in_each_worker() -> None:
    assert advise(**OWN).settled == 0
    cached = OWN | {"cached": True, "images": (96, 64), "batch_size": 4}
    assert advise(**cached).settled == 72
    assert advise(**(cached | {"workers": 2})).settled == 144
