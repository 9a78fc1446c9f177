"""BatchNorm over ranks: together they compute what one process does with the whole batch."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.sync_norm import synchronise_batchnorm
from ssr_fast.models.heads import DAFormerHead, SplitBatchNorm2d
from ssr_fast.models.noise import Noise
from ssr_fast.models.sync_norm import OverRanks
from ssr_fast.models.working_copy import WorkingCopy
from tests.engine.forked import run_ranks
from tests.engine.graph_support import METHODS

C, E, SIZE = 6, 5, (5, 7)
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Of the error's norm, as a share of the result's."""


def make_norm(splits: int, dtype: torch.dtype) -> SplitBatchNorm2d:
    norm = SplitBatchNorm2d(C).to(dtype)
    norm.splits = splits
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, C))
        norm.bias.copy_(torch.linspace(-1, 1, C))
    return norm


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of which each image has a level of its own: its statistics are not those of the batch."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = torch.arange(shape[0], dtype=torch.float64)[:, None, None, None]
    return (values + levels.sin() * 2 + 1).to(dtype).to(memory_format=torch.channels_last)


def part_of(whole: Tensor, ranks: Ranks, splits: int) -> Tensor:
    """A rank's share: its part of each domain."""
    return torch.cat([domain.chunk(ranks.world)[ranks.rank] for domain in whole.chunk(splits)])


def run(norm: SplitBatchNorm2d, x: Tensor, upstream: Tensor, mixer: Tensor | None, relu: bool = True) -> list[Tensor]:
    """What comes out, and the gradients of x, scale, shift and mixer."""
    x = x.clone().requires_grad_()
    leaves = [x, norm.weight, norm.bias, *([] if mixer is None else [mixer])]
    out = norm.followed_by_relu(x, mixer) if relu else norm(x)
    return [out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves)]


def error(mine: Tensor, exact: Tensor) -> float:
    return float((mine.double() - exact.double()).norm() / exact.double().norm())


def summed(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process_with_the_whole_batch(
    world: int, dtype: torch.dtype, splits: int, mixed: bool, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> None:
        one, ours = make_norm(splits, dtype), make_norm(splits, dtype)
        assert synchronise_batchnorm(ours, ranks) == 1
        generator = torch.Generator().manual_seed(9)
        mixer = torch.randn(E, C, 1, 1, generator=generator, dtype=dtype).requires_grad_() if mixed else None
        for seed, relu in enumerate((True, mixed, True)):
            x = draw((8, C, *SIZE), 2 * seed, dtype)
            upstream = draw((8, E if mixed else C, *SIZE), 2 * seed + 1, dtype)
            expected = run(one, x, upstream, mixer, relu or mixed)
            part = part_of(x, ranks, splits)
            found = run(ours, part, part_of(upstream, ranks, splits), mixer, relu or mixed)
            assert found[0].is_contiguous(memory_format=torch.channels_last) and found[0].dtype == dtype
            pairs = [(mine, part_of(theirs, ranks, splits)) for mine, theirs in zip(found, expected[:2], strict=False)]
            pairs += [(summed(mine), theirs) for mine, theirs in zip(found[2:], expected[2:], strict=True)]
            pairs += [(ours.running_mean, one.running_mean), (ours.running_var, one.running_var)]
            errors = [error(mine, exact) for mine, exact in pairs]
            assert max(errors) <= BOUND[dtype], errors
        assert torch.equal(ours.num_batches_tracked, one.num_batches_tracked)

    run_ranks(tmp_path / "meeting", world, work)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_on_two_ranks_equals_one_process(compiled: bool, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        torch.manual_seed(0)
        one = DAFormerHead((4, 5, 6, 7), 3, channels=8, dropout=0.0, noise=Noise()).double()
        ours = copy.deepcopy(one)
        assert synchronise_batchnorm(ours, ranks) == 8
        for norm in itertools.chain(one.modules(), ours.modules()):
            if isinstance(norm, SplitBatchNorm2d):
                norm.splits = 2
        if compiled:  # as engine.compiling does; tracing alone was enough to lose the gradient's mean
            ours.compile(fullgraph=True, dynamic=False, backend="eager")
        whole = [draw((8, c, 8 >> i, 8 >> i), i, torch.float64) for i, c in enumerate((4, 5, 6, 7))]
        one(whole)[1].square().sum().backward()
        ours([part_of(feature, ranks, 2) for feature in whole])[1].square().sum().backward()
        for (name, mine), theirs in zip(ours.named_parameters(), one.parameters(), strict=True):
            if theirs.grad.norm() > 1e-9:  # of a bias in front of BatchNorm the gradient is rounding
                assert error(summed(mine.grad), theirs.grad) < 1e-12, name
        for (name, mine), theirs in zip(ours.named_buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)

    run_ranks(tmp_path / "meeting", 2, work)


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_is_as_near_to_float32_as_one_process_is(mixed: bool, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        x, upstream = (draw((8, c, 16, 16), c, torch.bfloat16) for c in (C, E if mixed else C))
        mixer = torch.randn(E, C, 1, 1, generator=torch.Generator().manual_seed(9)).bfloat16() if mixed else None
        exact, plain, ours = (make_norm(2, torch.float32) for _ in range(3))
        synchronise_batchnorm(ours, ranks)
        wide = None if mixer is None else mixer.float().requires_grad_()
        reference = run(exact, x.float(), upstream.float(), wide)
        lower = None if mixer is None else mixer.requires_grad_()
        baseline = run(plain, x, upstream, lower)
        found = run(ours, part_of(x, ranks, 2), part_of(upstream, ranks, 2), lower)
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in baseline]
        for number, (mine, theirs, truth) in enumerate(zip(found, baseline, reference, strict=True)):
            if number < 2:
                truth_here, theirs_here = part_of(truth, ranks, 2), part_of(theirs, ranks, 2)
            else:
                mine, truth_here, theirs_here = summed(mine.float()), truth, theirs
            mistake, theirs_mistake = error(mine, truth_here), error(theirs_here, truth_here)
            assert mistake <= 2 * theirs_mistake + 1e-6, (number, mistake, theirs_mistake)
        for mine, truth in ((ours.running_mean, exact.running_mean), (ours.running_var, exact.running_var)):
            assert mine.dtype == torch.float32 and error(mine, truth) < 1e-6

    run_ranks(tmp_path / "meeting", 2, work)


def test_nothing_is_differentiated_without_a_gradient_and_copies_keep_it(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        one, ours = make_norm(2, torch.float32), make_norm(2, torch.float32)
        synchronise_batchnorm(nn.Sequential(ours), ranks)
        x = draw((8, C, *SIZE), 0, torch.float32)
        expected = one.followed_by_relu(x, None)
        kept = ours.over_ranks
        for norm in (ours, copy.deepcopy(ours), WorkingCopy(nn.Sequential(ours), torch.bfloat16).net[0]):
            assert norm.over_ranks is not None and norm.over_ranks.mean is kept.mean
            with torch.no_grad():
                out = norm.followed_by_relu(part_of(x, ranks, 2), None)
            assert not out.requires_grad and error(out, part_of(expected, ranks, 2)) < 1e-6

    run_ranks(tmp_path / "meeting", 2, work)


def unreachable(values: Tensor) -> Tensor:
    raise AssertionError("a collective")


def test_evaluation_is_as_without_ranks() -> None:
    one, ours = make_norm(2, torch.float32).eval(), make_norm(2, torch.float32).eval()
    ours.over_ranks = OverRanks(unreachable, 2)
    x = draw((4, C, *SIZE), 0, torch.float32)
    assert torch.equal(one(x), ours(x)) and int(ours.num_batches_tracked) == 0
    with pytest.raises(AssertionError, match="a collective"):
        ours.train()(x)


def test_a_batch_that_cannot_be_split_is_an_error() -> None:
    norm = make_norm(2, torch.float32)
    norm.over_ranks = OverRanks(unreachable, 2)
    for call in (norm, lambda x: norm.followed_by_relu(x, None)):
        with pytest.raises(ValueError, match="a batch of 3 images cannot be split into 2"):
            call(draw((3, C, *SIZE), 0, torch.float32))
    assert int(norm.num_batches_tracked) == 0


def test_a_process_alone_stays_as_it_is() -> None:
    norm = make_norm(1, torch.float32)
    plain = nn.BatchNorm2d(C)
    plain.load_state_dict(norm.state_dict())
    assert synchronise_batchnorm(nn.Sequential(norm, nn.ReLU()), Ranks()) == 1 and norm.over_ranks is None
    x = draw((4, C, *SIZE), 0, torch.float32)
    assert torch.equal(norm(x), plain(x)) and torch.equal(norm.followed_by_relu(x, None), F.relu(plain(x)))
    assert torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_batchnorm_of_a_method_is_reached(name: str, precision: str) -> None:
    method: Any = METHODS[name]()
    apply_precision(method, precision)
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    assert synchronise_batchnorm(method, Ranks(0, 2)) == len(norms) > 0
    assert all(norm.over_ranks is not None and norm.over_ranks.world == 2 for norm in norms)
