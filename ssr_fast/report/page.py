"""The report of a run: one HTML file that needs no network, no script and no other file."""

import math
import os
from html import escape
from pathlib import Path
from typing import Any

from ssr_fast import __version__
from ssr_fast.errors import UserError
from ssr_fast.report import sections
from ssr_fast.report.page_style import STYLE
from ssr_fast.report.run_data import RunData, read_run

REPORT = "report.html"

# The page may load nothing at all; should a text ever slip through as HTML, it cannot run or fetch anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into a run directory from the files that are there.

    Read are summary.json, metrics.jsonl, environment.json, config.yaml and samples/*.png; what is missing is left out.

    Returns:
        the report's path.

    Raises:
        UserError: no such directory, a damaged file, or the directory cannot be written.
    """
    data = read_run(Path(run_dir))
    path = data.folder / REPORT
    temporary = path.with_name(f".{REPORT}.tmp")
    try:
        temporary.write_text(render(data), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make the folder writable or free space"
        ) from error
    return path


def render(data: RunData) -> str:
    """The page of a run as text."""
    changes = sum(bool(stage.per_class) for stage in data.stages) > 1
    body = [
        _header(data),
        sections.bars(data.stages),
        _about(data),
        sections.section(
            "Before and after",
            sections.pictures(data.samples),
            _samples_hint(data),
        ),
        sections.section(
            "Class by class",
            sections.class_table(data),
            "Intersection over union in percent"
            + ("; the change is from the first stage to the last." * changes or "."),
        ),
        sections.section("Training", sections.curves(data)),
        sections.section("What ran", sections.what_ran(data), _device(data)),
        sections.section("Do it again", sections.reproduce(data)),
        sections.section("Configuration", sections.configuration(data)),
        f"<footer>Written by ssr_fast {escape(__version__)}. The numbers come from summary.json and metrics.jsonl "
        "beside this file.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.title)} – ssr_fast</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _samples_hint(data: RunData) -> str:
    """What the pictures show; without a score there were no labels, and so no truth."""
    if any(math.isfinite(stage.miou) for stage in data.stages):
        return "Target images whose labels training never saw: image, truth, and what each stage predicts."
    return "Target images: image, and what each stage predicts."


def _header(data: RunData) -> str:
    kicker = "ssr_fast report" + (f" · preset {escape(data.preset)}" if data.preset else "")
    seconds = [stage.seconds for stage in data.stages if math.isfinite(stage.seconds)]
    facts = {
        "training time of all stages": sections.duration(sum(seconds)) if seconds else "",
        "device": _text(data.environment.get("device")),
        "classes": str(len(data.classes) or ""),
        "protocol": data.protocol if data.protocol != "generic" else "",
    }
    items = "".join(f"<li>{name} <b>{escape(value)}</b></li>" for name, value in facts.items() if value)
    return (
        f'<header><p class="kicker">{kicker}</p><h1>{escape(data.title)}</h1>{sections.lead(data.stages)}'
        + (f'<ul class="facts">{items}</ul>' if items else "")
        + "</header>"
    )


def _about(data: RunData) -> str:
    if not data.about:
        return ""
    paragraphs = "".join(f"<p>{escape(part)}</p>" for part in data.about.split("\n\n"))
    return f'<div class="about">{paragraphs}</div>'


def _device(data: RunData) -> str:
    device = _text(data.environment.get("device"))
    return escape(f"On {device}.") if device else ""


def _text(value: Any) -> str:
    """A device entry, which may be a name or a mapping with one."""
    if isinstance(value, dict):
        return ", ".join(str(part) for part in value.values() if part is not None)
    return "" if value is None else str(value)
