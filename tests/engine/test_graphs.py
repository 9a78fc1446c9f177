"""Steps replayed from a graph equal eager ones bit for bit; on a CPU the graph is a recording (see recorder.py)."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssr_fast.engine import graphs
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from ssr_fast.models.resident_features import ResidentFeatures
from tests.engine.graph_support import METHODS, OPTIM, START, STEPS, check_equal, everything, make_step, run
from tests.engine.recorder import record
from tests.methods.support import make_batch, make_method


def nothing(line):
    """A report that nobody reads."""


def recorded(step):
    """`record`, after which nets and optimiser are as before, as after a capture."""

    def capture(work):
        before = [tensor.detach().clone() for tensor in everything(step)]
        replay, terms = record(work)
        with torch.no_grad():
            for tensor, value in zip(everything(step), before, strict=True):
                tensor.copy_(value)
        return replay, terms

    return capture


def graphed(step, report=nothing, capture=None):
    return graphs.GraphedStep(step, capture or recorded(step), lambda work: work(), report)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_equal_eager_ones_bit_for_bit(name, precision, monkeypatch):
    monkeypatch.setenv("SSR_FAST_KERNELS", "reference")
    lines = []
    one, other = make_step(name, precision), make_step(name, precision)
    terms = run(one, graphed(one, lines.append))
    check_equal(one, other, terms, run(other, other))
    kinds = 1 if name == "supervised" else 2
    starts = [graphs.WARM_UP + 1, START + graphs.WARM_UP + 1][:kinds]  # a log counts steps from 1
    assert [int(re.search(r"from (\d+) on", line)[1]) for line in lines] == starts
    assert len({float(term["loss"]) for term in terms}) == STEPS


@pytest.mark.parametrize("recompute", [False, True])
def test_a_replayed_step_that_is_not_finite_leaves_no_trace(recompute):
    one, other = (make_step("self_training", recompute=recompute) for _ in range(2))
    terms = run(one, graphed(one), spoil=9)
    check_equal(one, other, terms, run(other, other, spoil=9))
    assert int(one.guard.skipped) == 1 and int(terms[8]["skipped"]) == 0


def test_a_number_of_the_host_inside_a_step_shows(monkeypatch):
    """The recorder freezes it as a graph does: with it the tests above cannot pass by luck."""
    one, other = make_step("supervised"), make_step("supervised")
    for step in (one, other):
        original = step.method.compute

        def compute(batch, begun, step=step, original=original):
            terms = original(batch, begun)
            return {**terms, "loss": terms["loss"] * (1.0 + step.rate)}

        monkeypatch.setattr(step.method, "compute", compute)
    with pytest.raises(AssertionError):
        check_equal(one, other, run(one, graphed(one)), run(other, other))


def test_a_batch_of_another_shape_gets_a_graph_of_its_own():
    lines = []
    one, other = make_step("supervised"), make_step("supervised")
    call = graphed(one, lines.append)
    for number in range(10):
        batch = make_batch(size=(64, 64) if number < 5 else (64, 96), seed=number)
        ours, theirs = call(batch, number), other(batch, number)
        assert torch.equal(ours["loss"], theirs["loss"])
    assert len(lines) == 2


def test_where_nothing_can_be_captured_the_run_goes_on_eagerly_and_says_why():
    lines, tries = [], []
    one, other = make_step("self_training"), make_step("self_training")

    def capture(work):
        tries.append(1)
        broken = copy.copy(one.guard)
        broken.before_forward()
        terms = one.method.compute(make_batch(), True)
        terms["loss"].backward()  # a capture that fails in the middle leaves gradients behind
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    before = run(one, graphed(one, lines.append, capture), steps=STEPS)
    assert len(tries) == 1 and len(lines) == 1
    assert "no CUDA graph" in lines[0] and "operation not permitted when stream is capturing" in lines[0]
    assert "\n" not in lines[0] and "--run.graph off" in lines[0]
    expected = run(other, other)
    assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(before[:3], expected[:3], strict=True))
    assert all(parameter.grad is None for parameter in one.method.parameters())


def test_the_option():
    assert "--run.graph must be auto or off (it is on)" in RunConfig(graph="on").problems("run")[0]


def with_places(batch, seed):
    """A batch that says which of 40 resident tokens its features are made of, on a grid of 4 x 6."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randint(0, 20, (2, 10, 2), generator=generator), torch.rand(2, 10, 1, generator=generator)]
    found = torch.cat([part.double() for part in places], 2)
    return replace(batch, source_places=found, target_places=found.flip(0))


def test_features_that_are_cut_on_the_device_are_cut_anew_in_each_replay():
    steps = []
    for _ in range(2):
        method = make_method("ssr", features="cached_full", sam={"mixed": "composed"}, start_step=START)
        values = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float16)
        for name in ("source", "target"):
            method.resident[name] = ResidentFeatures(values, None, 4, torch.device("cpu"))
        steps.append(TrainStep(method, OPTIM, STEPS))
    one, other = steps
    call = graphed(one)
    for number in range(STEPS):
        batch = with_places(make_batch(seed=number), number)
        ours, theirs = call(batch, number), other(batch, number)
        assert torch.equal(ours["loss"], theirs["loss"]) and ours["loss/cosine"] > 0.1
    check_equal(one, other, [], [])
