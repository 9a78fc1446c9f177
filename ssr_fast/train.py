"""Train: `python -m ssr_fast.train [PRESET] [--config FILE.yaml] [--section.option value] [--resume [DIR]]`."""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssr_fast.commandline import DONE, STOPPED, run
from ssr_fast.engine import fork_server

if TYPE_CHECKING:
    from ssr_fast.config import TrainConfig
    from ssr_fast.engine.guard import StopSignal
    from ssr_fast.engine.ranks import Ranks
    from ssr_fast.engine.watch import At

COMPARISONS = ("demo", "camvid-day-dusk")
"""Presets with several stages; known here so that nothing slow need be imported to ask."""
_GPU = Path("/dev/nvidiactl")


def several_processes_likely(argv: Sequence[str]) -> bool:
    """Whether these arguments will probably train stages side by side: a guess, made before PyTorch is imported."""
    options = {word.partition("=")[0] for word in argv if word.startswith("-")}
    if options & {"--help", "-h", "--print_config", "--config", "--run.device"} or _GPU.exists():
        return False
    if "WORLD_SIZE" in os.environ:
        return False
    preset = argv[0] if argv and not argv[0].startswith("-") else "demo"
    return "--run.stages" in options or (preset in COMPARISONS and "--method.name" not in options)


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    # PyTorch takes seconds to import, which a process that has been started before this line does at the same time;
    # a quarter of them would be searches for garbage among objects that stay
    gc.disable()
    from ssr_fast.arguments import configure
    from ssr_fast.engine.together import together, told_once

    gc.freeze()
    gc.enable()
    with told_once():
        config, preset, resume = configure(argv)
    return together(config.run, config.parallel, lambda *run: _train(config, preset, resume, argv, *run))


def _train(
    config: "TrainConfig",
    preset: str,
    resume: bool,
    argv: list[str],
    ranks: "Ranks",
    at: "At",
    stop: "StopSignal | None",
) -> int:
    """What one of the processes does; the exit code. Rank 0 says what there is to say."""
    from ssr_fast.engine.trainer import Stopped
    from ssr_fast.session import Session

    session = Session(config, preset, resume, ["python", "-m", "ssr_fast.train", *argv], ranks=ranks, at=at)
    several = f" x {ranks.world} processes ({config.parallel.picked(ranks.world)})" if ranks.world > 1 else ""
    stages = ", ".join(config.stages())
    session.say(f"{preset}: {stages} on {session.device}{several} in {session.precision}, writing {session.folder}")
    try:
        summary = session.train(stop)
    except Stopped as stopped:
        name, step = stopped.args
        if ranks.first:
            resume_with = f"continue with --resume {session.folder}"
            print(f"stopped by {name}: saved after step {step}; {resume_with}", file=sys.stderr)
        return STOPPED
    for row in summary["stages"]:
        score = "trained" if row["target_miou"] is None else f"target mIoU {row['target_miou']:5.1f}"
        session.say(f"{row['name']:>14}: {score}  ({row['seconds']:.0f} s)")
    session.say(f"report: {session.folder / 'report.html'}")
    return DONE


if __name__ == "__main__":
    if several_processes_likely(sys.argv[1:]):
        fork_server.start("ssr_fast.session")
    run(main)
