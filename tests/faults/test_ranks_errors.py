"""An error on one rank alone, or the same one on all: each is told once, and nobody waits for ever."""

import re
from pathlib import Path

import pytest

from tests.faults.ranks_run import (
    RUN,
    at_call,
    check_told,
    damaged_file,
    done_at,
    errors,
    internal_error,
    kill_worker,
    note_workers,
    resume,
    workers_left,
)
from tests.ranks import check, train

pytestmark = pytest.mark.usefixtures("own_cache")


DAMAGED = r"street.png cannot be read \(truncated\): repair the file"
CASES = [
    (rank, place, call, mode)
    for mode in ("ddp", "fsdp")
    for rank in (0, 1)
    for place, call in [("data", 1), ("reading", 1), ("reading", 5), ("image", 2)]
]


@pytest.mark.parametrize(
    ("bad", "place", "call", "mode"),
    [(1, "reading", 4, "ddp"), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_a_damaged_file_of_one_rank(bad: int, place: str, call: int, mode: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*RUN, f"--parallel.mode={mode}", "--run.dir", str(run)]
    ended = train(tmp_path, 2, options, (at_call, ((bad,), place, call, damaged_file, tmp_path)))
    assert ended[bad].code == 2 and len(errors(ended[bad])) == 1
    assert re.fullmatch(rf"error: rank {bad}: {DAMAGED}", errors(ended[bad])[0])
    if (bad, place) == (0, "data"):  # the others wait for what rank 0 finds, and get its error
        assert ended[1].code == 2 and not errors(ended[1])
        return
    check_told(ended, bad, rf"stopped, because rank {bad} failed: {DAMAGED}", done_at(tmp_path))


@pytest.mark.parametrize(
    ("bad", "place", "mode"),
    [
        (1, "step", "ddp"),
        *(
            pytest.param(bad, place, mode, marks=pytest.mark.slow)
            for mode in ("ddp", "fsdp")
            for bad in (0, 1)
            for place in ("backward", "evaluation", "saving")
        ),
    ],
)
def test_an_error_of_ours_on_one_rank(bad: int, place: str, mode: str, tmp_path: Path) -> None:
    options = [*RUN, f"--parallel.mode={mode}", "--run.dir", str(tmp_path / "run")]
    ended = train(tmp_path, 2, options, (at_call, ((bad,), place, 2, internal_error, tmp_path)))
    assert ended[bad].code == 1 and "RuntimeError: the shapes do not fit" in ended[bad].err
    assert "please report it" in ended[bad].err
    reason = rf"stopped, because rank {bad} failed: RuntimeError: the shapes do not fit"
    check_told(ended, bad, reason, done_at(tmp_path))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_loader_process_of_one_rank_dies(mode: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*RUN, "--data.workers=1", f"--parallel.mode={mode}", "--run.dir", str(run)]
    deed = (tmp_path, (1,), "step", 5, kill_worker, tmp_path)
    ended = train(tmp_path, 2, options, (note_workers, deed))
    reason = (
        r"a loader process \(pid \d+\) was killed by signal 9 \(SIGKILL\), probably for want of memory: free memory or "
        rf"lower --data.workers, then continue with --resume {run}, which starts from the last checkpoint \(step 3\)"
    )
    assert ended[1].code == 2 and len(errors(ended[1])) == 1
    assert re.fullmatch(f"error: rank 1: {reason}", errors(ended[1])[0]), ended[1].err
    check_told(ended, 1, f"stopped, because rank 1 failed: {reason}", done_at(tmp_path))
    assert workers_left(tmp_path) == []
    ended = resume(tmp_path, run)
    check(ended)
    assert "resumed ssr after step 3 from" in ended[0].out


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (["--run.step=3", "--optim.lr=-1"], ["unknown option --run.step: did you mean --run.steps?"]),
        (["--optim.lr=-1"], ["--optim.lr must "]),
        (["--resume", "nowhere"], ["--resume nowhere is no run directory"]),
        (["nothing"], ["unknown preset nothing"]),
        (["--run.device=cuda"], ["cuda"]),
        (
            ["--data.scenes=null", "--data.source.root=nowhere", "--data.target.root=nowhere"],
            ["--data.source.root nowhere contr"],
        ),
    ],
)
def test_a_mistake_in_the_options_is_told_once(options: list[str], sentences: list[str], tmp_path: Path) -> None:
    at = [] if options[0].startswith("--resume") else ["--run.dir", str(tmp_path / "run")]
    start = [] if options[0] in ("nothing", "--resume", "--run.device=cuda") else RUN
    ended = train(tmp_path, 2, [*options[:1], *start, *options[1:], *at])
    check(ended, 2)
    assert not errors(ended[1]), ended[1].err
    for sentence in sentences:
        assert ended[0].err.count(sentence) == 1, ended[0].err
    assert all(line.startswith("error: ") for line in errors(ended[0]))
