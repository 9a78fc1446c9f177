"""A rank that is killed, or never comes back: the others end with one sentence, leave nothing behind, and the run is
continued from its last checkpoint as if nothing had been."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.ranks_run import (
    DEATH_S,
    RUN,
    at_call,
    check_same,
    check_told,
    done_at,
    errors,
    note_workers,
    resume,
    send_self,
    sleep_for_ever,
    workers_left,
)
from tests.ranks import check, train

WORKERS = "--data.workers=1"

STILL = "nothing moved for 5 s (--parallel.hang_timeout)"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """mode, number of ranks -> a run in which nobody died; trained once."""
    made: dict[tuple[str, int], Path] = {}

    def of(mode: str, world: int = 2) -> Path:
        if (mode, world) not in made:
            folder = tmp_path_factory.mktemp(f"whole-{mode}-{world}")
            options = [*RUN, WORKERS, f"--parallel.mode={mode}", "--run.dir", str(folder / "run")]
            check(train(folder, world, options))
            made[mode, world] = folder / "run"
        return made[mode, world]

    return of


def killed(tmp_path: Path, dead: int, place: str, call: int, mode: str, whole: Path, world: int = 2) -> None:
    """Kill a rank before a call of a place; the others end in order; the run that is resumed equals the whole one."""
    run = tmp_path / "run"
    options = [*RUN, WORKERS, f"--parallel.mode={mode}", "--run.dir", str(run)]
    deed = ((dead,), place, call, send_self, tmp_path, "SIGKILL")
    ended = train(tmp_path, world, options, (note_workers, (tmp_path, *deed)))
    assert ended[dead].code == -signal.SIGKILL
    sentence = rf"stopped, because rank {dead} \(host \S+, process \d+\) died, last seen \d+ s ago in [^:]*"
    if dead == 0 and call == 1:  # perhaps nobody has heard of it yet, and it held the store
        sentence = rf"({sentence}|stopped, because rank 0 cannot be reached any more)"
    advice = re.escape(f": look at its output above, then continue with --resume {run}")
    check_told(ended, dead, sentence + advice, done_at(tmp_path))
    if list(tmp_path.glob("workers-*")):
        assert workers_left(tmp_path) == []
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    ended = resume(tmp_path, run, world)
    check(ended)
    if saved:
        assert f"resumed ssr after step {saved[-1]} from" in ended[0].out
    check_same(run, whole)


PLACES = [
    (dead, place, call, mode)
    for mode in ("ddp", "fsdp")
    for dead in (0, 1)
    for place, call in [
        ("data", 1),
        ("step", 1),
        ("step", 6),
        ("backward", 5),
        ("image", 2),
        ("saving", 2),
        ("writing", 1),
    ]
]
SAMPLE = [(1, "step", 5, "ddp")]


@pytest.mark.parametrize(("dead", "place", "call", "mode"), SAMPLE)
def test_the_others_end_and_the_run_goes_on(
    dead: int, place: str, call: int, mode: str, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    killed(tmp_path, dead, place, call, mode, whole(mode))


@pytest.mark.slow
@pytest.mark.parametrize(("dead", "place", "call", "mode"), PLACES)
def test_the_others_end_wherever_it_was(
    dead: int, place: str, call: int, mode: str, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    killed(tmp_path, dead, place, call, mode, whole(mode))


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 2])
def test_three_others_end(dead: int, tmp_path: Path, whole: Callable[..., Path]) -> None:
    killed(tmp_path, dead, "step", 5, "ddp", whole("ddp", 4), world=4)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_sleeps_for_ever_ends_the_run_with_a_table(mode: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*RUN, f"--parallel.mode={mode}", "--parallel.hang_timeout=5", "--run.dir", str(run)]
    ended = train(tmp_path, 2, options, (at_call, ((1,), "step", 5, sleep_for_ever, tmp_path)))
    seconds = max(rank.at for rank in ended) - done_at(tmp_path)
    print(f"ended after {seconds:.1f} s")
    assert seconds < DEATH_S and all(rank.code == 1 for rank in ended)
    text = ended[0].err
    assert f"rank 0: stopped, because {STILL}:" in text
    assert re.search(r"  rank 1 \(host \S+, process \d+\): step 5, for \d+ s\n    .*sleep_for_ever", text), text
    assert text.rstrip().endswith(f"continue with --resume {run}") and "Traceback" not in text
    assert errors(ended[1]) == [f"rank 1: stopped, because {STILL}; rank 0 says where everybody is"]
    assert "\n  rank 0 waits for rank 1\n" in text
    assert (run / "checkpoints" / "step-3").is_dir()
