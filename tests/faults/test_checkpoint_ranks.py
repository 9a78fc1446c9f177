"""Checkpoints of several ranks: saved together, continued by one, and a rank that cannot write, read or see them."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ssr_fast.engine import dcp_files
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.state import rng_state
from ssr_fast.errors import UserError
from tests.engine.forked import run_ranks


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_save_and_load_and_one_continues(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        mesh, own = init_device_mesh("cpu", (2,)), str(ranks.rank)
        whole = torch.arange(35.0).reshape(7, 5)  # 7 rows: the shards are uneven
        torch.manual_seed(ranks.rank)
        told: list[str] = []
        store = CheckpointStore(folder, 2, background=background, report=told.append, ranks=ranks)
        for step in (1, 2):
            shared = torch.full((3,), float(step))
            sharded = distribute_tensor(whole * step, mesh, [Shard(0)])
            store.save(step, {"shared": shared, "sharded": sharded, "rng": {own: rng_state()}, "step": step})
            shared.zero_()
            sharded.to_local().zero_()
        store.wait()
        assert store.written == 2
        drawn = torch.rand(4)
        state: dict[str, Any] = {
            "shared": torch.zeros(3),
            "sharded": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)]),
            "rng": {own: rng_state()},
            "step": 0,
        }
        dist.barrier()
        if ranks.first:
            (folder / "step-2" / "__1_0.distcp").write_bytes(b"")
        dist.barrier()
        path = store.latest()
        assert path == folder / "step-1", path
        assert len(told) == (1 if ranks.first else 0), told
        restored = store.load(path, state)
        assert restored.missing == () and restored.world_size == 2 and state["step"] == 1
        torch.set_rng_state(state["rng"][own]["torch"])
        assert torch.equal(torch.rand(4), drawn)
        assert torch.equal(state["sharded"].full_tensor(), whole) and state["shared"].eq(1).all()

    run_ranks(folder, 2, work)
    store = CheckpointStore(folder, 2)
    path = store.latest()
    assert path == folder / "step-1"
    state: dict[str, Any] = {"shared": torch.zeros(3), "sharded": torch.zeros(7, 5), "rng": {"0": rng_state()}}
    restored = store.load(path, state)
    assert restored.world_size == 2 and restored.missing == ()
    assert torch.equal(state["sharded"], torch.arange(35.0).reshape(7, 5))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_cannot_write_is_one_sentence_on_every_rank(tmp_path: Path, broken: int, background: bool) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        store = CheckpointStore(folder, 2, ranks=ranks, background=background)
        state = {"x": torch.zeros(100), "rng": {str(ranks.rank): rng_state()}}
        store.save(1, state)
        store.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if ranks.rank == broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match=f"step 2 could not be written .*: rank {broken}: File too large"):
            store.save(2, state)
            store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert store.latest() == folder / "step-1" and store.written == 1

    run_ranks(folder, 2, work)
    assert sorted(os.listdir(folder)) == ["step-1"]


def test_where_the_run_goes_on_the_first_rank_says_so_and_the_last_save_raises(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        told: list[str] = []
        store = CheckpointStore(folder, 2, ranks=ranks, background=True, on_error="continue", report=told.append)
        state = {"x": torch.zeros(100), "rng": {str(ranks.rank): rng_state()}}
        store.save(1, state)
        store.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        store.save(2, state)
        store.wait()
        line = (
            "the checkpoint of step 2 could not be written (rank 1: File too large): training goes on; "
            "the last whole checkpoint is step-1"
        )
        assert told == ([line] if ranks.first else [])
        with pytest.raises(UserError, match="step 3 could not be written .*: rank 1: File too large"):
            store.save(3, state, final=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.save(4, state)
        store.wait()
        assert store.written == 4 and len(told) == ranks.first

    run_ranks(folder, 2, work)
    assert sorted(os.listdir(folder)) == ["step-1", "step-4"]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_without_memory_for_the_copy_is_one_sentence_on_every_rank(tmp_path: Path, broken: int) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        store = CheckpointStore(folder, 2, ranks=ranks, background=True)
        copies = dcp_files.host_copies

        def no_memory(tensors: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate\nmemory")

        if ranks.rank == broken:
            dcp_files.host_copies = no_memory
        with pytest.raises(UserError, match=f"step 1 .*rank {broken}: .*can't allocate memory"):
            store.save(1, {"x": torch.zeros(3)})
        dcp_files.host_copies = copies
        store.save(2, {"x": torch.zeros(3)})
        assert store.latest() == folder / "step-2"

    run_ranks(folder, 2, work)


def test_the_thread_and_the_main_thread_may_talk_at_the_same_time(tmp_path: Path) -> None:
    """Their messages would cross on one group: objects of one would be read as those of the other, or hang."""
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        store = CheckpointStore(folder, 2, ranks=ranks, background=True)
        for step in range(1, 7):
            store.save(step, {"x": torch.full((200,), float(step)), "rng": {str(ranks.rank): torch.zeros(3)}})
            for number in range(40):
                said = ranks.on_first(lambda number=number: ("main", number))
                assert said == ("main", number)
                time.sleep(0.0005 * ranks.rank)
        state = {"x": torch.zeros(200)}
        path = store.latest()
        assert path is not None
        store.load(path, state)
        assert state["x"].eq(6).all()

    run_ranks(folder, 2, work)
    assert sorted(os.listdir(folder)) == ["step-5", "step-6"]


def test_the_newest_and_the_best_are_kept_by_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        store = CheckpointStore(folder, 2, ranks=ranks, background=True)
        for step, score in enumerate([10.0, 50.0, 20.0, None, 40.0], 1):
            store.save(step, {"x": torch.tensor(step)}, score=score)
        assert store.best() == folder / "step-2"  # on every rank

    run_ranks(folder, 2, work)
    assert sorted(os.listdir(folder)) == ["step-2", "step-4", "step-5"]


def test_a_folder_that_a_rank_does_not_share_is_one_sentence(tmp_path: Path) -> None:
    def opened(ranks: Ranks) -> None:
        with pytest.raises(UserError, match=r"rank 1: there is no folder .*own1.*all machines share \(--run.dir\)"):
            CheckpointStore(tmp_path / f"own{ranks.rank}", 2, ranks=ranks)

    run_ranks(tmp_path / "opened", 2, opened)

    def saved(ranks: Ranks) -> None:
        folder = tmp_path / f"disk{ranks.rank}"
        folder.mkdir()
        store = CheckpointStore(folder, 2, ranks=ranks)
        with pytest.raises(UserError, match="step 1 .*rank 0: __1_0.distcp of another rank is not there"):
            store.save(1, {"rng": {str(ranks.rank): torch.zeros(3)}})
        assert ranks.rank or os.listdir(folder) == []

    run_ranks(tmp_path / "saved", 2, saved)


def test_a_folder_that_cannot_be_made_is_one_sentence_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")

    def work(ranks: Ranks) -> None:
        with pytest.raises(UserError, match="checkpoints cannot be kept"):
            CheckpointStore(tmp_path / "run", ranks=ranks)

    run_ranks(tmp_path / "run", 2, work)


def test_a_checkpoint_that_fits_one_rank_alone_is_loaded_by_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        store = CheckpointStore(folder, 2, ranks=ranks)
        store.save(1, {"x": torch.ones(3)})
        state = {"x": torch.zeros(3 + ranks.rank)}
        with pytest.raises(UserError, match=r"rank 1: .* x has shape \[3\] there and \[4\] here"):
            store.load(folder / "step-1", state)
        assert state["x"].eq(0).all()
        again = {"x": torch.zeros(3)}
        store.load(folder / "step-1", again)
        assert again["x"].eq(1).all()

    run_ranks(folder, 2, work)


def test_a_folder_that_vanishes_is_one_sentence_on_every_rank_and_is_not_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        told: list[str] = []
        store = CheckpointStore(folder, 2, ranks=ranks, background=True, on_error="continue", report=told.append)
        store.save(1, {"x": torch.ones(3)})
        store.wait()
        dist.barrier()
        if ranks.first:
            shutil.rmtree(folder)
        dist.barrier()
        store.save(2, {"x": torch.ones(3)})
        assert store.latest() is None
        assert len(told) == ranks.first and all("No such file or directory" in line for line in told), told
        assert all(line.endswith("there is no whole checkpoint") for line in told)
        with pytest.raises(UserError, match="step 3 .*rank 0: No such file or directory"):
            store.save(3, {"x": torch.ones(3)}, final=True)

    run_ranks(folder, 2, work)
    assert not folder.exists()
