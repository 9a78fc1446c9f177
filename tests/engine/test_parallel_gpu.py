"""DDP and FSDP2 of one process on a GPU, by NCCL: they run, DDP's step is captured, and a bad step leaves no trace."""

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from ssr_fast.engine import graphs
from ssr_fast.engine.deterministic import prepare_deterministic
from ssr_fast.engine.parallel import ParallelConfig, wrap
from ssr_fast.engine.ranks import join
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from tests.engine.graph_support import METHODS, OPTIM, everything
from tests.methods.support import make_batch

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("SSR_FAST_TEST_DEVICE", "cuda"))  # cpu: to try these tests themselves, by gloo
STEPS = 20


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    join(DEVICE.type, group=True)
    yield
    dist.destroy_process_group()


def make_step(name: str, precision: str, mode: str, accumulate: int = 1) -> TrainStep:
    method = METHODS[name]().to(DEVICE)
    optim = dataclasses.replace(OPTIM, accumulate=accumulate)
    wrapped = wrap(method, RunConfig(), precision, ParallelConfig(mode=mode), shares=accumulate)
    return TrainStep(wrapped, optim, STEPS, deterministic=prepare_deterministic(True, DEVICE))


def losses(step: TrainStep, call, steps: int = STEPS) -> list[float]:
    found = []
    for number in range(steps):
        batch = make_batch(count=2, seed=number).to(DEVICE)
        found.append(float(call(batch, number)["loss"]))
    return found


def trained(step: TrainStep) -> list[torch.Tensor]:
    """Weights, running statistics and the optimiser's state."""
    slots = [tensor for slots in step.optimizer.state.values() for tensor in slots.values()]
    return [*step.method.state_dict(keep_vars=True).values(), *slots]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["self_training", "cosine"])
def test_a_captured_step_of_ddp_equals_eager_steps_of_one_process(name: str, precision: str, accumulate: int) -> None:
    lines: list[str] = []
    one, other = make_step(name, precision, "ddp", accumulate), make_step(name, precision, "single", accumulate)
    call = graphs.on_cuda(one, DEVICE, lines.append) if DEVICE.type == "cuda" else one
    assert losses(one, call) == losses(other, other)
    for ours, theirs in zip(everything(one), everything(other), strict=True):
        assert torch.equal(ours, theirs)
    if DEVICE.type == "cuda":
        assert any("replay" in line for line in lines) and not any("no CUDA graph" in line for line in lines), lines


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["self_training", "cosine", "injection", "source_free"])
def test_shards_of_one_process_train_as_whole_nets_do(name: str, precision: str) -> None:
    one, other = make_step(name, precision, "fsdp"), make_step(name, precision, "single")
    bound = 1e-4 if precision == "fp32" else 2e-2
    for ours, theirs in zip(losses(one, one, 6), losses(other, other, 6), strict=True):
        assert abs(ours - theirs) < bound * abs(theirs)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp"])
def test_a_bad_step_leaves_no_trace_captured_or_not(mode: str) -> None:
    step = make_step("supervised", "bf16", mode)
    captured = DEVICE.type == "cuda" and mode != "fsdp"
    call = graphs.on_cuda(step, DEVICE) if captured else step
    losses(step, call, STEPS - 2)
    before = [full(tensor).clone() for tensor in trained(step)]
    features = make_batch(seed=99).to(DEVICE)
    weights = step.method.class_weight.clone()
    step.method.class_weight.fill_(float("nan"))
    call(features, STEPS - 2)
    step.method.class_weight.copy_(weights)
    assert int(step.guard.skipped) == 1 and int(step.guard.in_row) == 1
    for ours, theirs in zip(trained(step), before, strict=True):
        assert torch.equal(full(ours), theirs)
    losses(step, call, 1)
    assert int(step.guard.skipped) == 1 and int(step.guard.in_row) == 0
