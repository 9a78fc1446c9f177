"""Compiled blocks: whole graphs, few variants, the same numbers, eager evaluation, clear errors."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ssr_fast.engine import compiling, parallel
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from ssr_fast.errors import UserError
from ssr_fast.eval.run import evaluating
from ssr_fast.models.sam import SamConfig, build_sam
from ssr_fast.models.segmentor import ModelConfig
from tests.methods.support import make_batch, make_method

DEEP = ModelConfig(backbone="mit_b0", channels=16, drop_path=0.2)
"""Two blocks a stage."""


@pytest.fixture
def fast(monkeypatch):
    """Tracing without code generation, in a tenth of the time."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend="eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_step(model=None, precision="fp32", **run):
    method = make_method("self_training", feature_distance=0.01, model=model)
    parallel.wrap(method, RunConfig(**run), precision)
    return TrainStep(method, OptimConfig(lr=1e-3, warmup_steps=0), 10)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_few_variants_each_without_a_break_and_the_same_numbers(precision, fast):
    torch._dynamo.utils.counters.clear()
    eager, compiled = make_step(DEEP, precision), make_step(DEEP, precision, compile_blocks=True)
    for number in range(3):
        expected, actual = (step(make_batch(seed=number), number) for step in (eager, compiled))
        bound = 1e-5 if precision == "fp32" else 5e-3
        assert abs(float(actual["loss"]) - float(expected["loss"])) < bound * float(expected["loss"])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4 * 2 + 2  # stages x (trained, not trained), two heads
    assert not counters["graph_break"]


def test_a_block_of_either_backward_form(fast):
    """Blocks that are computed again are compiled too."""
    eager, compiled = make_step(), make_step(compile_blocks=True, recompute_blocks=True)
    for number in range(2):
        expected, actual = (step(make_batch(seed=number), number) for step in (eager, compiled))
        assert abs(float(actual["loss"]) - float(expected["loss"])) < 1e-5 * float(expected["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_encoders_blocks_too(precision, fast):
    """Two kinds, in windows and not, whatever their number; the same numbers as eager blocks."""
    encoder = build_sam(SamConfig(encoder="untrained"))
    images, results = torch.randn(2, 3, 72, 72), []
    for compiled in (False, True):
        method = make_method("ssr")
        method.encoder = copy.deepcopy(encoder)
        parallel.wrap(method, RunConfig(compile_blocks=compiled), precision)
        torch._dynamo.utils.counters.clear()
        results.append(method.encoder(images))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert results[0].dtype == method.dtype and torch.equal(*results)


def test_evaluation_is_eager_at_any_size(fast):
    student = make_step(compile_blocks=True).method.student
    sizes = itertools.product((64, 96), (64, 80, 112))
    torch._dynamo.utils.counters.clear()
    with evaluating(student), torch.no_grad():
        for size in sizes:
            student(torch.randn(1, 3, *size))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert student.training
    student(torch.randn(2, 3, 64, 64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_time_is_reported_where_there_was_any(fast):
    lines = []
    step = compiling.CompiledStep(make_step(compile_blocks=True), lines.append)
    for number in range(3):
        step(make_batch(seed=number), number)
    assert len(lines) == 1 and lines[0].startswith("step 1: ") and lines[0].endswith(" s to compile blocks")


def test_what_cannot_be_compiled_is_one_sentence(fast, monkeypatch):
    from ssr_fast.models import mit

    def breaks(x, weight, bias):
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(mit, "dwconv_gelu", breaks)
    step = compiling.CompiledStep(make_step(compile_blocks=True))
    with pytest.raises(UserError, match=r"^--run.compile_blocks: a block .* \(.+\); leave") as caught:
        step(make_batch(), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_generated_code_has_the_same_numbers():
    torch._dynamo.reset()
    eager, compiled = make_step(), make_step(compile_blocks=True)
    for number in range(3):
        expected, actual = (step(make_batch(seed=number), number) for step in (eager, compiled))
        assert abs(float(actual["loss"]) - float(expected["loss"])) < 1e-5 * float(expected["loss"])
    torch._dynamo.reset()
