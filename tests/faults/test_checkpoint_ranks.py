"""Checkpoints of two ranks: saved together, continued by one, and a rank that cannot write."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.state import rng_state
from ssr_fast.errors import UserError


def _ranks(folder: Path, work: Callable[[int], None]) -> list[int]:
    """Exit codes of two forked processes that form a gloo group."""
    meeting = folder.with_name(folder.name + "-meeting")

    def member(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        work(rank)
        dist.barrier()

    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                member(rank)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_save_and_load_and_one_continues(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "run"

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.arange(35.0).reshape(7, 5)  # 7 rows: the shards are uneven
        torch.manual_seed(rank)
        told: list[str] = []
        store = CheckpointStore(folder, 2, background=background, report=told.append)
        for step in (1, 2):
            shared = torch.full((3,), float(step))
            sharded = distribute_tensor(whole * step, mesh, [Shard(0)])
            store.save(step, {"shared": shared, "sharded": sharded, "rng": {str(rank): rng_state()}, "step": step})
        store.wait()
        drawn = torch.rand(4)
        state: dict[str, Any] = {
            "shared": torch.zeros(3),
            "sharded": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)]),
            "rng": {str(rank): rng_state()},
            "step": 0,
        }
        dist.barrier()
        if rank == 0:
            (folder / "step-2" / "__1_0.distcp").write_bytes(b"")
        dist.barrier()
        path = store.latest()
        assert path == folder / "step-1", path
        assert len(told) == (1 if rank == 0 else 0), told
        restored = store.load(path, state)
        assert restored.missing == () and restored.world_size == 2 and state["step"] == 1
        torch.set_rng_state(state["rng"][str(rank)]["torch"])
        assert torch.equal(torch.rand(4), drawn)
        assert torch.equal(state["sharded"].full_tensor(), whole) and state["shared"].eq(1).all()

    assert _ranks(folder, work) == [0, 0]
    store = CheckpointStore(folder, 2)
    path = store.latest()
    assert path == folder / "step-1"
    state: dict[str, Any] = {"shared": torch.zeros(3), "sharded": torch.zeros(7, 5), "rng": {"0": rng_state()}}
    restored = store.load(path, state)
    assert restored.world_size == 2 and restored.missing == ()
    assert torch.equal(state["sharded"], torch.arange(35.0).reshape(7, 5))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_cannot_write_is_one_sentence_on_every_rank(tmp_path: Path, broken: int) -> None:
    folder = tmp_path / "run"

    def work(rank: int) -> None:
        store = CheckpointStore(folder, 2)
        state = {"x": torch.zeros(100), "rng": {str(rank): rng_state()}}
        store.save(1, state)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="step 2 could not be written .*File too large"):
            store.save(2, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert store.latest() == folder / "step-1"

    assert _ranks(folder, work) == [0, 0]
    assert sorted(os.listdir(folder)) == ["step-1"]
