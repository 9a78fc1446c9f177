"""Skipping of steps that are not finite, and clipping."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ssr_fast.engine.optim import OptimConfig, build_optimizer
from ssr_fast.engine.step_guard import StepGuard
from tests.syncfree import NoHostSync


class _Run:
    """A small net with BatchNorm, its optimiser and its guard."""

    def __init__(self, clip_norm: float = 0.0) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        self.optimizer = build_optimizer({"backbone": self.net}, OptimConfig(lr=0.01))
        self.guard = StepGuard(self.optimizer, list(self.net.buffers()), clip_norm)

    def step(self, seed: int, spoil: Callable[[nn.Module], None] | None = None) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        self.guard.before_forward()
        self.net(x).square().sum().backward()
        if spoil is not None:
            spoil(self.net)
        self.guard.step()
        self.optimizer.zero_grad()

    def snapshot(self) -> dict[str, Tensor]:
        state = {f"net.{name}": tensor.clone() for name, tensor in self.net.state_dict().items()}
        for i, slots in enumerate(self.optimizer.state.values()):
            state |= {f"optimizer.{i}.{name}": tensor.clone() for name, tensor in slots.items()}
        return state


def _spoil_one(value: float) -> Callable[[nn.Module], None]:
    def spoil(net: nn.Module) -> None:
        gradient = next(net.parameters()).grad
        assert gradient is not None
        gradient.view(-1)[5] = value

    return spoil


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_bad_step_leaves_no_trace(value: float, clip_norm: float) -> None:
    clean, hit = _Run(clip_norm), _Run(clip_norm)
    for run in (clean, hit):
        run.step(1)
    before = hit.snapshot()
    hit.step(2, _spoil_one(value))
    assert _same(before, hit.snapshot()) == []
    assert hit.guard.skipped.item() == 1 and hit.guard.found_inf.item() == 1
    assert not torch.isfinite(hit.guard.grad_norm)
    for run in (clean, hit):
        run.step(3)
    assert _same(clean.snapshot(), hit.snapshot()) == []
    assert _same(before, hit.snapshot()) != []
    assert hit.guard.skipped.item() == 1 and hit.guard.found_inf.item() == 0


def test_a_bad_first_step_and_nothing_but_bad_steps() -> None:
    run = _Run()
    before = run.snapshot()
    for seed in range(3):
        run.step(seed, _spoil_one(float("nan")))
    assert _same(before, run.snapshot()) == []
    assert run.guard.skipped.item() == 3


def test_the_buffers_do_change_without_the_guard() -> None:
    run = _Run()
    before = {name: tensor.clone() for name, tensor in run.net.named_buffers()}
    run.net(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))
    assert len(_same(before, dict(run.net.named_buffers()))) == 3


def test_nan_statistics_of_a_skipped_forward_are_gone() -> None:
    run = _Run()
    before = run.snapshot()
    run.guard.before_forward()
    run.net(torch.full((8, 4), float("nan"))).sum().backward()
    assert run.net[1].running_mean.isnan().any()  # type: ignore[union-attr, operator]
    run.guard.step()
    assert _same(before, run.snapshot()) == []


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_nothing_waits_for_the_device(clip_norm: float) -> None:
    run = _Run(clip_norm)
    with NoHostSync():
        run.step(1)
        run.step(2, _spoil_one(float("nan")))
    assert run.guard.skipped.item() == 1


def test_clipping_is_torchs() -> None:
    ours, theirs = _Run(clip_norm=0.5), _Run()
    ours.guard.before_forward()
    for run in (ours, theirs):
        run.net(torch.ones(8, 4).cumsum(0)).square().sum().backward()
    norm = clip_grad_norm_(theirs.net.parameters(), 0.5)
    assert norm > 0.5
    ours.guard.step()
    theirs.optimizer.step()
    assert torch.equal(ours.guard.grad_norm, norm)
    for p, q in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_small_gradient_is_not_touched_by_clipping() -> None:
    plain, clipped = _Run(), _Run(clip_norm=1e6)
    for run in (plain, clipped):
        run.step(1)
    assert _same(plain.snapshot(), clipped.snapshot()) == []


def test_clipping_does_not_spread_a_nan() -> None:
    run = _Run(clip_norm=1e-3)
    run.guard.before_forward()
    run.net(torch.ones(8, 4).cumsum(0)).square().sum().backward()
    _spoil_one(float("nan"))(run.net)
    before = [p.grad.clone() for p in run.net.parameters() if p.grad is not None]
    run.guard.step()
    for p, gradient in zip(run.net.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)
    assert sum(int(g.isnan().sum()) for g in before) == 1


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    run = _Run()
    run.net[2].requires_grad_(False)
    before = run.snapshot()
    run.step(1)
    changed = _same(before, run.snapshot())
    assert "net.0.weight" in changed and "net.2.weight" not in changed


def test_misuse_is_an_error() -> None:
    run = _Run()
    with pytest.raises(RuntimeError, match="before_forward"):
        run.guard.step()
    run.guard.before_forward()
    with pytest.raises(RuntimeError, match="no gradient"):
        run.guard.step()
    plain = torch.optim.AdamW(run.net.parameters(), fused=False)
    with pytest.raises(ValueError, match="fused"):
        StepGuard(plain, [])
