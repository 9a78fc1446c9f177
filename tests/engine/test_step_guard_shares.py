"""Steps of several micro-batches: the buffers become the mean over the shares, and a step is captured as a whole."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssr_fast.engine.optim import OptimConfig, build_optimizer
from ssr_fast.engine.step_guard import GuardConfig, StepGuard
from tests.engine.recorder import record
from tests.syncfree import NoHostSync


class Run:
    """A net with BatchNorm whose steps are of several shares."""

    def __init__(self, shares: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.BatchNorm1d(2)).to(dtype)
        self.optimizer = build_optimizer({"backbone": self.net}, OptimConfig(lr=0.01))
        self.guard = StepGuard(self.optimizer, list(self.net.buffers()), 0.5, shares=shares, **options)
        self.shares = shares

    def step(self, images: Tensor, loss: Tensor | None = None) -> dict[str, Tensor]:
        self.guard.before_forward()
        total = torch.zeros((), dtype=images.dtype)
        for number, share in enumerate(images.chunk(self.shares)):
            if number:
                self.guard.next_share()
            part = self.net(share).sin().square().mean() * share.mean() / self.shares
            part.backward()
            total += part.detach()
        self.guard.step(total if loss is None else loss)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "found_inf": self.guard.found_inf}

    def tensors(self) -> dict[str, Tensor]:
        slots = {f"{i}.{k}": t for i, s in enumerate(self.optimizer.state.values()) for k, t in s.items()}
        return {**self.net.state_dict(), **slots, **self.guard.state()}

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_the_buffers_become_the_mean_over_the_shares(shares: int, dtype: torch.dtype) -> None:
    run = Run(shares, dtype)
    run.step(draw(0, dtype))
    start = copy.deepcopy(run.net)
    run.step(draw(1, dtype))
    ends = []
    for share in draw(1, dtype).chunk(shares):
        net = copy.deepcopy(start)
        net(share)
        ends.append(dict(net.named_buffers()))
    for name, buffer in run.net.named_buffers():
        expected = torch.stack([end[name].double() for end in ends]).mean(0)
        tolerance = 0.0 if shares == 1 or not buffer.is_floating_point() else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(buffer.double(), expected, rtol=tolerance, atol=0.0)
        assert buffer.dtype == ends[0][name].dtype
    assert int(run.net[1].num_batches_tracked) == 2


def test_buffers_of_two_types_are_each_read_and_written_in_their_own() -> None:
    small, large = torch.ones(3), torch.ones(2, 2, dtype=torch.float64)
    weight = nn.Linear(1, 1)
    guard = StepGuard(build_optimizer({"head": weight}, OptimConfig()), [small, large], shares=2)
    weight(torch.ones(1, 1)).sum().backward()
    guard.before_forward()
    small.fill_(1 / 3)
    large.fill_(1 / 3)
    guard.next_share()
    assert small.eq(1).all() and large.eq(1).all()
    small.fill_(1 / 3)
    large.fill_(2 / 3)
    guard.step()
    assert torch.equal(small, torch.full((3,), 1 / 3)) and small.dtype == torch.float32
    assert torch.equal(large, torch.full((2, 2), 0.5, dtype=torch.float64))


def test_a_process_alone_and_a_mean_over_one_are_equal_to_the_bit() -> None:
    calls = []
    alone, one = Run(), Run(mean=calls.append)
    for seed in range(4):
        for run in (alone, one):
            run.step(draw(seed))
    assert differing(alone.tensors(), one.tensors()) == []
    assert len(calls) == 4 and all(values.shape == (17,) and values.dtype == torch.float32 for values in calls)


@pytest.mark.parametrize("bad", range(3))
def test_a_bad_share_undoes_the_step(bad: int) -> None:
    run = Run(3)
    run.step(draw(0))
    before, images = run.snapshot(), draw(1)
    images[4 * bad : 4 * bad + 4] = math.nan
    run.step(images)
    assert differing(before, run.tensors()) == ["skipped", "in_row"]


def test_shares_that_do_not_add_up_are_errors() -> None:
    run = Run(2)
    with pytest.raises(RuntimeError, match="between the 2 share"):
        run.guard.next_share()
    run.guard.before_forward()
    with pytest.raises(RuntimeError, match="after 1 of 2 shares"):
        run.guard.step()
    run.guard.next_share()
    with pytest.raises(RuntimeError, match="between the 2 share"):
        run.guard.next_share()
    run = Run(2)
    run.step(draw(0))
    with pytest.raises(RuntimeError, match="before_forward"):
        run.guard.step()
    alone = Run()
    alone.guard.before_forward()
    with pytest.raises(RuntimeError, match="between the 1 share"):
        alone.guard.next_share()


@pytest.mark.parametrize("shares", [1, 3])
def test_nothing_waits_for_the_device(shares: int) -> None:
    run = Run(shares, mean=lambda values: values.mul_(1.0), config=GuardConfig(spike_sigmas=10.0, spike_window=4))
    batches = [draw(seed) for seed in range(6)]
    with NoHostSync():
        for images in batches:
            run.step(images)
        run.step(batches[0] * math.nan)
        run.step(batches[0] * 1e4)
    assert int(run.guard.skipped) == 2


@pytest.mark.parametrize("shares", [1, 2])
def test_replayed_steps_equal_eager_ones_bit_for_bit(shares: int) -> None:
    """The recorder freezes what a graph freezes: nothing that is decided here may be a number of the host."""
    runs = [
        Run(shares, mean=lambda values: values.mul_(0.5), config=GuardConfig(spike_sigmas=2.0, spike_window=6))
        for _ in range(2)
    ]
    eager, replayed = runs
    images = draw(0).clone()
    for run in runs:
        run.step(images)
    before = replayed.snapshot()
    replay, terms = record(lambda: replayed.step(images))
    with torch.no_grad():
        for name, tensor in replayed.tensors().items():
            tensor.copy_(before[name])
    flags = []
    for number in range(20):
        factor = {7: math.nan, 11: 50.0, 12: 50.0, 15: math.inf}.get(number, 1.0)
        images.copy_(draw(number) * factor)
        expected = eager.step(images)
        replay()
        assert torch.equal(terms["found_inf"], expected["found_inf"]), number
        assert differing(eager.tensors(), replayed.tensors()) == [], number
        flags.append(int(terms["found_inf"]))
    assert flags[7] == flags[11] == flags[15] == 1 and sum(flags) < 10
