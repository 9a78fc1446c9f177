"""Skipping of steps that are not finite or spike, and clipping."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ssr_fast.engine.optim import OptimConfig, build_optimizer
from ssr_fast.engine.step_guard import GuardConfig, StepGuard
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


class _Series:
    """A guard that is fed losses and gradient norms by hand: a single weight, whose gradient is the norm."""

    def __init__(self, sigmas: float, window: int) -> None:
        self.weight = nn.Linear(1, 1, bias=False)
        self.optimizer = build_optimizer({"backbone": self.weight}, OptimConfig(lr=0.01))
        self.guard = StepGuard(self.optimizer, [], config=GuardConfig(spike_sigmas=sigmas, spike_window=window))

    def feed(self, loss: float | None, norm: float) -> bool:
        """Whether the step is skipped."""
        self.weight.weight.grad = torch.full((1, 1), norm)
        before = self.weight.weight.clone()
        self.guard.before_forward()
        self.guard.step(None if loss is None else torch.full((), loss))
        skipped = bool(self.guard.found_inf)
        assert skipped == torch.equal(before, self.weight.weight)
        return skipped


def _expected(losses: Tensor, norms: Tensor, sigmas: float, window: int) -> list[bool]:
    """The rule in float64, step by step."""
    past: tuple[list[float], list[float]] = ([], [])
    flags = []
    for values in zip(losses.double().tolist(), norms.double().tolist(), strict=True):
        finite = all(math.isfinite(value) for value in values)
        spike = False
        for value, seen in zip(values, past, strict=True):
            if 2 * len(seen) >= window:
                deviation, mean = torch.std_mean(torch.tensor(seen, dtype=torch.float64))
                spike |= value > float(mean + sigmas * deviation)
            if finite:
                seen.append(value)
                del seen[:-window]
        flags.append(spike or not finite)
    return flags


@pytest.mark.parametrize("window", [4, 7, 16])
def test_spikes_are_those_of_the_rule_in_float64(window: int, seed: int) -> None:
    losses, norms = 2 + torch.rand(150), 1e3 + torch.randn(150).exp()
    for series in (losses, norms):
        for value in (5.0, 1e20, math.nan, math.inf):  # the square of 1e20 is not float32's
            series[torch.randint(150, (3,))] *= value
    series = _Series(3.0, window)
    flags = [series.feed(loss, norm) for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True)]
    expected = _expected(losses, norms, 3.0, window)
    assert flags == expected
    finite = losses.isfinite() & norms.isfinite()
    assert sum(flags) > int((~finite).sum()) and int(series.guard.skipped) == sum(flags)
    assert series.guard.state()["recorded"].tolist() == [[int(finite.sum())]] * 2


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_judged_before_half_a_window_and_either_number_is(which: int) -> None:
    for known in range(8):
        series = _Series(2.0, 10)
        for number in range(known):
            assert not series.feed(1.0 + number % 2, 1.0 + number % 2)
        values = [1.5, 1.5]
        values[which] = 1e6
        assert series.feed(*values) == (known >= 5)


def test_a_fall_is_no_spike_and_nothing_is_where_the_option_is_off() -> None:
    falling, off = _Series(2.0, 4), _Series(0.0, 4)
    for number in range(8):
        assert not falling.feed(8.0 - number % 2, 8.0 - number % 2) and not off.feed(8.0 - number % 2, 1.0)
    assert not falling.feed(-1e6, 0.0) and not off.feed(1e6, 1e6)
    assert off.guard.state()["recorded"].tolist() == [[0], [0]]


def test_a_level_that_stays_is_accepted_after_a_while() -> None:
    series = _Series(3.0, 20)
    for number in range(20):
        series.feed(1.0 + 0.1 * (number % 2), 1.0)
    flags = [series.feed(10.0 + 0.1 * (number % 2), 1.0) for number in range(20)]
    # of 20 numbers, m lie a height h above the others: h (1 - m / 20) <= 3 h sqrt(m / 20 (1 - m / 20)) from m = 2 on
    assert flags == [True] * 2 + [False] * 18
    assert int(series.guard.in_row) == 0 and int(series.guard.skipped) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped_and_not_recorded(bad: float) -> None:
    series = _Series(3.0, 4)
    for number in range(6):
        series.feed(1.0 + number % 2, 1.0 + number % 2)
    before = {name: tensor.clone() for name, tensor in series.guard.state().items()}
    assert series.feed(bad, 1.0) and series.feed(1.0, bad)
    after = series.guard.state()
    assert _same(before, after) == ["skipped", "in_row"]
    assert int(after["in_row"]) == 2


def test_without_a_loss_the_norm_alone_is_judged() -> None:
    series = _Series(3.0, 4)
    for number in range(6):
        assert not series.feed(None, 1.0 + number % 2)
    assert series.feed(None, 1e3) and series.feed(None, math.nan) and not series.feed(None, 2.0)
    assert series.guard.state()["recorded"].tolist() == [[0], [8]]


def test_steps_in_a_row_are_counted() -> None:
    series = _Series(0.0, 4)
    counts = []
    for norm in (1.0, math.nan, math.nan, 1.0, math.nan, 1.0):
        series.feed(None, norm)
        counts.append((int(series.guard.in_row), int(series.guard.skipped)))
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3), (0, 3)]


@pytest.mark.parametrize("when", [1, 5, 13])
def test_a_state_that_is_saved_and_loaded_goes_on_alike(when: int, seed: int) -> None:
    numbers = torch.randn(40, 2).exp().square().tolist()
    whole, first, second = (_Series(1.0, 8) for _ in range(3))
    flags = [whole.feed(*pair) for pair in numbers]
    assert flags[:when] == [first.feed(*pair) for pair in numbers[:when]]
    for mine, theirs in zip(second.guard.state().values(), first.guard.state().values(), strict=True):
        mine.copy_(theirs)
    assert flags[when:] == [second.feed(*pair) for pair in numbers[when:]]
    assert _same(whole.guard.state(), second.guard.state()) == [] and any(flags[when:])


def test_the_state_is_the_same_whether_spikes_are_judged_or_not() -> None:
    shapes = [{name: t.shape for name, t in _Series(sigmas, 8).guard.state().items()} for sigmas in (0.0, 2.0)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 4


def test_illegal_options_are_one_sentence_each() -> None:
    assert GuardConfig().problems("guard") == []
    assert GuardConfig(spike_sigmas=6.0, spike_window=4, abort_after=0).problems("guard") == []
    found = GuardConfig(spike_sigmas=-1.0, spike_window=3, abort_after=-1).problems("guard")
    assert found == [
        "--guard.spike_sigmas must be >= 0 (0 = no step is skipped for a spike) (it is -1.0)",
        "--guard.spike_window must be at least 4 (it is 3)",
        "--guard.abort_after must be >= 0 (0 = never) (it is -1)",
    ]
    assert len(GuardConfig(spike_sigmas=math.nan).problems("g") + GuardConfig(spike_sigmas=math.inf).problems("g")) == 2
