"""A sample of kill -9 during saves; `python -m tests.faults.kill_saves` does hundreds."""

from pathlib import Path

import pytest
import torch

from tests.faults.kill_saves import Reference, advance, digest, initial, kill_saves


@pytest.mark.parametrize(("ranks", "kills"), [(1, 8), (2, 4)])
def test_a_few_kills_lose_nothing(tmp_path: Path, seed: int, ranks: int, kills: int) -> None:
    threads = torch.get_num_threads()
    try:
        tally = kill_saves(tmp_path, kills, ranks, seed)
    finally:
        torch.set_num_threads(threads)
    assert tally.faults == []
    assert tally.kills == kills and tally.states > kills


def test_the_reference_notices_one_bit() -> None:
    """A rank's part of the whole run, and one bit of it."""
    reference = Reference(2)
    tree = initial(1)
    for _ in range(3):
        advance(tree, 1, 1)
    assert digest(tree, 1, 2) == reference.at(1, 3) != reference.at(0, 3)
    tree["optimizer"]["table"]["square"].view(torch.int32)[-1, -1] ^= 1
    assert digest(tree, 1, 2) != reference.at(1, 3)
