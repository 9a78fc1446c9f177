"""What a run directory holds beside metrics, checkpoints and pictures, written so that a kill leaves whole files."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssr_fast.engine.environment import environment
from ssr_fast.errors import UserError


def write_head(folder: Path, resolved: dict[str, Any], preset: str, command: Sequence[str], processes: int) -> None:
    """config.yaml and environment.json, before anything long begins.

    Args:
        resolved: the whole configuration.
        preset: that it started from.
        command: how the run was started.
        processes: that train together.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        facts = {**environment(), "preset": preset, "command": shlex.join(command), "processes": processes}
        write_text(folder / "environment.json", json.dumps(facts, indent=1))
    except OSError as error:
        raise UserError(
            f"--run.dir {folder} cannot be written ({error.strerror}): give a folder that you may write to"
        ) from error


def check_stores(folder: Path, now: dict[str, str], resume: bool) -> None:
    """Remember what made the stores that the run reads.

    Args:
        now: their recipes, by option.

    Raises:
        UserError: a resumed run's are others than it began with, so that it would not go on as it began.
    """
    file = folder / "stores.json"
    if not (resume and file.is_file()):
        write_text(file, json.dumps(now, indent=1))
        return
    began: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    for option in sorted(began.keys() | now.keys()):
        if began.get(option) != now.get(option):
            raise UserError(
                f"--{option}: the run in {folder} began with {began.get(option, 'the original files')}, and "
                f"now there is {now.get(option, 'none')}; make the store as it was, or start in a new run directory"
            )


def plain(value: Any) -> Any:
    """Dataclass dictionaries as JSON and YAML know them: tuples become lists, NaN becomes None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a run that was killed, never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
