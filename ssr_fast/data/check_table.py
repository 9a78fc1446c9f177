"""What `python -m ssr_fast.prepare check` prints and writes: the bad files, then what the data set is made of."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssr_fast.data.images import printable
from ssr_fast.data.index import Diagnosis, total_counts

MAX_ROWS = 50
"""Problems that are printed; the JSON file has all."""


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print a table of problems if there are any, then the summary, the classes and the notes."""
    if diagnosis.rows:
        _print_problems(diagnosis, console)
    summary = Table(show_header=False, box=None)
    for name, value in _summary(diagnosis).items():
        summary.add_row(Text(name, style="bold"), _text(value))
    console.print(summary)
    if diagnosis.labelled and diagnosis.samples:
        _print_classes(diagnosis, console)
    for note in diagnosis.notes:
        console.print(_text(f"note: {note}"), soft_wrap=True)
    bad, left_out = len(diagnosis.fatal), len(diagnosis.rows) - len(diagnosis.fatal)
    if bad:
        console.print(_text(f"{bad} problem{'s' * (bad > 1)}: training will not start", "bold red"))
    else:
        console.print(_text("no problems" + f"; {left_out} file(s) left out" * bool(left_out), "bold green"))


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """All of it as plain JSON values."""
    return {
        "root": str(diagnosis.layout.root),
        "layout": diagnosis.layout.name,
        "labelled": diagnosis.labelled,
        "images": diagnosis.images,
        "labels": diagnosis.labels,
        "usable": len(diagnosis.samples),
        "problems": [
            {"path": str(row.path), "problem": row.problem, "advice": row.advice, "fatal": row.fatal}
            for row in diagnosis.rows
        ],
        "sizes": [
            {"width": width, "height": height, "images": count}
            for (width, height), count in _sizes(diagnosis).most_common()
        ],
        "classes": [
            {"id": k, "name": name, "pixels": pixels, "share": share, "images": images}
            for k, (name, pixels, share, images) in enumerate(_class_rows(diagnosis))
        ],
        "notes": list(diagnosis.notes),
        "digest": diagnosis.index().digest,
    }


def _print_problems(diagnosis: Diagnosis, console: Console) -> None:
    root = diagnosis.layout.root
    table = Table(title=_text(f"Problems in {root}"), title_justify="left")
    for heading in ("file", "problem", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in diagnosis.rows[:MAX_ROWS]:
        path = row.path.relative_to(root) if row.path != root and row.path.is_relative_to(root) else row.path
        advice = row.advice if row.fatal else f"left out; {row.advice}"
        table.add_row(_text(printable(path)), _text(row.problem, "red" if row.fatal else "yellow"), _text(advice))
    console.print(table)
    if len(diagnosis.rows) > MAX_ROWS:
        console.print(_text(f"and {len(diagnosis.rows) - MAX_ROWS} more; --json FILE writes all of them"))


def _print_classes(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(title="Classes", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("name")
    for heading in ("pixels", "share", "images"):
        table.add_column(heading, justify="right")
    rows = _class_rows(diagnosis)
    for k, (name, pixels, share, images) in enumerate(rows):
        table.add_row(str(k), _text(name), f"{pixels:,}", f"{share:.2%}", f"{images:,}")
    everything = sum(sample.width * sample.height for sample in diagnosis.samples)
    ignored = everything - sum(row[1] for row in rows)
    holding = sum(sum(s.counts or ()) < s.width * s.height for s in diagnosis.samples)
    table.add_row("255", "(ignored)", f"{ignored:,}", f"{ignored / everything:.2%}", f"{holding:,}", style="dim")
    console.print(table)


def _class_rows(diagnosis: Diagnosis) -> list[tuple[str, int, float, int]]:
    """(name, pixels, share of all pixels, images that hold it) a class; empty without labels."""
    total = total_counts(diagnosis.samples)
    everything = sum(sample.width * sample.height for sample in diagnosis.samples)
    return [
        (name, int(pixels), int(pixels) / everything, sum(bool(s.counts and s.counts[k]) for s in diagnosis.samples))
        for k, (name, pixels) in enumerate(zip(diagnosis.layout.classes.names, total, strict=False))
    ]


def _summary(diagnosis: Diagnosis) -> dict[str, str]:
    layout, sizes = diagnosis.layout, _sizes(diagnosis)
    summary = {
        "root": str(layout.root),
        "layout": f"{layout.name} ({layout.classes.count} classes: {layout.classes.name})",
        "images": f"{diagnosis.images:,} ({len(diagnosis.samples):,} usable)",
        "labels": f"{diagnosis.labels:,}" if diagnosis.labelled else "not looked at (--unlabelled)",
    }
    if sizes:
        (width, height), count = sizes.most_common(1)[0]
        small, large = min(sizes, key=_area), max(sizes, key=_area)
        summary["sizes"] = (
            f"all {width}x{height}"
            if len(sizes) == 1
            else f"{small[0]}x{small[1]} to {large[0]}x{large[1]}, mostly {width}x{height} ({count:,} images)"
        )
    return summary


def _sizes(diagnosis: Diagnosis) -> Counter[tuple[int, int]]:
    """(width, height) -> images."""
    return Counter((sample.width, sample.height) for sample in diagnosis.samples)


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _text(text: str, style: str = "") -> Text:
    """Text as it is: no markup in file names, and names that are not UTF-8 printed with a mark in place of the byte."""
    return Text(text.encode("utf-8", "replace").decode("utf-8"), style=style)
