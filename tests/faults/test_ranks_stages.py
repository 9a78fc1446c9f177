"""Several stages trained by ranks one after another, stopped or broken in any of them, and continued bit for bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.ranks_run import RUN, at_call, check_same, check_stopped, done_at, resume, send_self
from tests.faults.test_resume import rows, tensors
from tests.faults.test_source_free_run import FREE, SCENES, SIZES
from tests.ranks import check, train

BRANCH = [
    *(option for option in RUN if option != "--method.name=ssr" and "start_step" not in option),
    "--run.stages=[supervised,self_training]",
    "--run.save_every=4",
    "--self_training.start_step=4",
]
"""Self-training, which after step 4 evaluates, hands its first steps to the supervised stage and saves; then that."""
SOURCE_FREE = ["demo-source-free", *SIZES, *SCENES, *FREE, "--run.device=cpu", "--data.scenes.evaluation_count=5"]
KINDS = {"branch": (BRANCH, ("source_only", "self_training")), "free": (SOURCE_FREE, ("source_only", "source_free"))}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """kind, mode -> a run that nothing stopped; trained once."""
    made: dict[tuple[str, str], Path] = {}

    def of(kind: str, mode: str) -> Path:
        if (kind, mode) not in made:
            folder = tmp_path_factory.mktemp(f"whole-{kind}-{mode}")
            check(train(folder, 2, [*KINDS[kind][0], f"--parallel.mode={mode}", "--run.dir", str(folder / "run")]))
            made[kind, mode] = folder / "run"
        return made[kind, mode]

    return of


def broken(tmp_path: Path, kind: str, mode: str, place: str, call: int, who: int, name: str, whole: Path) -> None:
    """Send one rank a signal, resume, and compare all stages with those of the whole run."""
    options, stages = KINDS[kind]
    run = tmp_path / "run"
    deed = ((who,), place, call, send_self, tmp_path, name)
    ended = train(tmp_path, 2, [*options, f"--parallel.mode={mode}", "--run.dir", str(run)], (at_call, deed))
    if name == "SIGKILL":
        assert ended[who].code == -signal.SIGKILL and ended[1 - who].code > 0
    else:
        check_stopped(ended, name, done_at(tmp_path), run)
    check(resume(tmp_path, run))
    check_same(run, whole, stages)
    summary = json.loads((run / "summary.json").read_text())
    assert [row["name"] for row in summary["stages"]] == list(stages)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_stop_in_the_evaluation_at_the_branch(mode: str, tmp_path: Path, whole: Callable[[str, str], Path]) -> None:
    broken(tmp_path, "branch", mode, "image", 2, 1, "SIGTERM", whole("branch", mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_supervised_stage_equals_one_trained_alone(
    mode: str, tmp_path: Path, whole: Callable[[str, str], Path]
) -> None:
    run, both = tmp_path / "run", whole("branch", mode)
    options = [option for option in BRANCH if "stages" not in option and "start_step" not in option]
    mine = ["--method.name=supervised", f"--parallel.mode={mode}", "--run.dir", str(run)]
    check(train(tmp_path, 2, [*options, *mine]))
    assert rows(both, "metrics-source_only.jsonl") == rows(run)
    one, two = tensors(run), tensors(both, "checkpoints/source_only")
    assert one.keys() == two.keys() and [name for name in one if not torch.equal(one[name], two[name])] == []


MOMENTS = [
    ("branch", "step", 1),
    ("branch", "step", 4),
    ("branch", "branch", 1),
    ("branch", "saving", 1),  # of the branch
    ("branch", "writing", 2),
    ("branch", "image", 4),
    ("branch", "step", 9),  # the first one of the supervised stage
    ("branch", "step", 11),
    ("branch", "image", 7),
    ("free", "step", 1),
    ("free", "step", 4),
    ("free", "image", 1),
    ("free", "step", 7),
    ("free", "step", 10),
    ("free", "image", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(("number", "moment"), list(enumerate(MOMENTS)))
def test_wherever_a_stage_ends(
    number: int, moment: tuple[str, str, int], name: str, tmp_path: Path, whole: Callable[[str, str], Path]
) -> None:
    kind, place, call = moment
    mode = ("ddp", "fsdp")[number % 2]
    broken(tmp_path, kind, mode, place, call, (number // 2 + (name == "SIGKILL")) % 2, name, whole(kind, mode))
