"""Train: `python -m ssr_fast.train [PRESET] [--config FILE.yaml] [--section.option value] [--resume [DIR]]`."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_fast.commandline import DONE, STOPPED, run
from ssr_fast.engine import fork_server

COMPARISONS = ("demo", "camvid-day-dusk")
"""Presets with several stages; known here so that nothing slow need be imported to ask."""
_GPU = Path("/dev/nvidiactl")


def several_processes_likely(argv: Sequence[str]) -> bool:
    """Whether these arguments will probably train stages side by side: a guess, made before PyTorch is imported."""
    options = {word.partition("=")[0] for word in argv if word.startswith("-")}
    if options & {"--help", "-h", "--print_config", "--config", "--run.device"} or _GPU.exists():
        return False
    preset = argv[0] if argv and not argv[0].startswith("-") else "demo"
    return "--run.stages" in options or (preset in COMPARISONS and "--method.name" not in options)


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    # PyTorch takes seconds to import, which a process that has been started before this line does at the same time;
    # a quarter of them would be searches for garbage among objects that stay
    gc.disable()
    from ssr_fast.arguments import configure
    from ssr_fast.engine.trainer import Stopped
    from ssr_fast.session import Session

    gc.freeze()
    gc.enable()
    config, preset, resume = configure(argv)
    session = Session(config, preset, resume, ["python", "-m", "ssr_fast.train", *argv])
    print(
        f"{preset}: {', '.join(config.stages())} on {session.device} in {session.precision}, writing {session.folder}"
    )
    try:
        summary = session.train()
    except Stopped as stopped:
        name, step = stopped.args
        print(f"stopped by {name}: saved after step {step}; continue with --resume {session.folder}", file=sys.stderr)
        return STOPPED
    for row in summary["stages"]:
        score = "trained" if row["target_miou"] is None else f"target mIoU {row['target_miou']:5.1f}"
        print(f"{row['name']:>14}: {score}  ({row['seconds']:.0f} s)")
    print(f"report: {session.folder / 'report.html'}")
    return DONE


if __name__ == "__main__":
    if several_processes_likely(sys.argv[1:]):
        fork_server.start("ssr_fast.session")
    run(main)
