"""Signals to ranks that train together: all stop after the same step, within 20 s, and a resume is bit for bit."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssr_fast.engine.guard import StopSignal
from tests.faults.ranks_run import (
    RUN,
    at_call,
    check_same,
    check_stopped,
    check_windows,
    done_at,
    errors,
    resume,
    send_self,
)
from tests.ranks import Training, check, train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, float]]:
    """mode, number of ranks -> a run that nothing stopped, and its seconds; trained once."""
    made: dict[tuple[str, int], tuple[Path, float]] = {}

    def of(mode: str, world: int = 2) -> tuple[Path, float]:
        if (mode, world) not in made:
            folder = tmp_path_factory.mktemp(f"whole-{mode}-{world}")
            training, ready = begin(folder, world, [*RUN, f"--parallel.mode={mode}", "--run.dir", str(folder / "run")])
            ended = training.end()
            check(ended)
            made[mode, world] = folder / "run", ended[0].at - ready
        return made[mode, world]

    return of


def note_ready(rank: int, folder: Path) -> None:
    """Touch a file once signals are listened to: before that, they end a process as they end any."""
    real = StopSignal.__enter__

    def noted(self: StopSignal) -> StopSignal:
        stop = real(self)
        (folder / f"ready-{rank}").touch()
        return stop

    StopSignal.__enter__ = noted  # type: ignore[method-assign]


def begin(folder: Path, world: int, options: list[str]) -> tuple[Training, float]:
    """Start some ranks; they, and when all listened."""
    training = Training(folder, world, options, (note_ready, (folder,)))
    until = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < world:
        assert time.monotonic() < until
        time.sleep(0.005)
    return training, time.monotonic()


# (place, its call, signal, to whom, mode); a rank is asked 3 times in each of the evaluations, after steps 4 and 8
MOMENTS = [
    ("step", 5, "SIGTERM", (1,), "fsdp"),
    ("image", 4, "SIGUSR1", (0,), "ddp"),  # in the evaluation of the last step
]
PLACED = [
    ("data", 1),
    ("step", 1),
    ("step", 2),
    ("step", 7),
    ("backward", 6),
    ("reading", 4),
    ("evaluation", 1),
    ("evaluation", 2),
    ("image", 1),
    ("image", 3),
    ("image", 5),
    ("saving", 1),
    ("saving", 2),
    ("writing", 1),
    ("writing", 2),
]
SENT = [("SIGTERM", (1,)), ("SIGINT", (0,)), ("SIGUSR1", (1,)), ("SIGTERM", (0, 1)), ("SIGTERM", (0,))]
MORE = [
    (*placed, *SENT[(number + 2 * (mode == "fsdp")) % len(SENT)], mode)
    for mode in ("ddp", "fsdp")
    for number, placed in enumerate(PLACED)
]


def stop_at(tmp_path: Path, whole: Path, moment: tuple, world: int = 2, more: tuple[str, ...] = ()) -> int:
    """Stop a run, resume it, and compare it with the whole; the step after which it stopped."""
    place, call, name, who, mode = moment
    run = tmp_path / "run"
    options = [*RUN, *more, f"--parallel.mode={mode}", "--run.dir", str(run)]
    ended = train(tmp_path, world, options, (at_call, (who, place, call, send_self, tmp_path, name)))
    step = check_stopped(ended, name, done_at(tmp_path), run)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name == f"step-{step}"]
    ended = resume(tmp_path, run, world)
    check(ended)
    assert f"resumed ssr after step {step} from" in ended[0].out
    check_same(run, whole)
    check_windows(run)
    return step


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(map(str, moment)))
def test_all_stop_after_the_same_step_and_go_on_bit_for_bit(moment, tmp_path: Path, whole) -> None:
    stop_at(tmp_path, whole(moment[-1])[0], moment)


def test_a_signal_after_the_last_step_comes_too_late(tmp_path: Path, whole) -> None:
    run = tmp_path / "run"
    options = [*RUN, "--parallel.mode=ddp", "--run.dir", str(run)]
    ended = train(tmp_path, 2, options, (at_call, ((0,), "finishing", 1, send_self, tmp_path, "SIGTERM")))
    check(ended)
    assert done_at(tmp_path) > 0 and not any(errors(rank) for rank in ended)
    check_same(run, whole("ddp")[0])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MORE, ids=lambda moment: "-".join(map(str, moment)))
def test_all_stop_at_more_moments(moment, tmp_path: Path, whole) -> None:
    stop_at(tmp_path, whole(moment[-1])[0], moment)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_four_ranks_stop_for_one(mode: str, tmp_path: Path, whole) -> None:
    stop_at(tmp_path, whole(mode, 4)[0], ("image", 1, "SIGTERM", (3,), mode), world=4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_random_moment(mode: str, number: int, tmp_path: Path, whole, seed: int) -> None:
    draw = random.Random(seed)
    reference, seconds = whole(mode)
    after = draw.random() * seconds
    name, who = draw.choice(["SIGTERM", "SIGINT", "SIGUSR1"]), draw.choice([(0,), (1,), (0, 1)])
    print(f"{name} to {who} {after:.2f} s after the beginning of {seconds:.2f} s")
    run = tmp_path / "run"
    training, ready = begin(tmp_path, 2, [*RUN, f"--parallel.mode={mode}", "--run.dir", str(run)])
    time.sleep(max(0.0, ready + after - time.monotonic()))
    sent = time.monotonic()
    for rank in who:
        training.send(rank, signal.Signals[name])
    ended = training.end()
    if all(rank.code in (0, -signal.Signals[name]) for rank in ended):  # after the last step; -15: after its last line
        print(f"too late to stop; ended {max(rank.at for rank in ended) - sent:.1f} s later")
        assert not any(errors(rank) for rank in ended)
        assert ended[0].code == 0 or 0 in who
        assert (run / "summary.json").exists() and (run / "report.html").exists()
    else:
        check_stopped(ended, name, sent, run)
        check(resume(tmp_path, run))
    check_same(run, reference)
