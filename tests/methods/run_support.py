"""Tiny runs of the real command line, for the tests of resume and of bad input."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--run.steps=8 --run.log_every=2 --run.evaluate_every=8 --run.save_every=3 --run.samples=1 --optim.warmup_steps=2 "
    "--self_training.start_step=1 --data.batch_size=1 --data.scenes.source_count=4 --data.scenes.target_count=4 "
    "--data.scenes.evaluation_count=2 --data.scenes.height=32 --data.scenes.width=64 --data.crop=[32,64] "
    "--model.channels=16 --method.name=ssr"
).split()


def start(*options: str, cwd: Path) -> "subprocess.Popen[str]":
    """`python -m ssr_fast.train` with the options, in a process and a process group of its own."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(cwd),
        "SSR_FAST_CACHE": str(cwd / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ssr_fast.train", *options],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(pid: int, name: str = "pt_data_worker") -> list[int]:
    """Living children of a process by the name that the kernel knows; the default is a DataLoader's worker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                head, _, rest = (folder / "stat").read_text().rpartition(")")
            except OSError:  # it has ended since
                continue
            state, parent = rest.split()[:2]
            if int(parent) == pid and state != "Z" and head.partition("(")[2] == name:
                found.append(int(folder.name))
    return found
