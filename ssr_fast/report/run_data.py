"""What a run directory holds, read for the report. Missing files leave gaps; only damaged ones are errors."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssr_fast.errors import UserError

Color = tuple[int, int, int]

_STAGE_TITLES = {
    "source_only": "Source only",
    "self_training": "Self-training",
    "ssr": "SSR",
    "source_free": "Source-free contrast",
}
_NO_COLOR = (128, 128, 128)


@dataclass(frozen=True)
class Stage:
    """One training stage; several runs of it with different seeds are averaged.

    Attributes:
        name: as in summary.json and metrics.jsonl.
        mious: target mIoU of each run, percent, nan where it is unknown.
        per_class: mean IoU of each class in percent, nan where no run knows it.
        seconds: training time of all runs, nan if unknown.
        steps: training steps of each run.
        seeds: seed of each run.
    """

    name: str
    mious: tuple[float, ...]
    per_class: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    steps: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The stage's name for people."""
        return stage_title(self.name)

    @property
    def miou(self) -> float:
        """Mean over the runs, percent."""
        return mean(self.mious)

    @property
    def spread(self) -> float:
        """Standard deviation over the runs (n - 1), nan for a single run."""
        known = [value for value in self.mious if math.isfinite(value)]
        if len(known) < 2:
            return math.nan
        return math.sqrt(sum((value - self.miou) ** 2 for value in known) / (len(known) - 1))


@dataclass(frozen=True)
class RunData:
    """All that the report shows.

    Attributes:
        folder: the run directory.
        title, about, preset, protocol: texts of summary.json, empty if missing.
        classes: name -> colour, in the order of the train ids.
        stages: in the order in which they ran.
        rows: the rows of metrics.jsonl.
        damaged_rows: lines of metrics.jsonl that could not be read.
        environment: environment.json.
        config: the text of config.yaml.
        samples: the comparison pictures' files.
    """

    folder: Path
    title: str
    about: str
    preset: str
    protocol: str
    classes: Mapping[str, Color]
    stages: tuple[Stage, ...]
    rows: tuple[Mapping[str, Any], ...]
    damaged_rows: int
    environment: Mapping[str, Any]
    config: str
    samples: tuple[Path, ...]

    def stage_titles(self) -> list[str]:
        """All stages' titles, those that only metrics.jsonl knows (still running, or stopped) at the end."""
        names = [stage.name for stage in self.stages] + [str(row["stage"]) for row in self.rows if "stage" in row]
        return [stage_title(name) for name in dict.fromkeys(names)]

    def series(self, key: str) -> dict[str, list[tuple[float, float]]]:
        """Stage title -> (step, value) of a number in metrics.jsonl, for the stages that have it, in their order."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            value = _number(row.get(key)) if key in row else None
            step = _number(row.get("step"))
            if value is not None and math.isfinite(step):
                found.setdefault(stage_title(str(row.get("stage", "run"))), []).append((step, value))
        order = dict.fromkeys([*self.stage_titles(), *found])
        return {title: sorted(found[title]) for title in order if title in found}

    def loss_keys(self) -> list[str]:
        """Names of the losses in metrics.jsonl, the total first."""
        keys = {key for row in self.rows for key in row if key == "loss" or key.startswith(("loss/", "loss_"))}
        return sorted(keys, key=lambda key: (key != "loss", key))


def read_run(folder: Path) -> RunData:
    """Read a run directory.

    Raises:
        UserError: it does not exist, or summary.json or environment.json is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no run directory: give the folder that training wrote to")
    summary = _read_json(folder / "summary.json")
    rows: list[Mapping[str, Any]] = []
    damaged = 0
    for path in sorted(folder.glob("metrics*.jsonl")):  # one file, or one for each stage
        more, more_damaged = _read_rows(path)
        rows, damaged = rows + more, damaged + more_damaged
    config = folder / "config.yaml"
    return RunData(
        folder=folder,
        title=str(summary.get("title") or f"Run {folder.resolve().name}"),
        about=str(summary.get("about") or ""),
        preset=str(summary.get("preset") or ""),
        protocol=str(summary.get("protocol") or ""),
        classes=_classes(summary.get("classes")),
        stages=_stages(summary.get("stages")) or _stages_of_rows(rows),
        rows=tuple(rows),
        damaged_rows=damaged,
        environment=_read_json(folder / "environment.json"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        samples=tuple(sorted((folder / "samples").glob("*.png"))),
    )


def stage_title(name: str) -> str:
    """A stage's name for people."""
    return _STAGE_TITLES.get(name, name.replace("_", " ").capitalize())


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values, nan if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _number(value: Any) -> float:
    """A number of a JSON file; null and other things are nan."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or remove it and write the report without"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object): restore it, or remove it and write the report without")
    return content


def _read_rows(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The rows, and how many lines were no rows: a run that was killed may leave half a line."""
    if not path.is_file():
        return [], 0
    rows: list[Mapping[str, Any]] = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _classes(value: Any) -> dict[str, Color]:
    if not isinstance(value, dict):
        return {}
    names, colors = _list(value.get("names")), _list(value.get("colors"))
    return {str(name): _color(color) for name, color in itertools.zip_longest(names, colors[: len(names)])}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _color(value: Any) -> Color:
    if not isinstance(value, list) or len(value) != 3 or not all(math.isfinite(_number(part)) for part in value):
        return _NO_COLOR
    red, green, blue = (min(max(int(part), 0), 255) for part in value)
    return red, green, blue


def _stages(value: Any) -> tuple[Stage, ...]:
    """The runs of summary.json, those of one name together."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in _list(value):
        if isinstance(run, dict):
            by_name.setdefault(str(run.get("name", "run")), []).append(run)
    return tuple(_stage(name, runs) for name, runs in by_name.items())


def _stages_of_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Without a summary (the run is not over): each stage's last evaluation."""
    last = {str(row.get("stage", "run")): row for row in rows if "eval/miou" in row}
    return _stages(
        [
            {
                "name": name,
                "target_miou": row["eval/miou"],
                "per_class": row.get("eval/per_class"),
                "steps": row.get("step"),
            }
            for name, row in last.items()
        ]
    )


def _stage(name: str, runs: Sequence[Mapping[str, Any]]) -> Stage:
    per_class: dict[str, list[float]] = {}
    for run in runs:
        for class_name, iou in (run.get("per_class") or {}).items():
            per_class.setdefault(str(class_name), []).append(_number(iou))
    seconds = [_number(run.get("seconds")) for run in runs]
    return Stage(
        name=name,
        mious=tuple(_number(run.get("target_miou")) for run in runs),
        per_class={class_name: mean(ious) for class_name, ious in per_class.items()},
        seconds=sum(value for value in seconds if math.isfinite(value))
        if any(map(math.isfinite, seconds))
        else math.nan,
        steps=tuple(int(run["steps"]) for run in runs if math.isfinite(_number(run.get("steps")))),
        seeds=tuple(int(run["seed"]) for run in runs if math.isfinite(_number(run.get("seed")))),
    )
