"""The runner of ranks: it may not let a test pass whose rank failed, died or hangs."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks
from tests.engine.forked import exit_codes, run_ranks


def test_ranks_meet_in_two_groups(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        for group in (None, ranks.control):
            total = torch.tensor(1.0 + ranks.rank)
            dist.all_reduce(total, group=group)
            assert total.item() == 3
        assert ranks.control is not dist.group.WORLD

    run_ranks(tmp_path / "run", 2, work)
    run_ranks(tmp_path / "run", 2, work)  # by another file


def test_how_each_ended(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise AssertionError("wrong")
        os.kill(os.getpid(), signal.SIGTERM)

    assert exit_codes(tmp_path / "run", 2, work) == [-signal.SIGTERM, 99]
    with pytest.raises(AssertionError):
        run_ranks(tmp_path / "run", 2, work)


def test_one_that_hangs_is_killed(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 0:
            threading.Event().wait()

    codes = exit_codes(tmp_path / "run", 2, work, patience=5)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
