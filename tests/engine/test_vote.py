"""The vote: whoever is asked to stop, and whenever, all ranks hear the same at the same call, one call later."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.vote import Vote
from tests.engine.forked import run_ranks

CALLS = 12


def test_a_process_alone_hears_at_once() -> None:
    with StopSignal() as stop:
        vote = Vote(stop, Ranks())
        assert vote() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert vote() == vote() == "SIGUSR1"
        vote.close()


def answers(ranks: Ranks, asked: dict[tuple[int, int], str]) -> list[str | None]:
    """What this rank hears at each call; `asked`: (rank, call) -> the signal that comes right before it."""
    with StopSignal() as stop:
        vote, heard = Vote(stop, ranks), []
        for call in range(CALLS):
            name = asked.get((ranks.rank, call))
            if name is not None:
                os.kill(os.getpid(), getattr(signal, name))
            heard.append(vote())
        vote.close()
        vote.close()  # a second time there is nothing to wait for
    return heard


def wanted(asked: dict[tuple[int, int], str]) -> list[str | None]:
    """The largest number of the first signals that the ranks had by the call before."""
    first: dict[int, tuple[int, str]] = {}
    for (rank, call), name in sorted(asked.items(), key=lambda item: item[0][1]):
        first.setdefault(rank, (call, name))
    heard: list[str | None] = [None]
    for call in range(CALLS - 1):
        names = [name for at, name in first.values() if at <= call]
        heard.append(max(names, key=lambda name: getattr(signal, name)) if names else None)
    return heard


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_hear_the_same_at_the_same_call(world: int, seed: int, tmp_path: Path) -> None:
    draw, patterns = random.Random(seed), [{}, {(world - 1, 0): "SIGTERM"}, {(0, CALLS - 1): "SIGINT"}]
    for _ in range(20):
        places = [(rank, call) for rank in range(world) for call in range(CALLS)]
        chosen = draw.sample(places, draw.randrange(0, world + 1))
        patterns.append({place: draw.choice(["SIGTERM", "SIGUSR1"]) for place in chosen})

    def work(ranks: Ranks) -> None:
        for asked in patterns:
            mine = answers(ranks, asked)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, mine)
            assert everyone == [wanted(asked)] * world, (asked, everyone)

    run_ranks(tmp_path / "ranks", world, work)


def test_a_call_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """Rank 0 makes its first call, and only then lets the others make theirs."""

    def work(ranks: Ranks) -> None:
        with StopSignal() as stop:
            vote, other = Vote(stop, ranks), dist.new_group(backend="gloo")
            if ranks.first:
                assert vote() is None
            dist.barrier(other)
            if not ranks.first:
                assert vote() is None
            vote.close()

    run_ranks(tmp_path / "ranks", 2, work)
