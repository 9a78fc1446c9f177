"""Predictions beside measurements: `python -m bench report [--write]`, the page docs/performance.md.

Predictions are bench/predictions.json; measurements are what the benchmarks left in bench/results/<device>/ of GPUs.
A cell without a measurement says so; a predicted number stands under "predicted" only.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench import document

PREDICTIONS = Path(__file__).with_name("predictions.json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
NOT_MEASURED = "not measured"
MICROSECONDS = {"us": 1.0, "ms": 1e3}
HEAD = """# Performance: predicted and measured

Written by `python -m bench report --write` from `bench/predictions.json` and `bench/results/`; not edited by hand.
Predictions are counted (operators, bytes) or modelled for an H100 at 800 TFLOP/s and 3.0 TB/s, and marked as such; they
err on the optimistic side. Measurements are medians with the 20th and 80th percentile.
"""
Prediction = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench report", description=summary, epilog=details)
    parser.add_argument("--write", action="store_true", help="write docs/performance.md instead of printing it")
    options = parser.parse_args(arguments)
    predictions = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    try:
        devices = read_results(document.RESULTS)
        text = page(predictions, devices)
    except (KeyError, TypeError, ValueError) as error:
        print(f"python -m bench report: a file in {document.RESULTS} is no result: {error!r}", file=sys.stderr)
        return 2
    if not options.write:
        print(text, end="")
        return 0
    if not devices:
        print(
            f"python -m bench report: {document.RESULTS} has no GPU's result: there is nothing to write",
            file=sys.stderr,
        )
        return 2
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """Name of a GPU -> name of a benchmark -> its document."""
    devices: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["device"]["kind"] == "cuda" and not path.stem.startswith(("tests", "sanitize")):
            devices.setdefault(content["device"]["name"], {})[path.stem] = content
    return devices


def page(predictions: Sequence[Prediction], devices: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, Markdown; without a device its columns say that nothing was measured."""
    lines = [HEAD]
    for device, documents in (devices or {NOT_MEASURED: {}}).items():
        lines += [f"## {device}", "", *_about(documents)]
        for section in dict.fromkeys(one["section"] for one in predictions):
            lines += [f"### {section}", "", "| | predicted | measured (p20..p80) | measured / predicted | command |"]
            lines += ["|---|---|---|---|---|"]
            lines += [_line(one, documents) for one in predictions if one["section"] == section]
            lines.append("")
    return "\n".join(lines)


def _about(documents: Mapping[str, Any]) -> list[str]:
    """What each document was measured with."""
    lines = []
    for name, content in documents.items():
        commit = str(content["commit"] or "unknown")[:12] + (" with changes" if content["dirty"] else "")
        facts = [f"driver {content['device'].get('driver') or 'unknown'}"]
        facts += [f"{package} {content['versions'].get(package)}" for package in ("torch", "triton", "cuda")]
        part = "" if content.get("complete", True) else "; cut off, a part"
        lines.append(f"- {name}: {content['date'][:10]}, {', '.join(facts)}, commit {commit}{part}")
    return [*lines, ""] if lines else []


def _line(prediction: Prediction, documents: Mapping[str, Any]) -> str:
    unit, predicted = prediction["unit"], float(prediction["value"])
    cells = [prediction["name"], f"{predicted:g} {unit} ({prediction['source']})"]
    timing = measured(prediction, documents)
    if timing is None:
        cells += [NOT_MEASURED, ""]
    else:
        median, low, high = (float(timing[mark]) / MICROSECONDS[unit] for mark in ("median", "p20", "p80"))
        cells += [f"{median:.4g} ({low:.4g}..{high:.4g}) {unit}", f"{median / predicted:.2f}"]
    command = prediction.get("command")
    return f"| {' | '.join([*cells, f'`{command}`' if command else 'no benchmark measures it alone'])} |"


def measured(prediction: Prediction, documents: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The measurement of a prediction, the shortest if several right rows fit; None without one."""
    if "document" not in prediction:
        return None
    kind = prediction["document"]  # a run of some sizes alone has them behind the name
    rows = [row for name, content in documents.items() if name.split("-")[0] == kind for row in content["rows"]]
    fit = [row for row in rows if row["status"] == "ok" and _fits(row, prediction["where"])]
    found = [row[prediction["field"]] for row in fit if row[prediction["field"]]]
    return min(found, key=lambda timing: float(timing["median"]), default=None)


def _fits(row: Mapping[str, Any], where: Mapping[str, str | list[str]]) -> bool:
    """Each column is one of the values, in which * stands for anything."""
    return all(
        any(fnmatchcase(str(row[column]), value) for value in ([values] if isinstance(values, str) else values))
        for column, values in where.items()
    )
