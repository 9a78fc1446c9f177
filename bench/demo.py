"""The demo's gain over seeds: `python -m bench.demo [--seeds 3] [--rows NAME...] [--json FILE]`.

Every seed draws scenes of its own (source, target and evaluation), its own initial weights and its own samples. Prints
mean and standard deviation of the target mIoU; the first three rows are what `python -m ssr_fast.train` shows, the
others are controls.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssr_fast.config import TrainConfig, problems
from ssr_fast.engine.environment import environment
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.side_by_side import share, side_by_side
from ssr_fast.engine.trainer import Stopped
from ssr_fast.presets import demo
from ssr_fast.session import Session

FIRST_SEED = 1000  # far from the seeds that the preset's values were chosen on (0..9)


def _method(name: str) -> Callable[[TrainConfig], None]:
    def change(config: TrainConfig) -> None:
        config.method.name = name

    return change


def _stages_only(config: TrainConfig) -> None:
    config.ssr.points = ("stage1", "stage2", "stage3", "stage4")


def _all_points(config: TrainConfig) -> None:
    config.ssr.points = None


def _injection(config: TrainConfig) -> None:
    config.ssr.regulariser, config.ssr.points = "injection", None


def _no_self_training(config: TrainConfig) -> None:
    config.self_training.start_step = config.run.steps


def _untrained(config: TrainConfig) -> None:
    config.sam.encoder = "untrained"


ROWS: dict[str, Callable[[TrainConfig], None]] = {
    "source_only": _method("supervised"),
    "self_training": _method("self_training"),
    "ssr": _method("ssr"),
    "ssr_four_stages": _stages_only,
    "ssr_all_points": _all_points,
    "ssr_injection": _injection,
    "ssr_without_self_training": _no_self_training,
    "ssr_untrained_encoder": _untrained,
}


def run_row(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one row with one seed; its mIoU in percent and seconds."""
    config = demo()
    config.run.stages, config.run.seed, config.run.dir = None, seed, str(folder / f"{name}-{seed}")
    config.run.evaluate_every = config.run.save_every = config.run.steps
    config.run.samples = 1
    config.data.scenes = dataclasses.replace(config.data.scenes, seed=seed) if config.data.scenes else None
    config.method.name = "ssr"
    ROWS[name](config)
    found = problems(config)
    if found:
        raise ValueError("; ".join(found))
    started = time.perf_counter()
    session = Session(config, "demo", False, ["python", "-m", "bench.demo"], report=lambda line: None)
    with StopSignal() as stop:
        stage = session.train_stage(config.method.name, stop)
    return {"row": name, "seed": seed, "miou": stage["target_miou"], "seconds": time.perf_counter() - started}


def summarise(results: list[dict[str, Any]], rows: Sequence[str], gains: Sequence[tuple[str, str]]) -> str:
    """Mean, standard deviation (n - 1) and seconds of each row, and the gains of one row over another."""
    lines, mean = [f"{'row':28} {'mIoU':>6} {'std':>5} {'seeds':>5} {'s/run':>6}"], {}
    for name in rows:
        scores = [result["miou"] for result in results if result["row"] == name]
        if not scores:
            continue
        seconds = np.median([result["seconds"] for result in results if result["row"] == name])
        mean[name] = float(np.mean(scores))
        std = float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan")
        lines.append(f"{name:28} {mean[name]:6.1f} {std:5.1f} {len(scores):5d} {seconds:6.0f}")
    for better, worse in gains:
        if better in mean and worse in mean:
            lines.append(f"{better} - {worse}: {mean[better] - mean[worse]:+.1f}")
    return "\n".join(lines)


def main() -> None:
    """Command line: --seeds, --first-seed, --rows, --json, --jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=0, help="runs at once; 0: as many as the cores allow")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    at_once, threads = share(options.jobs or len(options.rows) * options.seeds)
    results = []
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        jobs = [(f"{name}-{seed}", (name, seed, Path(folder))) for seed in seeds for name in options.rows]
        try:
            for _, result in side_by_side(run_row, jobs, at_once, threads, stop):
                results.append(result)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))
        except Stopped as stopped:
            print(f"stopped by {stopped.args[0]}; what had finished:")
    print(summarise(results, list(ROWS), (("self_training", "source_only"), ("ssr", "self_training"))))


if __name__ == "__main__":
    main()
