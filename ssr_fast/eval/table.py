"""Scores for the terminal and for JSON."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ssr_fast.eval.protocols import Scores

OfficialScores = tuple[float, dict[str, float]]


def score_table(names: Sequence[str], scores: Sequence[Scores], official: OfficialScores | None = None) -> Table:
    """IoU of each class, then mIoU and pixel accuracy; a column for each protocol.

    Args:
        names: the classes, in order.
        scores: one for each protocol.
        official: (mIoU, IoU by class) of cityscapesscripts in percent, as a last column.
    """
    table = Table(header_style="bold")
    table.add_column("class")
    for one in scores:
        table.add_column(one.protocol, justify="right")
    if official is not None:
        table.add_column("cityscapesscripts", justify="right")
    for name in names:
        cells = [_percent(one.per_class.get(name)) for one in scores]
        # Text: a class name may hold what rich takes for markup
        table.add_row(Text(name), *cells, *([_percent(official[1].get(name))] if official else []))
    table.add_section()
    means = [_percent(one.miou) for one in scores] + ([_percent(official[0])] if official else [])
    table.add_row("mIoU", *means, style="bold")
    table.add_row("pixel accuracy", *(_percent(one.accuracy) for one in scores), *([""] if official else []))
    return table


def _percent(value: float | None) -> str:
    """Two decimals; a dash for a class that nobody has, nothing for one that the protocol leaves out."""
    if value is None:
        return ""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def as_json(scores: Sequence[Scores], official: OfficialScores | None = None) -> dict[str, Any]:
    """All numbers for a JSON file, in percent; null where nothing decides."""
    result: dict[str, Any] = {
        "protocols": {
            one.protocol: {
                "miou": _finite(one.miou),
                "accuracy": _finite(one.accuracy),
                "per_class": _finite_values(one.per_class),
            }
            for one in scores
        }
    }
    if official is not None:
        result["official"] = {"miou": _finite(official[0]), "per_class": _finite_values(official[1])}
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_values(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items()}


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, for evaluate_samples' `progress`; nothing where stderr is no terminal."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
