"""The waterfall of `bench step`: bars of milliseconds, lever by lever.

`python -m bench.step_picture FILE.json... --out FILE.png` draws one from several documents of the same device, in
which `bench step --json` has put one size each.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.variants import AUTOCAST, LOOP, PLAIN, RELEASED

GREY, BLUE, ORANGE, GREEN = "#8a8a8a", "#3b6fb6", "#c47a2c", "#4a9a3a"
"""The released loop, it with levers, it on transformers' network, ours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 2 for a mistake."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.step_picture", description=summary, epilog=details)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="documents of `python -m bench step --json`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG")
    options = parser.parse_args(arguments)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    devices = sorted({str(one["device"]["name"]) for one in documents})
    if len(devices) > 1:
        print(f"bench.step_picture: the documents are of several devices ({', '.join(devices)})", file=sys.stderr)
        return 2
    draw(options.out, {**documents[-1], "rows": [row for one in documents for row in one["rows"]]})
    print(f"wrote {options.out}")
    return 0


def draw(path: Path, content: dict[str, Any]) -> None:
    """Draw a document of `bench step`, one panel a size; rows without a time are left out."""
    rows = [row for row in content["rows"] if row["step_us"]]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    panels = [[row for row in rows if row["size"] == size] for size in sizes]
    heights = [0.36 * len(panel) + 0.9 for panel in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(panels)), height_ratios=heights or None, squeeze=False)[:, 0]
    for place, size, panel in zip(axes, sizes, panels, strict=False):
        _bars(place, size, panel)
    commit = (content["commit"] or "unknown")[:10] + (" + changes" if content["dirty"] else "")
    title = f"a training step, measured: {content['device']['name']}, commit {commit}, {content['date'][:10]}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    kinds = {
        GREY: "the released loop",
        BLUE: "it, each lever with those above",
        ORANGE: "it on transformers' Segformer",
        GREEN: "our step",
    }
    handles = [Patch(color=colour, label=kind) for colour, kind in kinds.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(name: str) -> str:
    if name in (RELEASED, AUTOCAST):
        return GREY
    return BLUE if name in LOOP else ORANGE if name in PLAIN else GREEN


def _label(row: dict[str, Any]) -> str:
    name, precision = str(row["name"]), str(row["precision"])
    return name if precision in name else f"{name} ({precision})"


def _bars(axes: Axes, size: str, rows: list[dict[str, Any]]) -> None:
    """One size: a bar a row with its 20th and 80th percentile, and what it comes to."""
    times = [row["step_us"]["median"] / 1e3 for row in rows]
    ends = [row["step_us"]["p80"] / 1e3 for row in rows]
    spread = [
        [time - row["step_us"]["p20"] / 1e3 for time, row in zip(times, rows, strict=True)],
        [end - time for time, end in zip(times, ends, strict=True)],
    ]
    colours = [_colour(row["name"]) for row in rows]
    places = range(len(rows))
    axes.barh(places, times, xerr=spread, color=colours, error_kw={"linewidth": 0.8, "capsize": 2})
    for place, row, time, end in zip(places, rows, times, ends, strict=True):
        speed = f", {row['speedup']:.2f}x" if row["speedup"] else ""
        text = f"{time:.1f} ms, {row['images_per_second']:.1f} images/s{speed}"
        wrong = "" if row["status"] == "ok" else f"  {row['status'].upper()}"
        axes.annotate(text + wrong, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(ends))
    axes.set_xlabel("ms a step, median; whiskers p20 to p80", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(size, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
