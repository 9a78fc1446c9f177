"""Pictures of a run: `python -m bench.plot FILE.json --out DIR` draws speed, % of the floor and saved bytes as PNG."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .harness import COMPILED, EAGER

CASES_A_ROW = 4
Rows = list[dict[str, Any]]
COLOURS = ("#8a8a8a", "#c9a227", "#7b4fa3", "#b58bd1", "#2a7f9e", "#4a9a3a", "#d2691e", "#555555")
"""One a provider, in the order of the benchmark, the same in every picture of a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="what `python -m bench --json` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.file.read_text(encoding="utf-8"))
        rows = document["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"python -m bench.plot: {options.file} is no result of python -m bench: {error!r}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row["bench"] for row in rows):
        for line in draw(document, [row for row in rows if row["bench"] == name], options.out):
            print(line)
    return 0


def draw(document: dict[str, Any], rows: Rows, folder: Path) -> list[str]:
    """Draw the pictures of one benchmark; a line for each that was written or has nothing to show."""
    baseline = COMPILED if any(row["provider"] == COMPILED and row["both_us"] for row in rows) else EAGER
    pictures: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None], float | None], ...] = (
        ("speed", f"speed, {baseline} = 1\n(forward + backward, higher is better)", _speed(rows, baseline), 1.0),
        ("floor", "% of the floor\n(graph replay where captured, higher is better)", _floor, 100.0),
        ("saved", "kept for backward, MB\n(inputs not counted, lower is better)", _saved, None),
    )
    lines = []
    for kind, label, value, mark in pictures:
        bars = {(row["case"], row["provider"]): value(row) for row in rows if row["status"] == "ok"}
        found = {key: height for key, height in bars.items() if height is not None}
        path = folder / f"{rows[0]['bench']}-{kind}.png"
        if found:
            _picture(found, rows, label, _title(document, rows[0]["bench"]), mark, kind == "saved", path)
        lines.append(f"wrote {path}" if found else f"{path.name} not drawn: nothing of it was measured")
    return lines


def _speed(rows: Rows, baseline: str) -> Callable[[dict[str, Any]], float | None]:
    times = {row["case"]: row["both_us"]["median"] for row in rows if row["provider"] == baseline and row["both_us"]}

    def value(row: dict[str, Any]) -> float | None:
        return times[row["case"]] / row["both_us"]["median"] if row["both_us"] and row["case"] in times else None

    return value


def _floor(row: dict[str, Any]) -> float | None:
    return row["floor_percent"]


def _saved(row: dict[str, Any]) -> float | None:
    return None if row["saved_bytes"] is None else row["saved_bytes"] / 1e6


def _title(document: dict[str, Any], bench: str) -> str:
    commit = (document["commit"] or "unknown")[:10] + (" + changes" if document["dirty"] else "")
    return f"{bench}: {document['device']['name']}, commit {commit}, {document['date'][:10]}"


def _picture(
    bars: dict[tuple[str, str], float],
    rows: Rows,
    label: str,
    title: str,
    mark: float | None,
    logarithmic: bool,
    path: Path,
) -> None:
    """Bars grouped by case, a row of axes for each CASES_A_ROW of them, one colour a provider, figures above."""
    cases = [case for case in dict.fromkeys(row["case"] for row in rows) if any(key[0] == case for key in bars)]
    everyone = list(dict.fromkeys(row["provider"] for row in rows))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(everyone)}
    present = {name: colour for name, colour in colours.items() if any(key[1] == name for key in bars)}
    parts = [cases[first : first + CASES_A_ROW] for first in range(0, len(cases), CASES_A_ROW)]
    figure = Figure(figsize=(10.5, 2.9 * len(parts) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(len(parts), sharey=True, squeeze=False)[:, 0], parts, strict=True):
        _bars(axes, part, present, bars)
        if mark is not None:
            axes.axhline(mark, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_yscale("log" if logarithmic else "linear")
        axes.margins(y=0.14)
        axes.set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    handles = [Patch(color=colour, label=name) for name, colour in present.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(present), fontsize=8, frameon=False)
    figure.savefig(path)


def _bars(axes: Axes, cases: list[str], colours: dict[str, str], bars: dict[tuple[str, str], float]) -> None:
    width = 0.84 / len(colours)
    for index, (provider, colour) in enumerate(colours.items()):
        places = [place for place, case in enumerate(cases) if (case, provider) in bars]
        heights = [bars[cases[place], provider] for place in places]
        centres = [place + (index - (len(colours) - 1) / 2) * width for place in places]
        drawn = axes.bar(centres, heights, 0.94 * width, color=colour)
        axes.bar_label(drawn, labels=[_short(height) for height in heights], fontsize=6.5, padding=1.5)
    axes.set_xlim(-0.5, CASES_A_ROW - 0.5 if len(cases) > 1 else 0.5)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    """Three digits at most, or a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
