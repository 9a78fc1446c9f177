"""What a run writes: bench/results/<device>/<name>.json with device, versions, commit, date, peaks and every row.

A run writes its document anew after each case, so that one that is cut off leaves what it had: "complete" is false
until everything that was asked for is in it.
"""

import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ssr_fast import __version__
from ssr_fast.engine.environment import environment

from .harness import Row, Setting
from .measure import METHOD, Peaks

RESULTS = Path(__file__).parent / "results"
COMMIT = "SSR_FAST_COMMIT"
"""Environment variable with the commit ("-dirty" behind it where files have changed) of a tree that has no .git."""

MINUTES: dict[str, Any] = {
    "type": float,
    "default": math.inf,
    "metavar": "M",
    "help": "begin no case that would not end within M minutes of the benchmark's start, as long as the longest so far",
}
"""The option --minutes of the benchmarks whose cases are written one by one."""


def document(rows: list[Row], setting: Setting, peaks: Peaks | None) -> dict[str, Any]:
    """Everything that the figures depend on, and the figures, ready for JSON.

    Returns:
        schema, complete (True; False as long as the document grows), date (UTC), device (kind, name, capability,
        memory_gib, driver; of a CPU kind, name, cores, threads), versions (with python and cuda), platform, commit and
        dirty (None where unknown), quick, method (how each column comes about), peaks (measured; None on a CPU), rows
        (harness.Row, times in microseconds; an error that is not finite is the string "inf").
    """
    facts = environment()
    commit = facts["commit"] or os.environ.get(COMMIT) or None
    return {
        "schema": 1,
        "complete": True,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_facts(setting.device, facts["devices"]),
        "versions": {
            **facts["versions"],
            "ssr_fast": __version__,
            "python": facts["python"],
            "cuda": facts["cuda"],
        },
        "platform": facts["platform"],
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
        "quick": setting.quick,
        "method": METHOD,
        "peaks": peaks and dataclasses.asdict(peaks),
        "rows": [finite(dataclasses.asdict(row)) for row in rows],
    }


def device_facts(device: torch.device, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Name and size of the device that was measured."""
    if device.type == "cuda":
        return {"kind": "cuda", **gpus[device.index or 0], "driver": driver()}
    return {"kind": "cpu", "name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def driver() -> str | None:
    """Version of NVIDIA's driver, as nvidia-smi says; None without it."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else None


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    text = facts.read_text(encoding="utf-8") if facts.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else "CPU"


def finite(value: Any) -> Any:
    """JSON has no infinity: the string "inf" stands for it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def default_path(bench: str, device: dict[str, Any]) -> Path:
    """bench/results/<device>/<name>.json; of a CPU, whose figures depend on its load, plainly "cpu"."""
    name = device["name"] if device["kind"] == "cuda" else "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / f"{bench}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a document; its folder is made. The file is whole at any time: an earlier one is replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    growing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        growing.write_text(text, encoding="utf-8")
        growing.replace(path)
    finally:
        growing.unlink(missing_ok=True)
