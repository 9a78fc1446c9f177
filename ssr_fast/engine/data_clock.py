"""How long training waits for its data, and one line about it when that is too long."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ssr_fast.data.advice import Advice

LIMIT = 0.05
"""Share of the time above which waiting for data is worth a line."""

_Item = TypeVar("_Item")


class DataClock(Generic[_Item]):
    """A stage's batches, with the time that the host waits for each.

    It is the host's time. On a GPU the host runs ahead of the device, which still has work while the host waits: the
    share that the metrics show is then an upper bound of the device's idle time. On a CPU it is the idle time itself,
    or, without workers, the time in which the training process reads.

    Args:
        batches: what is measured; closed by `close`.
        advice: what the user can do about it.
        report: takes the line.
    """

    def __init__(self, batches: Iterator[_Item], advice: Advice, report: Callable[[str], None]) -> None:
        self._batches, self._advice, self._report = batches, advice, report
        self._count = 0
        self._window_start = 0
        self._warned = False
        self.waited = 0.0
        """Seconds for the last batch."""

    def __iter__(self) -> "DataClock[_Item]":
        return self

    def __next__(self) -> _Item:
        started = time.perf_counter()
        self._count += 1
        try:
            return next(self._batches)
        finally:
            self.waited = time.perf_counter() - started

    def judge(self, row: Mapping[str, Any] | None) -> None:
        """Warn, once, if a window waited for too much of its time.

        The first window, in which workers start, is not judged, nor one that began before the loader was settled.

        Args:
            row: what `MetricLog.add` returned.
        """
        if row is None:
            return
        first, self._window_start = self._window_start, self._count
        share = row["data_share"]
        if self._warned or first < max(1, self._advice.settled) or share <= LIMIT:
            return
        self._warned = True
        where = f"{row['stage']} waits for its data in {100 * share:.1f} % of its time (step {row['step']})"
        self._report(f"{where}: {self._advice.cure}" if self._advice.cure else where)

    def close(self) -> None:
        """End what reads the batches."""
        close = getattr(self._batches, "close", None)  # a generator has it, another iterator may not
        if close is not None:
            close()
