"""The table of one case, for a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .harness import COMPILED, EAGER, Case, Row, speedup
from .measure import Peaks, Timing

WIDTH = 240
"""Columns that no table exceeds; a narrower terminal wraps its lines, which loses less than cut figures."""
LOOSE = 1.5
"""A gradient whose error is more than this many times eager's is marked."""


def console() -> Console:
    """Standard output, without markup: reasons hold brackets."""
    return Console(markup=False, highlight=False, width=WIDTH)


def show(case: Case, rows: Sequence[Row], peaks: Peaks | None, goals: Sequence[str], screen: Console) -> None:
    """Print a case: a row for each provider that ran, then why providers and columns are missing, then the goals."""
    title = f"{rows[0].bench}  {case.name}  {rows[0].dtype.removeprefix('torch.')}"
    if peaks is not None:
        work = f"{case.floor.bytes / 1e6:.1f} MB, {case.floor.flops / 1e9:.2f} GFLOP"
        title += f"  floor {case.floor.microseconds(peaks):.1f} us ({work}); "
        title += f"compulsory work {case.least.microseconds(peaks):.1f} us"
    by_provider = {row.provider: row for row in rows}
    ran = [row for row in rows if row.status != "skipped"]
    cells = [_cells(row, by_provider) for row in ran]
    shown = [index for index in range(len(_COLUMNS)) if any(line[index] != "-" for line in cells)]
    table = Table(title=title, title_justify="left")
    table.add_column("provider", no_wrap=True)
    for index in shown:
        table.add_column(_COLUMNS[index], justify="right", no_wrap=True)
    for row, values in zip(ran, cells, strict=True):
        table.add_row(row.provider, *(values[index] for index in shown))
    screen.print(table)
    for line in (*_remarks(rows), *goals):
        screen.print(f"  {line}", soft_wrap=True)
    screen.print()


_COLUMNS = (
    "forward us",
    "fwd+bwd us",
    "p20..p80",
    "graph us",
    "p20..p80",
    "vs eager",
    "vs compile",
    "floor us",
    "% floor",
    "kernels",
    "peak MB",
    "saved MB",
    "worst error (eager's)",
    "result",
)


def _cells(row: Row, rows: dict[str, Row]) -> list[str]:
    both, graph = row.both_us, row.graph_us
    ratios = [speedup(rows, row.provider, other) for other in (EAGER, COMPILED)]
    return [
        _median(row.forward_us),
        _median(both),
        _spread(both),
        _median(graph),
        _spread(graph),
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        _number(row.floor_us),
        "-" if row.floor_percent is None else f"{row.floor_percent:.0f}%",
        "-" if row.launches is None else str(row.launches),
        _megabytes(row.peak_bytes),
        _megabytes(row.saved_bytes),
        _errors(row),
        row.status if not row.failed else row.status.upper(),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _median(timing: Timing | None) -> str:
    return _number(None if timing is None else timing.median)


def _spread(timing: Timing | None) -> str:
    return "-" if timing is None else f"{_number(timing.p20)}..{_number(timing.p80)}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def worst(row: Row) -> str | None:
    """Name of the quantity with the largest error."""
    return max(row.errors, key=lambda name: row.errors[name], default=None)


def _errors(row: Row) -> str:
    name = worst(row)
    if name is None:
        return "-"
    eager = row.eager_errors.get(name)
    return f"{name} {row.errors[name]:.1e}" + ("" if eager is None else f" ({eager:.1e})")


def loose(row: Row) -> dict[str, float]:
    """Gradients whose error is more than LOOSE times eager's, and how many times. The loss is one number: luck."""
    ratios = {name: row.errors[name] / row.eager_errors[name] for name in row.errors if row.eager_errors.get(name)}
    return {name: ratio for name, ratio in ratios.items() if name != "loss" and ratio > LOOSE and math.isfinite(ratio)}


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        lines += [f"{row.provider}: {row.error}"] if row.error else []
        skipped = " skipped" if row.status == "skipped" else ""
        lines += [f"{row.provider}{skipped}: {reason}" for reason in row.reasons]
        if exceeding := loose(row):
            name = max(exceeding, key=lambda name: exceeding[name])
            others = f" and {len(exceeding) - 1} more" if len(exceeding) > 1 else ""
            lines.append(f"{row.provider}: the error of {name}{others} is {exceeding[name]:.1f} times eager's")
    notes: dict[str, list[str]] = {}
    for row in rows:
        for column, note in row.notes.items():
            notes.setdefault(f"{column}: {note}", []).append(row.provider)
    everywhere = [row.provider for row in rows if row.status != "skipped"]
    return lines + [
        note if set(providers) >= set(everywhere) else f"{', '.join(providers)}: {note}"
        for note, providers in notes.items()
    ]
