"""A step of k micro-batches is the step of a batch k times as large, with BatchNorm's statistics a micro-batch each."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.batch import Batch
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.parallel import ParallelConfig, wrap
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.method import Method, step_key
from ssr_fast.models.segmentor import ModelConfig
from ssr_fast.models.working_copy import WorkingCopy
from tests.engine.forked import run_ranks
from tests.engine.graph_support import START, STEPS, check_equal, run
from tests.engine.test_graphs import graphed
from tests.methods.support import make_batch, make_method

QUIET = ModelConfig(backbone="mit_tiny", channels=16, drop_path=0.0, dropout=0.0)


def optim(accumulate: int) -> OptimConfig:
    return OptimConfig(lr=1e-3, warmup_steps=0, accumulate=accumulate)


def gradients_of(step: TrainStep, batch: Batch, number: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients that the optimiser gets in a step, by parameter, and the step's terms."""
    found: dict[str, Tensor] = {}
    judged = step.guard.step

    def see(loss: Tensor | None = None) -> None:
        parts = step.method.trainable()
        names = ((f"{part}.{name}", p) for part, net in parts.items() for name, p in net.named_parameters())
        found.update({name: p.grad.detach().clone() for name, p in names if p.grad is not None})
        judged(loss)

    step.guard.step = see  # type: ignore[method-assign]
    terms = step(batch, number)
    step.guard.step = judged  # type: ignore[method-assign]
    return found, {name: value.clone() for name, value in terms.items()}


def check_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Each to a part of its largest element, or of the largest gradient's thousandth where it is rounding alone."""
    assert found.keys() == wanted.keys()
    least = 1e-3 * max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= bound * max(float(value.abs().max()), least), name


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of two sets of gradients, as a part of the second one's length."""
    assert one.keys() == two.keys()
    apart = sum(float((one[name].double() - two[name].double()).square().sum()) for name in two)
    return (apart / sum(float(value.double().square().sum()) for value in two.values())) ** 0.5


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_a_supervised_step_is_one_backward_pass_over_all_images(count: int, dtype: torch.dtype, bound: float) -> None:
    batch = make_batch(count=2 * count)
    method, twin = (make_method("supervised", model=QUIET).to(dtype) for _ in range(2))
    method.dtype = dtype
    step = TrainStep(method, optim(count), 10)
    found, terms = gradients_of(step, batch)

    before = statistics(twin)
    pixels = normalise_batch(batch.source_image).to(dtype)
    loss = twin.cross_entropy(twin.student(pixels, domains=count).logits, batch.source_label)
    loss.backward()
    parts = twin.trainable().items()
    wanted = {
        f"{part}.{name}": p.grad for part, net in parts for name, p in net.named_parameters() if p.grad is not None
    }
    check_close(found, wanted, bound)
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=bound, atol=0)
    # after step() the parameters differ by what Adam makes of these gradients: m = (1 - beta1) g
    names = [f"{part}.{name}" for part, net in method.trainable().items() for name, _ in net.named_parameters()]
    params = [p for net in method.trainable().values() for p in net.parameters()]
    for name, p in zip(names, params, strict=True):
        torch.testing.assert_close(step.optimizer.state[p]["exp_avg"], 0.1 * found[name], rtol=1e-6, atol=1e-12)

    moved = []
    for part in pixels.chunk(count):  # each from the statistics of before
        alone = copy.deepcopy(twin)
        alone.load_state_dict(before, strict=False)
        alone.student(part)
        moved.append(statistics(alone))
    mean = {name: torch.stack([one[name] for one in moved]).mean(0) for name in before}
    for name, value in statistics(method).items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(value, mean[name], rtol=1e-6, atol=1e-7)


def by_ranks(make: Callable[[], Method], batch: Batch, count: int) -> dict[str, Tensor]:
    """The mean of the gradients that `count` processes would find, each by itself."""
    total: dict[str, Tensor] = {}
    for rank, part in enumerate(batch.split(count)):
        method = make()
        method.begin(0)
        method.draw(torch.tensor(step_key(method.seed, 0, rank)))
        method.compute(part, method.begun(0))["loss"].backward()
        method.hand_over()
        for role, net in method.trainable().items():
            for name, p in net.named_parameters():
                if p.grad is not None:
                    name = f"{role}.{name}"
                    total[name] = total.get(name, torch.zeros_like(p)) + p.grad / count
    return total


NAMES = {
    "self_training": {"start_step": 0, "feature_distance": 0.01},
    "ssr": {"start_step": 0},
}


@pytest.mark.parametrize("name", NAMES)
def test_three_micro_batches_are_those_of_three_processes(name: str, seed: int) -> None:
    """With pseudo-labels, mixing and stochastic depth: each has the random numbers of its process."""
    batch = make_batch(count=3, seed=seed)
    found, _ = gradients_of(TrainStep(make_method(name, **NAMES[name]), optim(3), 10), batch)
    check_close(found, by_ranks(lambda: make_method(name, **NAMES[name]), batch, 3), 2e-5)
    swapped = Batch(**{name: part.flip(0) for name, part in batch.parts().items()})
    other, _ = gradients_of(TrainStep(make_method(name, **NAMES[name]), optim(3), 10), swapped)
    assert distance(other, found) > 1e-3  # another order is another step: the places are told apart


def test_in_bf16_they_differ_by_less_than_bf16_does() -> None:
    def make(precision: str = "bf16") -> Method:
        method = make_method("supervised")
        apply_precision(method, precision)
        return method

    batch = make_batch(count=3)
    found, _ = gradients_of(TrainStep(make(), optim(3), 10), batch)
    wanted, exact = by_ranks(make, batch, 3), by_ranks(lambda: make("fp32"), batch, 3)
    error = distance(wanted, exact)
    assert 1e-4 < error < 0.3 and distance(found, wanted) < 0.5 * error, (error, distance(found, wanted))


def test_gradients_of_working_copies_are_added_in_float32(seed: int) -> None:
    master = nn.Linear(64, 32, bias=False)
    working = WorkingCopy(master, torch.bfloat16)
    exact, coarse = torch.zeros(32, 64, dtype=torch.float64), torch.zeros(32, 64, dtype=torch.bfloat16)
    sizes = torch.zeros(32, 64, dtype=torch.float64)
    shares = 16
    for _ in range(shares):
        working.net(torch.randn(3, 64).bfloat16()).float().square().sum().backward()
        grad = working.net.weight.grad.clone()  # type: ignore[union-attr, operator]
        exact += grad.double()
        sizes += grad.double().abs()
        coarse += grad
        working.hand_over()
        assert working.net.weight.grad is None
    assert master.weight.grad is not None and master.weight.grad.dtype == torch.float32
    bound = shares * 2.0**-24 * sizes
    assert ((master.weight.grad.double() - exact).abs() <= bound).all()
    assert ((coarse.double() - exact).abs() > bound).double().mean() > 0.5  # in bf16 it would not do


def test_a_step_in_bf16_adds_its_micro_batches_in_float32() -> None:
    method = make_method("supervised", model=QUIET)
    apply_precision(method, "bf16")
    step, passed = TrainStep(method, optim(4), 10), []
    hand_over = method.hand_over

    def see() -> None:
        net = method.running("student")
        passed.append({name: p.grad.double() for name, p in net.named_parameters() if p.dtype == torch.bfloat16})
        hand_over()

    method.hand_over = see  # type: ignore[method-assign]
    found, _ = gradients_of(step, make_batch(count=4))
    assert len(passed) == 4
    of_student = {name: value for name, value in method.student.named_parameters()}
    checked = 0
    for name in passed[0]:
        role, _, rest = name.partition(".")
        grad = found[f"{'backbone' if role == 'backbone' else 'head'}.{rest}"]
        exact = sum(part[name] for part in passed)
        sizes = sum(part[name].abs() for part in passed)
        assert ((grad.double() - exact).abs() <= 4 * 2.0**-24 * sizes).all(), name
        checked += 1
    assert 20 < checked <= len(of_student)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("supervised", "bf16"),
        ("self_training", "fp32"),
        pytest.param("supervised", "fp32", marks=pytest.mark.slow),
        pytest.param("self_training", "bf16", marks=pytest.mark.slow),
    ],
)
def test_several_micro_batches_replay_from_a_graph_bit_for_bit(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSR_FAST_KERNELS", "reference")
    steps, lines = [], []
    for _ in range(2):
        options = {} if name == "supervised" else {"start_step": START, "feature_distance": 0.01}
        method = make_method(name, **options)
        apply_precision(method, precision)
        steps.append(TrainStep(method, OptimConfig(lr=1e-3, warmup_steps=4, clip_norm=0.5, accumulate=2), STEPS))
    one, other = steps
    terms = run(one, graphed(one, lines.append), spoil=9)
    check_equal(one, other, terms, run(other, other, spoil=9))
    assert len(lines) == (1 if name == "supervised" else 2) and all("replay a CUDA graph" in line for line in lines)
    assert len({float(term["loss"]) for term in terms}) == STEPS and int(one.guard.skipped) == 1


class Sent:
    """What this process gives to all_reduce."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, torch.dtype]] = []
        reduce = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((tensor.numel(), tensor.dtype))
            return reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", counted)


class Scattered(TorchDispatchMode):
    """How many numbers reduce_scatter takes inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in str(func):
            self.numbers += args[1].numel()
        return func(*args, **(kwargs or {}))


def wrapped(ranks: Ranks, accumulate: int, precision: str = "fp32", **options: Any) -> TrainStep:
    method = make_method("supervised", model=QUIET)
    parallel = ParallelConfig(**options)
    on = wrap(method, RunConfig(device="cpu"), precision, parallel, ranks, accumulate)
    return TrainStep(on, optim(accumulate), 10, None, ranks)


def outside_of_blocks(method: Method, stage: int) -> Iterator[Tensor]:
    backbone = method.student.backbone
    for name in (f"patch_embed{stage}", f"norm{stage}"):
        yield from getattr(backbone, name).parameters()


def mine(batch: Batch, ranks: Ranks) -> Batch:
    return batch.split(ranks.world)[ranks.rank]


@pytest.mark.parametrize(
    ("precision", "reduce"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")]
)
def test_ddp_averages_once_a_step(precision: str, reduce: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(ranks: Ranks) -> None:
        sent = Sent(monkeypatch)
        step = wrapped(ranks, 3, precision, mode="ddp", reduce=reduce)
        buffers = sum(b.numel() for n, b in step.method.student.named_buffers() if "running" in n)
        for number in range(2):
            sent.calls.clear()
            step(mine(make_batch(count=6, seed=number), ranks), number)
            parameters = sum(p.numel() for p in step.method.student.parameters())
            of_guard = [call for call in sent.calls if call[0] == buffers + 1]
            rest = [call for call in sent.calls if call not in of_guard]
            assert len(of_guard) == 1 and sum(numel for numel, _ in rest) == parameters, (sent.calls, buffers)
            assert {dtype for _, dtype in rest} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[reduce]}

    run_ranks(tmp_path / "meeting", 2, work)


def test_fsdp_scatters_once_a_step(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        counts = []
        for accumulate in (1, 3):
            step = wrapped(ranks, accumulate, mode="fsdp")
            for number in range(2):
                with Scattered() as told:
                    step(mine(make_batch(count=2 * accumulate, seed=number), ranks), number)
            counts.append(told.numbers)
        parameters = sum(p.numel() for p in step.method.student.parameters())
        assert parameters <= counts[0] < 1.001 * parameters, (counts, parameters)
        # the root's unit is scattered behind the head and behind the backbone; of several micro-batches all of it twice
        outside = (p for stage in (1, 2, 3, 4) for p in outside_of_blocks(step.method, stage))
        assert counts[0] <= counts[1] <= counts[0] + 1.001 * sum(p.numel() for p in outside), (counts, parameters)

    run_ranks(tmp_path / "meeting", 2, work)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_that_reduce_in_bf16_are_close_to_float32(mode: str, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        batch, found = make_batch(count=4), {}
        for reduce in ("fp32", "bf16"):
            gradients, _ = gradients_of(wrapped(ranks, 2, mode=mode, reduce=reduce), mine(batch, ranks))
            found[reduce] = {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients.items()}
        single, _ = gradients_of(TrainStep(make_method("supervised", model=QUIET), optim(4), 10), batch)
        assert distance(found["fp32"], single) < 1e-5
        # two roundings of 2^-9 at the most, each less than half of that on average
        assert 1e-4 < distance(found["bf16"], single) < 2 * 2.0**-9

    run_ranks(tmp_path / "meeting", 2, work)


def test_two_ranks_in_bf16_are_two_micro_batches_of_one(tmp_path: Path) -> None:
    """One process hands over each micro-batch's gradient in float32, two round their mean: bf16's own error."""

    def work(ranks: Ranks) -> None:
        batch = make_batch(count=4)
        found, _ = gradients_of(wrapped(ranks, 2, "bf16", mode="ddp"), mine(batch, ranks))
        method = make_method("supervised", model=QUIET)
        apply_precision(method, "bf16")
        single, _ = gradients_of(TrainStep(method, optim(4), 10), batch)
        exact, _ = gradients_of(TrainStep(make_method("supervised", model=QUIET), optim(4), 10), batch)
        assert distance(found, single) < 1e-5 < distance(single, exact)

    run_ranks(tmp_path / "meeting", 2, work)
