"""Rows, reads of the device, resume and what a kill leaves behind."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ssr_fast.engine.metrics import MetricLog
from ssr_fast.engine.progress import Progress
from ssr_fast.errors import UserError
from tests.syncfree import NoHostSync


def _rows(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _values(step: int) -> dict[str, Tensor | float]:
    """Losses whose sums depend on the order of addition, in two precisions; a counter; the learning rate."""
    generator = torch.Generator().manual_seed(step)
    loss = torch.randn((), generator=generator) * 10.0 ** (step % 7)
    return {
        "loss": loss,
        "loss/mixed": (loss / 3).bfloat16(),
        "skipped": torch.full((), step // 2),
        "lr": 0.1 / step,
        "images": 4,
    }


def test_a_row_holds_means_counters_and_speed(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 4)
    rows = [log.add(step, _values(step)) for step in range(1, 9)]
    log.close()
    assert [row is not None for row in rows] == [False, False, False, True] * 2
    written = _rows(tmp_path)
    assert written == [row for row in rows if row is not None]
    keys = ["stage", "step", "time", "loss", "loss/mixed", "skipped", "lr", "images_per_second"]
    for row, last in zip(written, (4, 8), strict=True):
        assert list(row) == keys
        window = range(last - 3, last + 1)
        expected = sum(float(_values(step)["loss"]) for step in window) / 4
        assert row["loss"] == pytest.approx(expected, rel=1e-12)
        assert (row["stage"], row["step"], row["lr"]) == ("ssr", last, 0.1 / last)
        assert row["skipped"] == last // 2 and isinstance(row["skipped"], int)
        assert row["images_per_second"] > 0


def test_the_device_is_read_once_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[torch.Size] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.append(tensor.shape)
        with torch._C.DisableTorchFunction():  # the one read that is allowed
            return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    log = MetricLog(tmp_path, "ssr", 3)
    with NoHostSync():
        for step in range(1, 10):
            log.add(step, _values(step))
            assert len(reads) == step // 3
    log.close()


def test_no_value_is_looked_at_inside_a_window(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 100)
    for step in range(1, 10):
        # a meta tensor has no value: any look at it raises
        log.add(step, {"loss": torch.zeros((), device="meta"), "skipped": torch.zeros((), dtype=int, device="meta")})
    log.close()


def test_a_window_does_not_keep_the_graph_of_the_loss(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 3)
    weight = torch.ones((), requires_grad=True)
    for step in (1, 2):
        log.add(step, {"loss": weight * 2})
    assert log._sums is not None and not log._sums.requires_grad


@pytest.mark.parametrize("stopped", [3, 4, 5, 8])
def test_a_resumed_run_writes_the_same_bits(tmp_path: Path, stopped: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = MetricLog(whole, "ssr", 4)
    for step in range(1, 13):
        log.add(step, _values(step))
    log.close()
    log = MetricLog(cut, "ssr", 4)
    for step in range(1, stopped + 1):
        log.add(step, _values(step))
    saved = json.loads(json.dumps(log.state_dict(), allow_nan=False))
    for step in range(stopped + 1, 11):  # it went on, and was killed before the next checkpoint
        log.add(step, {**_values(step), "loss": torch.tensor(7.0)})
    log.close()
    log = MetricLog(cut, "ssr", 4)
    log.load_state_dict(saved)
    log.truncate(stopped)
    for step in range(stopped + 1, 13):
        log.add(step, _values(step))
    log.close()
    timed = ("time", "images_per_second", "data_share")
    left, right = ([{k: v for k, v in row.items() if k not in timed} for row in _rows(f)] for f in (whole, cut))
    assert left == right and len(left) == 3


def test_a_state_survives_values_that_json_does_not_have(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 4)
    log.add(1, {"a": torch.tensor(math.nan), "b": torch.tensor(-math.inf), "c": torch.tensor(0.1)})
    text = json.dumps(log.state_dict(), allow_nan=False)
    other = MetricLog(tmp_path, "ssr", 4)
    other.load_state_dict(json.loads(text))
    assert log._sums is not None and other._sums is not None
    torch.testing.assert_close(other._sums, log._sums, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_finite_is_null_and_only_in_its_window(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 2)
    bad = torch.tensor(math.nan)
    for step, loss in enumerate([torch.tensor(1.0), bad, torch.tensor(3.0), torch.tensor(5.0)], 1):
        log.add(step, {"loss": loss, "norm": torch.tensor(2.0), "lr": math.inf})
    log.evaluation(4, math.nan, {"road": 50.0, "train": math.nan})
    log.close()
    rows = _rows(tmp_path)
    assert [row["loss"] for row in rows[:2]] == [None, 4.0]
    assert [row["norm"] for row in rows[:2]] == [2.0, 2.0]
    assert rows[0]["lr"] is None
    assert rows[2]["eval/miou"] is None and rows[2]["eval/per_class"] == {"road": 50.0, "train": None}


def test_changed_names_are_an_error(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 4)
    log.add(1, {"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="mixed came or went"):
        log.add(2, {"loss": torch.tensor(1.0), "mixed": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="loss came or went"):
        log.add(2, {})
    resumed = MetricLog(tmp_path, "ssr", 4)
    resumed.load_state_dict(log.state_dict())
    with pytest.raises(ValueError, match="resumed window"):
        resumed.add(2, {"other": torch.tensor(1.0)})


def _lines(folder: Path, *lines: str, end: str = "\n") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines) + end)
    return path


def test_truncate_keeps_other_stages_and_drops_a_torn_line(tmp_path: Path) -> None:
    mine = [json.dumps({"stage": "ssr", "step": step, "loss": 0.1}) for step in (2, 4, 6)]
    other = '{"stage": "source_only", "step": 100, "loss": 0.25}'
    path = _lines(tmp_path, other, *mine, '{"stage": "ssr", "st', end="")
    told: list[str] = []
    log = MetricLog(tmp_path, "ssr", 2, told.append)
    log.truncate(4)
    assert path.read_text().splitlines() == [other, *mine[:2]]
    assert len(told) == 1 and "1 unreadable line" in told[0]
    log.truncate(0)
    assert path.read_text().splitlines() == [other]
    assert len(told) == 1


def test_truncate_survives_garbage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\x00\n[1, 2]\nnull\n{"stage": "ssr", "step": 1}\n{"stage": "ssr"}\n\n')
    told: list[str] = []
    MetricLog(tmp_path, "ssr", 2, told.append).truncate(1)
    assert path.read_text().splitlines() == ['{"stage": "ssr", "step": 1}', '{"stage": "ssr"}']
    assert "4 unreadable lines" in told[0]


def test_truncate_without_a_file_does_nothing(tmp_path: Path) -> None:
    MetricLog(tmp_path / "run", "ssr", 2).truncate(0)
    assert not (tmp_path / "run").exists()


def test_a_new_row_never_continues_a_torn_line(tmp_path: Path) -> None:
    whole = '{"stage": "ssr", "step": 2}'
    path = _lines(tmp_path, whole, '{"stage": "s', end="")
    told: list[str] = []
    log = MetricLog(tmp_path, "ssr", 2, told.append)
    log.evaluation(4, 50.0, {})
    log.close()
    lines = path.read_text().splitlines()
    assert lines[0] == whole and json.loads(lines[1])["eval/miou"] == 50.0 and len(lines) == 2
    assert "torn" in told[0]


def test_an_evaluation_does_not_count_as_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("ssr_fast.engine.metrics.time.perf_counter", lambda: now[0])
    log = MetricLog(tmp_path, "ssr", 4)
    row = None
    for step in range(1, 5):
        now[0] += 0.5
        row = log.add(step, {"loss": torch.tensor(1.0), "images": 2})
        if step == 2:
            now[0] += 1000.0
            log.evaluation(step, 50.0, {})
    log.close()
    assert row is not None and row["images_per_second"] == pytest.approx(4.0)


def test_a_row_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: .*--run.dir") as caught:
        MetricLog(blocked, "ssr", 1).add(1, {"loss": torch.tensor(1.0)})
    assert "\n" not in str(caught.value)


def test_tensorboard_shows_the_rows_and_forgets_what_was_truncated(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, "ssr", 1)
    for step in (1, 2, 3):
        log.add(step, {"loss": torch.tensor(float(step))})
    log.truncate(1)
    log.add(2, {"loss": torch.tensor(20.0)})
    log.evaluation(2, 40.0, {"road": 90.0, "train": math.nan})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ssr"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert [event.value for event in board.Scalars("eval/per_class/road")] == [90.0]
    assert "eval/per_class/train" not in board.Tags()["scalars"]


def test_progress_prints_plain_lines_to_a_file() -> None:
    stream = io.StringIO()
    with Progress(8, "ssr", 2, Console(file=stream, width=200)) as progress:
        progress.update(3, None)
        progress.update(4, {"loss": 0.123456, "images_per_second": 7.25, "skipped": 0})
        progress.update(6, {"loss": None, "images_per_second": None, "skipped": 3})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ssr 4/8  loss 0.1235  7.2 img/s  left 0:00:0")
    assert lines[1].startswith("ssr 6/8  loss ?  ? img/s  skipped 3  left ")


def test_progress_draws_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(8, "ssr", 2, Console(file=stream, force_terminal=True, width=120)) as progress:
        progress.update(3, None)
        progress.update(4, {"loss": 0.5, "images_per_second": 7.25})
        progress.update(8, None)
    text = stream.getvalue()
    assert "8/8" in text and "loss 0.5000" in text and "\x1b[" in text
