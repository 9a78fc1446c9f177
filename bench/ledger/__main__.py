"""What a training step asks of the device: `python -m bench ledger [--json FILE] [--picture FILE] [--size B@CROP]`.

Counted on fake tensors, so no GPU is needed and nothing is timed: dispatched operators that do work, host syncs,
backward passes, floating point operations, bytes of all operands and results, bytes that are held for a backward pass.
MiT-B5 with the DAFormer head, 19 classes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.ledger.counting import Counts
from bench.ledger.recipes import RECIPES, SIZES, Size, count
from bench.tables import console

FIELDS = ("operators", "host_syncs", "backwards", "flops", "bytes_moved", "bytes_saved", "bytes_held")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench ledger", description=summary, epilog=details)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the operators, lever by lever")
    sizes = {f"{size.batch}@{size.crop}": size for size in SIZES}
    parser.add_argument("--size", choices=sizes, action="append", help="images a domain and crop (default: all)")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="default: all")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for size in [sizes[name] for name in options.size or sizes]:
        found = []
        for recipe in options.recipe or RECIPES:
            for name, step in RECIPES[recipe].items():
                print(f"counting {size} {recipe}: {name}", file=sys.stderr)
                found.append(row(recipe, name, size, count(step, size)))
        _show(size, found)
        rows += found
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        _draw(options.picture, [one for one in rows if one["size"] == rows[0]["size"]])
    return 0


def row(recipe: str, name: str, size: Size, counts: Counts) -> dict[str, Any]:
    """A row of the JSON file."""
    return {"recipe": recipe, "name": name, "size": str(size), **{field: getattr(counts, field) for field in FIELDS}}


def _show(size: Size, rows: Sequence[dict[str, Any]]) -> None:
    """A size's table."""
    table = Table(title=f"a step at {size}, counted", title_justify="left")
    for heading in ("recipe", "name"):
        table.add_column(heading)
    for heading in ("operators", "host syncs", "backwards", "TFLOP", "GB moved", "GB saved", "at once"):
        table.add_column(heading, justify="right")
    for one in rows:
        kept = (f"{one['bytes_saved'] / 1e9:.2f}", f"{one['bytes_held'] / 1e9:.2f}")
        large = (f"{one['flops'] / 1e12:.2f}", f"{one['bytes_moved'] / 1e9:.0f}", *kept)
        small = (f"{one['operators']:,}", str(one["host_syncs"]), str(one["backwards"]))
        table.add_row(one["recipe"], one["name"], *small, *large)
    console().print(table)


def _draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of the operators, a row each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [one["name"] if one["recipe"] == "daformer" else f"{one['recipe']}: {one['name']}" for one in rows]
    bars = axes.barh(labels, [one["operators"] for one in rows], color="#3b6fb6")
    axes.bar_label(bars, [f"{one['operators']:,}" for one in rows], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(one["operators"] for one in rows))
    axes.set_xlabel(f"operators of a step at {rows[0]['size']} (counted, not timed)")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
