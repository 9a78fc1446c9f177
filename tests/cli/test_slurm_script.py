"""docs/slurm/train.sbatch in a Slurm that is faked by executables on PATH: what it starts, passes on and requeues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train.sbatch"
OPTIONS = ["gta5-cityscapes", "--data.source.root", "/data/a folder", "--run.steps=10"]

# like srun: starts the command, passes USR1 on, ends with its code
SRUN = """
import json, os, signal, subprocess, sys
words = sys.argv[1:]
first = words.index("torchrun")
note({"srun": words[:first]})
child = subprocess.Popen(words[first:], start_new_session=True)
signal.signal(signal.SIGUSR1, lambda number, frame: child.send_signal(number))
note({"ready": os.getpid()})
sys.exit(child.wait())
"""
TORCHRUN = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
note({"torchrun": sys.argv[1:]})
note({"started": True})
end = time.monotonic() + 60
while os.environ["FAKE_RUN"] == "long" and not asked and time.monotonic() < end:
    time.sleep(0.02)
if asked:
    time.sleep(0.7)
    note({"saved": True})
sys.exit(int(os.environ["FAKE_CODE"]))
"""
SCONTROL = """
import sys
note({"scontrol": sys.argv[1:]})
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(f"node{number}" for number in range(3000)))  # more than a pipe holds
"""
NOTE = """#!{python}
import json
def note(what):
    with open({log!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
"""


class Slurm:
    """A folder of executables, what they noted, and the script in their environment."""

    def __init__(self, folder: Path) -> None:
        self.log, self.bin, self.run = folder / "log", folder / "bin", folder / "a run"
        self.bin.mkdir()
        for name, text in (("srun", SRUN), ("torchrun", TORCHRUN), ("scontrol", SCONTROL)):
            self.write(name, NOTE.format(python=sys.executable, log=str(self.log)) + text)
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "70123",
            "SLURM_JOB_NODELIST": "node[0-2999]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            "FAKE_RUN": "short",
            "FAKE_CODE": "0",
        }

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = ["bash", str(SCRIPT), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**self.environment, **environment}, **pipes)

    def notes(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def noted(self, key: str) -> object:
        """The one note of this name."""
        [found] = [note[key] for note in self.notes() if key in note]
        return found

    def wait_for(self, *keys: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not all(any(key in note for note in self.notes()) for key in keys):
            assert time.monotonic() < end, self.notes()
            time.sleep(0.02)

    def requeued(self) -> bool:
        return any(note.get("scontrol") == ["requeue", "70123"] for note in self.notes())


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_the_first_start_begins_a_run(slurm):
    assert ended(slurm.start(str(slurm.run), *OPTIONS)) == (0, "")
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--wait=300"} <= set(slurm.noted("srun"))
    options = get_args_parser().parse_args(slurm.noted("torchrun"))  # torchrun's own: a wrong option ends the test
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node0:20123", "70123-0")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(options.signals_to_handle.split(","))
    assert options.max_restarts == 0  # a failed run must not begin again by itself
    assert options.module and options.training_script == "ssr_fast.train"
    assert options.training_script_args == [*OPTIONS, "--run.dir", str(slurm.run)]
    assert not slurm.requeued()


def test_every_later_start_resumes(slurm):
    slurm.run.mkdir()
    (slurm.run / "config.yaml").write_text("")
    assert ended(slurm.start(str(slurm.run), *OPTIONS, SLURM_RESTART_COUNT="3")) == (0, "")
    options = get_args_parser().parse_args(slurm.noted("torchrun"))
    assert options.training_script_args == ["--resume", str(slurm.run)] and options.rdzv_id == "70123-3"


def test_when_time_is_up_the_run_saves_before_it_is_requeued(slurm):
    process = slurm.start(str(slurm.run), *OPTIONS, FAKE_RUN="long", FAKE_CODE="1")
    slurm.wait_for("ready", "started")
    process.send_signal(signal.SIGUSR1)  # to the shell alone, as B:USR1 says
    code, out = ended(process)
    assert code == 1 and "time is up: job 70123 goes back into the queue" in out
    names = [name for note in slurm.notes() for name in note]
    assert slurm.requeued() and names.index("saved") < len(names) - 1 and names[-1] == "scontrol"


def test_a_run_that_ends_well_after_the_signal_is_not_requeued(slurm):
    process = slurm.start(str(slurm.run), *OPTIONS, FAKE_RUN="long")
    slurm.wait_for("ready", "started")
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == (0, "") and not slurm.requeued() and slurm.noted("saved")


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_is_not_requeued(slurm, code):
    assert ended(slurm.start(str(slurm.run), *OPTIONS, FAKE_CODE=str(code))) == (code, "")
    assert not slurm.requeued()


def test_without_arguments_it_says_how_it_is_used(slurm):
    code, out = ended(slurm.start())
    assert code == 2 and out.startswith("usage: sbatch train.sbatch RUN_DIR PRESET") and slurm.notes() == []


def test_slurm_reads_its_options():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found = [line.split()[1] for line in lines[:first] if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= set(found)
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # Slurm would not read them


TRAIN = """
import os, signal, sys, time
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
print("started", os.environ["RANK"], os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)
print("saved", os.environ["RANK"], asked[0], flush=True)
sys.exit(3)
"""


def test_the_real_torchrun_passes_the_signal_on_and_ends_with_another_code(slurm, tmp_path):
    package = tmp_path / "code" / "ssr_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(TRAIN)
    slurm.write("torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    slurm.write("scontrol", (slurm.bin / "scontrol").read_text().replace("node{number}", "localhost"))
    environment = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            ["bash", str(SCRIPT), str(slurm.run), "demo"],
            env={**slurm.environment, **environment, "PYTHONPATH": str(package.parent)},
            cwd=tmp_path,  # -m would find the real package in the checkout
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 120
        while out.read_text().count("started") < 2:
            assert process.poll() is None and time.monotonic() < end, out.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=60)
    text = out.read_text()
    assert text.count("saved") == 2 and text.count("SIGUSR1") >= 2, text
    assert code == 1 and slurm.requeued(), text
    assert f"['demo', '--run.dir', '{slurm.run}']" in text
