"""The ranks: what rank 0 does for all, errors that one of them tells, and how they meet."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssr_fast.engine.ranks import Ranks, first, join, launched
from ssr_fast.errors import UserError
from tests.engine.forked import run_ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def told_elsewhere(error: BaseException) -> bool:
    return bool(getattr(error, "told_elsewhere", False))


def test_a_process_alone_does_everything_itself() -> None:
    ranks, values = Ranks(), torch.tensor([1.0, 2.0])
    assert ranks.first and ranks.on_first(lambda: 3) == 3 and ranks.first_then_others(lambda: 4) == 4
    for change in (ranks.mean_, ranks.sum_, ranks.max_):
        change(values)
    ranks.barrier()
    assert values.tolist() == [1.0, 2.0]
    with pytest.raises(UserError) as caught:
        ranks.on_first(lambda: fail("here"))
    assert not told_elsewhere(caught.value)


def fail(reason: str) -> Any:
    raise UserError(reason)


@pytest.mark.parametrize("world", [2, 3])
def test_what_the_first_does_all_get(world: int, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        done: list[int] = []

        def action() -> dict[str, Any]:
            done.append(ranks.rank)
            return {"path": tmp_path, "numbers": [ranks.rank, 2.5, None]}

        assert ranks.on_first(action) == {"path": tmp_path, "numbers": [0, 2.5, None]}
        assert done == ([0] if ranks.first else [])
        assert ranks.on_first(lambda: None) is None

        for error in (UserError("one sentence"), OSError(28, "No space left on device"), ValueError("a fault")):
            with pytest.raises(type(error)) as caught:
                ranks.on_first(lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]
            assert str(caught.value) == str(error) and told_elsewhere(caught.value) == (not ranks.first)
        assert ranks.on_first(lambda: "and on") == "and on"  # after an error they still understand each other

        values = torch.tensor([float(ranks.rank), 1.0])
        ranks.mean_(mean := values.clone())
        ranks.sum_(total := values.clone())
        ranks.max_(most := values.clone())
        assert mean.tolist() == [(world - 1) / 2, 1.0] and most.tolist() == [world - 1, 1.0]
        assert total.tolist() == [world * (world - 1) / 2, world]

    run_ranks(tmp_path / "meeting", world, work)


def test_the_others_find_what_the_first_has_made(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        made = tmp_path / "made"

        def action() -> tuple[int, bool]:
            there = made.exists()
            if not there:
                time.sleep(0.2)  # the others would be there by now
                made.write_text("whole")
            return ranks.rank, there

        # each has its own result; None is one too
        assert ranks.first_then_others(action) == (ranks.rank, not ranks.first)
        calls: list[int] = []
        assert ranks.first_then_others(lambda: calls.append(1)) is None and calls == [1]

        with pytest.raises(UserError, match="no disk") as caught:
            ranks.first_then_others(lambda: fail("no disk") if ranks.first else calls.append(2))
        assert told_elsewhere(caught.value) == (not ranks.first) and calls == [1]
        if not ranks.first:  # an error of another rank is its own
            with pytest.raises(UserError) as caught:
                ranks.first_then_others(lambda: fail("mine"))
            assert not told_elsewhere(caught.value)
        else:
            assert ranks.first_then_others(lambda: 5) == 5

    run_ranks(tmp_path / "meeting", 2, work)


def test_a_common_error_is_told_by_the_first_alone() -> None:
    errors = [Ranks(rank, 3).common(UserError("the same")) for rank in range(3)]
    assert [told_elsewhere(error) for error in errors] == [False, True, True]


def test_without_torchrun_a_process_is_alone(alone: pytest.MonkeyPatch) -> None:
    assert launched() == 1 and first() and join("cpu") == Ranks() and not dist.is_initialized()
    alone.setenv("WORLD_SIZE", "1")
    assert join("cpu") == Ranks() and not dist.is_initialized()


def test_a_process_alone_gets_a_group_where_it_needs_one(alone: pytest.MonkeyPatch) -> None:
    ranks = join("cpu", group=True)
    try:
        assert ranks == Ranks() and dist.get_world_size() == 1
        dist.all_reduce(values := torch.ones(2))
        assert values.tolist() == [1.0, 1.0]
    finally:
        ranks.close()
    assert not dist.is_initialized()
    ranks.close()  # nothing to leave


@pytest.mark.parametrize("text", ["two", "", "0", "-2", "1.5"])
def test_a_number_of_processes_that_is_none(text: str, alone: pytest.MonkeyPatch) -> None:
    alone.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError) as caught:
        launched()
    assert "\n" not in str(caught.value) and "WORLD_SIZE" in str(caught.value) and repr(text) in str(caught.value)


@pytest.mark.parametrize("given", [(), ("RANK",), ("RANK", "LOCAL_RANK", "MASTER_ADDR")])
def test_variables_that_are_missing_are_named_at_once(given: tuple[str, ...], alone: pytest.MonkeyPatch) -> None:
    alone.setenv("WORLD_SIZE", "2")
    for name in given:
        alone.setenv(name, "0")
    with pytest.raises(UserError) as caught:
        join("cpu")
    sentence = str(caught.value)
    assert "WORLD_SIZE is 2" in sentence and "torchrun" in sentence and "\n" not in sentence
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    assert f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set" in sentence
    assert not dist.is_initialized()


def test_more_processes_than_gpus_is_one_sentence(alone: pytest.MonkeyPatch) -> None:
    values = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        alone.setenv(name, value)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 2 of this machine has no GPU .*--nproc-per-node 2$"):
        join("cuda")


def test_the_first_of_a_machine_speaks_before_they_have_met(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("RANK", "8")
    alone.setenv("LOCAL_RANK", "0")
    assert first()
    alone.setenv("LOCAL_RANK", "1")
    assert not first()


def test_joined_processes_talk_by_a_group_of_their_own(tmp_path: Path) -> None:
    """`join` itself, by the variables of torchrun."""
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 9
            try:
                values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="localhost")
                ranks = join("cpu")
                assert (ranks.rank, ranks.world, ranks.local) == (rank, 2, rank)
                assert ranks.control is not None and ranks.control is not dist.group.WORLD
                assert ranks.on_first(lambda: os.getpid()) > 0
                ranks.barrier()
                ranks.close()
                assert not dist.is_initialized()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
