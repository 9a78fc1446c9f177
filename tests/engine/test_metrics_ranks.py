"""The metrics of several ranks: rows are means over them, written by the first, and a window is resumed to the bit."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_fast.engine import metrics
from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.ranks import Ranks
from tests.engine.forked import run_ranks

WINDOW = 4
TIMED = ("time", "images_per_second", "data_share")


def value(rank: int, step: int, name: str) -> Tensor:
    """Some number in float32 that is not a short fraction; one metric is 0 on rank 0."""
    draw = torch.Generator().manual_seed(1000 * rank + 10 * step + len(name))
    return torch.zeros(()) if name == "loss/own" and rank == 0 else torch.rand((), generator=draw) / 3


def values(rank: int, step: int) -> dict[str, Tensor | float]:
    floats: dict[str, Tensor | float] = {name: value(rank, step, name) for name in ("loss", "loss/own")}
    return {**floats, "skipped": torch.tensor(step // 2), "lr": 0.1 * step, "images": 3, "waited": 0.0}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: item for name, item in row.items() if name not in TIMED} for row in found]


@pytest.mark.parametrize("world", [2, 3])
def test_rows_are_means_over_the_ranks_and_written_once(world: int, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        log = MetricLog(tmp_path, "ssr", WINDOW, ranks=ranks)
        mine = [log.add(step, values(ranks.rank, step)) for step in range(1, 9)]
        log.evaluation(8, 50.0 + ranks.rank, {"car": 1.0})
        log.close()
        everyone: list[Any] = [None] * world
        kept = [row and {name: item for name, item in row.items() if name not in TIMED} for row in mine]
        dist.all_gather_object(everyone, kept)
        assert all(theirs == kept for theirs in everyone)  # whoever judges a row judges the same one

    run_ranks(tmp_path / "meeting", world, work)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 8, 8] and found[2]["eval/miou"] == 50.0
    for row in found[:2]:
        steps = range(row["step"] - 3, row["step"] + 1)
        for name in ("loss", "loss/own"):
            wanted = sum(float(value(rank, step, name)) for rank in range(world) for step in steps)
            assert row[name] == pytest.approx(wanted / (WINDOW * world), rel=1e-14)
        assert row["skipped"] == row["step"] // 2 and row["lr"] == 0.1 * row["step"]
    assert len(list((tmp_path / "tensorboard" / "ssr").iterdir())) == 1


def test_images_of_all_ranks_and_the_longest_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(ranks: Ranks) -> None:
        clock = [100.0]
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        log = MetricLog(tmp_path, "ssr", 2, ranks=ranks)
        for step, waited in ((1, (0.5, 0.0)), (2, (0.25, 1.0))):
            clock[0] += 2.0
            row = log.add(step, {"loss": torch.ones(()), "images": 6, "waited": waited[ranks.rank]})
        assert row is not None
        assert row["images_per_second"] == 2 * 12 / 4.0 and row["data_share"] == 1.0 / 4.0
        log.close()

    run_ranks(tmp_path / "meeting", 2, work)


@pytest.mark.parametrize("stopped", [1, 3, 4, 6, 7])
def test_a_resumed_window_is_that_of_a_run_that_went_on(stopped: int, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        whole, parts = (MetricLog(tmp_path / name, "ssr", WINDOW, ranks=ranks) for name in ("whole", "parts"))
        for step in range(1, 9):
            whole.add(step, values(ranks.rank, step))
            if step <= stopped:
                parts.add(step, values(ranks.rank, step))
        state, window = json.loads(json.dumps(parts.state_dict())), parts.window().clone()
        parts.close()
        again = MetricLog(tmp_path / "parts", "ssr", WINDOW, ranks=ranks)
        again.load_state_dict(state, window)
        again.truncate(stopped)
        assert torch.equal(again.window(), window) and again.state_dict() == state
        for step in range(stopped + 1, 9):
            again.add(step, values(ranks.rank, step))
        assert torch.equal(again.window(), whole.window())
        for log in (whole, again):
            log.close()

    run_ranks(tmp_path / "meeting", 2, work)
    assert timeless(rows(tmp_path / "parts")) == timeless(rows(tmp_path / "whole"))
    assert len(rows(tmp_path / "whole")) == 2


def test_a_window_of_other_ranks_goes_on_from_its_means(tmp_path: Path) -> None:
    """Two ranks that continue what four began have two of their four parts alone: the mean of all is what counts."""

    def work(ranks: Ranks) -> None:
        sums = {rank: torch.stack([value(rank, 1, "loss"), value(rank, 1, "loss/own")]).double() for rank in range(4)}
        mean = [float(number).hex() for number in torch.stack(list(sums.values())).mean(0)]
        state = {"means": ["loss", "loss/own"], "sums": mean, "count": 1, "world": 4}
        own = torch.zeros(64, dtype=torch.float64)
        own[:2] = sums[ranks.rank]
        log = MetricLog(tmp_path, "ssr", 2, ranks=ranks)
        log.load_state_dict(state, own)
        row = log.add(2, {"loss": torch.zeros(()), "loss/own": torch.zeros(())})
        assert row is not None
        for column, name in enumerate(("loss", "loss/own")):
            wanted = sum(float(sums[rank][column]) for rank in range(4)) / 4 / 2
            assert row[name] == pytest.approx(wanted, rel=1e-14)
        log.close()

    run_ranks(tmp_path / "meeting", 2, work)


def test_more_names_than_a_window_has_room_for_are_refused(tmp_path: Path) -> None:
    room = metrics._WINDOW
    log = MetricLog(tmp_path, "ssr", 2)
    many: dict[str, Tensor | float] = {f"loss/{number}": torch.ones(()) for number in range(room)}
    assert log.add(1, many) is None and log.window().tolist() == [1.0] * room
    with pytest.raises(ValueError, match=f"{room + 1} metrics are averaged, and there is room for {room}"):
        MetricLog(tmp_path, "other", 2).add(1, {**many, "loss": torch.ones(())})
