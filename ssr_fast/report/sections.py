"""The parts of the report as HTML. Every text that comes from a run goes through `escape`."""

import base64
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ssr_fast.report.curves import curve_plot, stage_color
from ssr_fast.report.run_data import RunData, Stage, mean

_MOST_PICTURES = 12
_LARGE_PICTURE = 400_000  # bytes; larger ones are embedded as JPEG
_PICTURE_WIDTH = 1800
_MOST_CURVES = 8
_STRONGEST_GAIN = 40.0  # points of IoU at which a cell has its full colour


def percent(value: float) -> str:
    """One decimal, or a dash for nan."""
    return f"{value:.1f}" if math.isfinite(value) else "–"


def signed(value: float) -> str:
    """A difference with its sign (a true minus), or a dash."""
    return f"{value:+.1f}".replace("-", "−") if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """Seconds as 41 s, 5 min 12 s or 3 h 20 min."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def section(title: str, body: str, hint: str = "") -> str:
    """A titled section; nothing if it has no body."""
    if not body:
        return ""
    line = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{line}{body}</section>"


def lead(stages: tuple[Stage, ...]) -> str:
    """The outcome in one sentence."""
    known = [stage for stage in stages if math.isfinite(stage.miou)]
    if not known and stages:
        return "<p class='lead'>This run had no labelled target images to be scored on.</p>"
    if not known:
        return "<p class='lead'>This run has no evaluation yet.</p>"
    last = known[-1]
    sentence = f"<b>{escape(last.title)}</b> reaches <b>{percent(last.miou)}</b> % mIoU on the target domain"
    changes = [_change(last.miou - stage.miou, stage.title) for stage in known[:-1]]
    if changes:
        sentence += ", " + " and ".join(changes)
    return f'<p class="lead">{sentence}.</p>'


def _change(points: float, other: str) -> str:
    direction = "above" if points >= 0 else "below"
    return f"<b>{abs(points):.1f}</b> points {direction} {escape(other.lower() if other != 'SSR' else other)}"


def bars(stages: tuple[Stage, ...]) -> str:
    """Target mIoU of the stages as bars from 0 to 100."""
    if not any(math.isfinite(stage.miou) for stage in stages):
        return ""
    rows = "".join(_bar(number, stages) for number in range(len(stages)))
    ticks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in (0, 25, 50, 75, 100))
    axis = f'<div class="axis" aria-hidden="true"><div>{ticks}</div></div>'
    return f'<div class="card bars"><h3>Target mIoU in percent</h3>{rows}{axis}</div>'


def _bar(number: int, stages: tuple[Stage, ...]) -> str:
    stage = stages[number]
    value = stage.miou if math.isfinite(stage.miou) else 0.0
    ticks = "".join(
        f'<line class="tick" x1="{x}" x2="{x}" y1="0" y2="26" vector-effect="non-scaling-stroke"/>'
        for x in (25, 50, 75)
    )
    whisker, spread = "", ""
    if math.isfinite(stage.spread):
        low, high = max(value - stage.spread, 0), min(value + stage.spread, 100)
        whisker = (
            f'<line class="whisker" x1="{low:.2f}" x2="{high:.2f}" y1="13" y2="13" vector-effect="non-scaling-stroke"/>'
        )
        spread = f" ± {stage.spread:.1f}"
    gain = f'<span class="gain">{signed(stage.miou - stages[0].miou)}</span>' if number else ""
    return (
        f'<div class="bar{" last" * (number == len(stages) - 1)}"><span class="name">{escape(stage.title)}</span>'
        f'<svg viewBox="0 0 100 26" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(stage.title)}: {percent(stage.miou)} percent mIoU">'
        f'<rect class="track" width="100" height="26"/>{ticks}'
        f'<rect width="{value:.2f}" height="26" fill="{stage_color(stage.title, number)}"/>{whisker}</svg>'
        f'<span class="value"><b>{percent(stage.miou)}</b>{spread}{gain}</span></div>'
    )


def class_table(data: RunData) -> str:
    """IoU of each class in each stage, and the change from the first stage to the last."""
    stages = [stage for stage in data.stages if stage.per_class]
    if not stages:
        return ""
    known = dict.fromkeys(name for stage in stages for name in stage.per_class)
    names = [name for name in data.classes if name in known] + [name for name in known if name not in data.classes]
    head = "".join(f"<th>{escape(stage.title)}</th>" for stage in stages) + (
        "<th>Change</th>" if len(stages) > 1 else ""
    )
    rows = []
    for name in names:
        red, green, blue = data.classes.get(name, (128, 128, 128))
        swatch = f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
        rows.append(
            f"<tr><td>{swatch}{escape(name)}</td>{_cells([s.per_class.get(name, math.nan) for s in stages])}</tr>"
        )
    means = [mean(list(stage.per_class.values())) for stage in stages]
    rows.append(f'<tr class="mean"><td>mean</td>{_cells(means)}</tr>')
    return (
        f'<div class="card scroll"><table><thead><tr><th>Class</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(values: list[float]) -> str:
    best = max((value for value in values if math.isfinite(value)), default=math.nan)
    cells = [f"<td{' class=best' * (value == best and len(values) > 1)}>{percent(value)}</td>" for value in values]
    if len(values) > 1:
        cells.append(_change_cell(values[-1] - values[0]))
    return "".join(cells)


def _change_cell(points: float) -> str:
    if not math.isfinite(points):
        return "<td>–</td>"
    strength = min(abs(points) / _STRONGEST_GAIN, 1.0) * 0.5
    color = "--up" if points >= 0 else "--down"
    return f'<td class="change" style="background:rgb(var({color}) / {strength:.2f})">{signed(points)}</td>'


def pictures(samples: Iterable[Path]) -> str:
    """The comparison pictures, embedded; a damaged file is named instead."""
    found = list(samples)
    figures = [_figure(path) for path in found[:_MOST_PICTURES]]
    if len(found) > _MOST_PICTURES:
        figures.append(f'<p class="hint">{len(found) - _MOST_PICTURES} more pictures lie in samples/.</p>')
    return "".join(figures)


def _figure(path: Path) -> str:
    try:
        kind, content = _embeddable(path)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        return f'<p class="hint">{escape(path.name)} is damaged ({escape(type(error).__name__)}).</p>'
    caption = "" if path.stem.isdecimal() else f"<figcaption>{escape(path.stem)}</figcaption>"
    alt = f"image and labels: {escape(path.stem)}"
    return f'<figure><img loading="lazy" src="{_data_url(kind, content)}" alt="{alt}">{caption}</figure>'


def _embeddable(path: Path) -> tuple[str, bytes]:
    """The picture's type and bytes: a small PNG as it is, a large one reduced and as JPEG with full colour."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        if len(content) <= _LARGE_PICTURE:
            return "png", content
        reduced = picture.convert("RGB")
        if reduced.width > _PICTURE_WIDTH:
            reduced = reduced.resize((_PICTURE_WIDTH, round(reduced.height * _PICTURE_WIDTH / reduced.width)))
        smaller = io.BytesIO()
        reduced.save(smaller, "jpeg", quality=88, subsampling=0)
    return "jpeg", smaller.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def curves(data: RunData) -> str:
    """Target mIoU and losses over the steps, a line for each stage."""
    colors = {title: stage_color(title, number) for number, title in enumerate(data.stage_titles())}
    panels = [("eval/miou", "Target mIoU", "percent")]
    panels += [(key, "Loss" if key == "loss" else _loss_title(key), "loss") for key in data.loss_keys()]
    drawn: list[str] = []
    for key, title, unit in panels:
        lines = data.series(key)
        if not lines or len(drawn) >= _MOST_CURVES:
            continue
        url = _data_url("png", curve_plot(unit, lines, colors))
        drawn.append(
            f'<div class="card"><h3>{escape(title)}</h3><img src="{url}" alt="{escape(title)} over the steps"></div>'
        )
    if not drawn:
        return ""
    note = ""
    if data.damaged_rows:
        note = f'<p class="hint">{data.damaged_rows} lines of metrics.jsonl could not be read and are left out.</p>'
    return f'<div class="curves">{"".join(drawn)}</div>{note}'


def _loss_title(key: str) -> str:
    return f"Loss: {key[len('loss/') :].replace('_', ' ')}"


def what_ran(data: RunData) -> str:
    """The stages' costs, and everything that environment.json knows."""
    body = ""
    if data.stages:
        waits = data.series("data_share")  # of each window; runs of earlier versions have none
        rows = "".join(
            f"<tr><td>{escape(stage.title)}</td><td>{_listed(stage.steps)}</td><td>{_listed(stage.seeds)}</td>"
            f"<td>{duration(stage.seconds)}</td>{_waiting(waits, stage.title)}</tr>"
            for stage in data.stages
        )
        head = "".join(f"<th>{name}</th>" for name in ("Stage", "Steps", "Seed", "Time"))
        head += "<th>Waiting for data</th>" if waits else ""
        body += f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if data.environment:
        rows = "".join(
            f'<tr><td>{escape(name)}</td><td class="text">{escape(value)}</td></tr>'
            for name, value in _flat(data.environment)
        )
        body += (
            f'<details><summary>Machine and versions</summary><div class="card scroll"><table><tbody>{rows}</tbody>'
            "</table></div></details>"
        )
    return body


def _waiting(waits: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """The cell with the mean share of a stage's windows; none where no stage has any."""
    share = mean([value for _, value in waits.get(title, [])])
    return f"<td>{percent(100 * share)}{' %' * math.isfinite(share)}</td>" if waits else ""


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values)) or "–"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{name}", ", ".join(str(item) for item in value)))
        else:
            rows.append((f"{prefix}{name}", "–" if value is None else str(value)))
    return rows


def reproduce(data: RunData) -> str:
    """The command that was run, and those that use its result."""
    folder = shlex.quote(str(data.folder))
    command = data.environment.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    lines = [f"# this run\n{command}\n"] if command else []
    if data.config:
        lines.append(
            "# the same configuration in a new folder\n"
            f"python -m ssr_fast.train --config {folder}/config.yaml --run.dir NEW\n"
        )
    lines.append(f"# score the model on labelled images\npython -m ssr_fast.evaluate {folder} --data.root DATA\n")
    lines.append(f"# label your own images\npython -m ssr_fast.predict {folder} IMAGES --out PREDICTIONS")
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def configuration(data: RunData) -> str:
    """config.yaml, folded."""
    if not data.config:
        return ""
    return f"<details><summary>Show config.yaml</summary><pre>{escape(data.config)}</pre></details>"
