"""The guard on two ranks: what is wrong on one undoes the step on both, and both stay bit-identical."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from ssr_fast.engine.optim import OptimConfig, build_optimizer
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.step_guard import GuardConfig, StepGuard
from tests.engine.forked import run_ranks

ADDED = {"loss": math.nan, "spike": 1e4}
"""What is wrong with a rank's loss alone; its gradient is right."""


def draw(seed: int, rank: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * seed + rank)) + seed


class Run:
    """A net whose gradients are the mean over the ranks: of whole parameters (as DDP's) or of their shards."""

    def __init__(self, ranks: Ranks, sharded: bool, shares: int) -> None:
        torch.manual_seed(0)
        self.ranks, self.sharded, self.shares = ranks, sharded, shares
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        if sharded:
            fully_shard(self.net, mesh=init_device_mesh("cpu", (ranks.world,)))
        self.optimizer = build_optimizer({"backbone": self.net}, OptimConfig(lr=0.01))
        config = GuardConfig(spike_sigmas=6.0, spike_window=6)
        buffers = list(self.net.buffers())
        self.guard = StepGuard(self.optimizer, buffers, 0.01, shares=shares, mean=ranks.mean_, config=config)

    def step(self, seed: int, bad: str | None = None) -> int:
        """The number of collectives of the guard's own step.

        Args:
            bad: what is wrong on this rank: its batch, its gradient or its shard of that, its loss, or that is a
                spike.
        """
        images, total = draw(seed, self.ranks.rank), torch.zeros(())
        if bad == "batch":
            images[-1] = math.nan
        self.guard.before_forward()
        for number, share in enumerate(images.chunk(self.shares)):
            if number:
                self.guard.next_share()
            loss = self.net(share).square().mean() / self.shares
            (loss * (math.nan if bad == "gradient" else 1.0)).backward()
            total += loss.detach()
        if not self.sharded:
            for parameter in self.net.parameters():
                self.ranks.mean_(parameter.grad)
        if bad == "shard":
            self.net[0].weight.grad.to_local()[-1] = math.nan
        with CommDebugMode() as told:
            self.guard.step(total + ADDED.get(bad, 0.0))
        self.optimizer.zero_grad(set_to_none=True)
        return int(told.get_total_counts())

    def snapshot(self) -> dict[str, Tensor]:
        """All of it, of shards the whole."""
        slots = {f"{i}.{k}": t for i, s in enumerate(self.optimizer.state.values()) for k, t in s.items()}
        found = {**self.net.state_dict(), **slots, **self.guard.state()}
        return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in found.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def check_equal_on_all(tensors: dict[str, Tensor]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tensors)
    assert [differing(everyone[0], theirs) for theirs in everyone] == [[]] * len(everyone)


CASES = [(bad, sharded) for bad in ("batch", "gradient", "loss", "spike") for sharded in (False, True)]


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(("bad", "sharded"), [*CASES, ("shard", True)])
def test_what_is_bad_on_one_rank_undoes_the_step_on_both(bad: str, shares: int, sharded: bool, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        run = Run(ranks, sharded, shares)
        told = [run.step(seed) for seed in range(6)]
        before = run.snapshot()
        check_equal_on_all({**before, "norm": run.guard.grad_norm.clone()})
        assert int(run.guard.skipped) == 0 and before["1.running_mean"].ne(0).all()
        told.append(run.step(6, bad if ranks.rank == 1 else None))
        after = run.snapshot()
        check_equal_on_all(after)
        expected = ["skipped", "in_row", *(["recent", "recorded"] if bad == "spike" else [])]
        assert differing(before, after) == expected and int(run.guard.in_row) == 1
        told.append(run.step(7))
        check_equal_on_all(run.snapshot())
        assert int(run.guard.in_row) == 0 and "0.weight" in differing(after, run.snapshot())
        # a sharded gradient's norm is one more
        assert set(told) == {2 if sharded else 1}, told

    run_ranks(tmp_path / "meeting", 2, work)


def test_the_buffers_become_the_mean_over_ranks_and_shares(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        run = Run(ranks, False, 2)
        run.step(0)
        start, ends = copy.deepcopy(run.net), []
        for rank in range(2):
            images = draw(1, rank)
            for share in images.chunk(2):
                net = copy.deepcopy(start)
                net(share)
                ends.append(dict(net.named_buffers()))
        run.step(1)
        for name, buffer in run.net.named_buffers():
            expected = torch.stack([end[name].double() for end in ends]).mean(0)
            torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=0.0)

    run_ranks(tmp_path / "meeting", 2, work)
