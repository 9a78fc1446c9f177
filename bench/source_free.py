"""Source-free adaptation over seeds: `python -m bench.source_free [--seeds 3] [--json FILE]`.

Every seed draws scenes of its own, trains a source model on them, deletes the source images, and adapts that model to
the target in three ways. Prints mean and standard deviation of the target mIoU.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.demo import FIRST_SEED, summarise
from ssr_fast.config import TrainConfig, problems
from ssr_fast.domains import SCENE_SUPERPIXELS
from ssr_fast.engine.environment import environment
from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.side_by_side import share, side_by_side
from ssr_fast.engine.trainer import Stopped
from ssr_fast.presets import demo_source_free
from ssr_fast.session import Session


def _alone(config: TrainConfig) -> None:
    config.source_free.contrast, config.source_free.vote = 0.0, False


def _contrast(config: TrainConfig) -> None:
    config.source_free.vote = False


def _vote(config: TrainConfig) -> None:
    config.source_free.vote = True


ROWS: dict[str, Callable[[TrainConfig], None]] = {
    "self_training_alone": _alone,
    "contrast": _contrast,
    "contrast_and_vote": _vote,
}
"""What each row changes of the preset."""
GAINS = (("contrast", "source_only"), ("contrast", "self_training_alone"), ("contrast_and_vote", "source_only"))


def run_seed(seed: int, folder: Path) -> list[dict[str, Any]]:
    """The source model of one seed and every row; mIoU in percent and seconds of each."""
    config = demo_source_free()
    assert config.data.scenes is not None
    config.data.scenes = dataclasses.replace(config.data.scenes, seed=seed)
    base = folder / f"source-{seed}"
    results = [_train(config, "source_only", "supervised", seed, base)]
    shutil.rmtree(base / "scenes" / "source")
    for name, change in ROWS.items():
        config = demo_source_free()
        config.data.scenes, config.method.class_weight = None, "none"
        for part in ("target", "evaluation"):
            domain = dataclasses.replace(
                getattr(config.data, part), root=str(base / "scenes" / part), layout="folder", split="all"
            )
            setattr(config.data, part, domain)
        config.source_free.model, config.data.segments = str(base), str(folder / f"segments-{seed}")
        _segments(config)
        change(config)
        results.append(_train(config, name, "source_free", seed, folder / f"{name}-{seed}"))
    return results


def _train(config: TrainConfig, row: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    config.run.stages, config.method.name, config.run.seed, config.run.dir = None, method, seed, str(folder)
    config.run.evaluate_every = config.run.save_every = config.run.steps
    config.run.samples = 1
    if not config.reads_segments():
        config.data.segments = ""
    found = problems(config)
    if found:
        raise ValueError("; ".join(found))
    started = time.perf_counter()
    session = Session(
        config, "demo-source-free", False, ["python", "-m", "bench.source_free"], report=lambda line: None
    )
    with StopSignal() as stop:
        stage = session.train_stage(method, stop)
    return {"row": row, "seed": seed, "miou": stage["target_miou"], "seconds": time.perf_counter() - started}


def _segments(config: TrainConfig) -> None:
    """The target's superpixels, as a user makes them."""
    from ssr_fast.prepare import main

    words = ["--layout", "folder", "--split", "all", "--generator", "superpixels", "--workers", "0"]
    words += ["--scale", str(SCENE_SUPERPIXELS.scale), "--sigma", str(SCENE_SUPERPIXELS.sigma)]
    if main(["masks", config.data.target.root, *words, "--out", config.data.segments]):
        raise RuntimeError("prepare masks failed")


def main() -> None:
    """Command line: --seeds, --first-seed, --json, --jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=0, help="seeds at once; 0: as many as the cores allow")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    at_once, threads = share(options.jobs or options.seeds)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        jobs = [(str(seed), (seed, Path(folder))) for seed in seeds]
        try:
            for _, rows in side_by_side(run_seed, jobs, at_once, threads, stop):
                results += rows
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))
        except Stopped as stopped:
            print(f"stopped by {stopped.args[0]}; what had finished:")
    print(summarise(results, ["source_only", *ROWS], GAINS))


if __name__ == "__main__":
    main()
