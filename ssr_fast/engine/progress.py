"""What a run shows of itself: a bar on a terminal, a line for each window in a log file."""

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Context manager around a stage's loop.

    It shows numbers of the last window that was read from the device anyway, so it never makes the run wait.

    Args:
        total: steps of the stage.
        name: the stage.
        done: steps done before (a resumed run).
        console: where to; the standard output if None.
    """

    def __init__(self, total: int, name: str, done: int = 0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._name, self._first = total, name, done
        self._started = time.perf_counter()
        self._bar: Bar | None = None
        self._task = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, numbers="")

    def __enter__(self) -> "Progress":
        self._started = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, row: Mapping[str, Any] | None) -> None:
        """Shows that `done` steps are finished; `row` is what `MetricLog.add` returned."""
        numbers = "" if row is None else _numbers(row)
        if self._bar is not None and self._task is not None:
            if row is None:
                self._bar.update(self._task, completed=done)
            else:
                self._bar.update(self._task, completed=done, numbers=numbers)
        elif row is not None:
            self._console.print(
                f"{self._name} {done}/{self._total}  {numbers}  {self._remaining(done)}",
                highlight=False,
                soft_wrap=True,
            )

    def _remaining(self, done: int) -> str:
        steps = done - self._first
        if steps < 1:
            return "left ?"
        seconds = (time.perf_counter() - self._started) / steps * (self._total - done)
        return f"left {timedelta(seconds=round(seconds))}"


def _numbers(row: Mapping[str, Any]) -> str:
    """The loss and the speed of a row of metrics, "?" for what is not finite."""
    loss, speed = row.get("loss"), row.get("images_per_second")
    text = f"loss {'?' if loss is None else f'{loss:.4f}'}  {'?' if speed is None else f'{speed:.1f}'} img/s"
    skipped = row.get("skipped")
    return f"{text}  skipped {skipped}" if skipped else text
