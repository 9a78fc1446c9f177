"""A run directory with made-up numbers, as training leaves one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssr_fast.data.labels import ClassSet
from ssr_fast.data.scenes import COLORS, NAMES, ScenesConfig, draw_scene
from ssr_fast.report.pictures import comparison

CLASSES = ClassSet("scenes", NAMES, COLORS)
STAGES = {"source_only": 24.2, "self_training": 43.0, "ssr": 55.7}


def summary(stages: dict[str, float] | None = None, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """summary.json's content; class k scores a little more than class k - 1."""
    rows = []
    for name, miou in (STAGES if stages is None else stages).items():
        for seed in seeds:
            spread = np.linspace(-18, 18, len(NAMES)) * (1 if seed % 2 == 0 else -1)
            per_class = dict(zip(NAMES, np.clip(miou + spread + seed, 0, 100).tolist(), strict=True))
            row = {"name": name, "target_miou": miou + seed, "per_class": per_class}
            rows.append(row | {"seconds": 40.0, "steps": 300, "seed": seed})
    return {
        "preset": "demo",
        "title": "Street scenes, from a clean rendering to a camera",
        "about": "Procedural scenes. It shows the mechanism; it is no evidence for GTA5 to Cityscapes.",
        "protocol": "generic",
        "classes": {"names": list(NAMES), "colors": [list(color) for color in COLORS]},
        "stages": rows,
    }


def metrics(steps: int = 300) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for name, miou in STAGES.items():
        for step in range(10, steps + 1, 10):
            loss = 2.0 * np.exp(-step / 90) + 0.3 + 0.05 * rng.random()
            row = {"stage": name, "step": step, "time": step * 0.1, "loss": loss, "loss/source": 0.7 * loss, "lr": 1e-3}
            rows.append(row | ({"loss/align": 0.2 + 0.3 * np.exp(-step / 50)} if name == "ssr" else {}))
            if step % 50 == 0:
                reached = miou * (1 - np.exp(-step / 100)) / (1 - np.exp(-3))
                rows.append({"stage": name, "step": step, "eval/miou": reached, "eval/per_class": {"road": reached}})
    return rows


def write_samples(folder: Path, count: int = 2) -> None:
    """Comparison pictures of drawn scenes; the fabricated predictions get better from stage to stage."""
    (folder / "samples").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(count):
        image, layout = draw_scene(ScenesConfig(), "target", number)
        predictions = []
        for share, title in ((0.5, "source only"), (0.25, "self-training"), (0.08, "SSR")):
            wrong = np.kron(rng.random((12, 24)) < share, np.ones((8, 8), bool))
            predictions.append((title, np.where(wrong, rng.integers(0, len(NAMES)), layout.label).astype(np.uint8)))
        picture = comparison(image, layout.label, predictions, CLASSES)
        Image.fromarray(picture).save(folder / "samples" / f"{number:02d}.png")


def write_run(folder: Path, content: dict[str, Any] | None = None, curves: bool = False) -> Path:
    """Every file of a finished run; metrics.jsonl only on demand, because drawing curves takes a second."""
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder)
    (folder / "summary.json").write_text(json.dumps(summary() if content is None else content))
    if curves:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    environment = {
        "device": "CPU (2 cores)",
        "command": "python -m ssr_fast.train demo --run.seed 0",
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "backends": {"align": ["triton", "reference"]},
        "commit": None,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text("run:\n  steps: 300\n  seed: 0\n")
    return folder
