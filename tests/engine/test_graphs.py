"""Steps replayed from a graph equal eager ones bit for bit; on a CPU the graph is a recording (see recorder.py)."""

import copy
import re

import pytest
import torch

from ssr_fast.engine import graphs
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.step import TrainStep
from ssr_fast.engine.trainer import RunConfig
from ssr_fast.methods.ssr import SsrConfig
from tests.engine.recorder import record
from tests.methods.support import make_batch, make_method, make_source_free

START = 5
STEPS = 11
METHODS = {
    "supervised": lambda: make_method("supervised"),
    "self_training": lambda: make_method("self_training", start_step=START, feature_distance=0.01),
    "cosine": lambda: make_method("ssr", start_step=START),
    "injection": lambda: make_method("ssr", ssr=SsrConfig(regulariser="injection"), start_step=START),
    "source_free": lambda: make_source_free(contrast_start=START, vote=True),
}
OPTIM = OptimConfig(lr=1e-3, warmup_steps=4, clip_norm=0.5)


def nothing(line):
    """A report that nobody reads."""


def make_step(name, precision="fp32", recompute=False):
    method = METHODS[name]()
    method.student.backbone.recompute_blocks = recompute
    apply_precision(method, precision)
    return TrainStep(method, OPTIM, STEPS)


def everything(step):
    """Every tensor that a step changes."""
    slots = [tensor for slots in step.optimizer.state.values() for tensor in slots.values()]
    return [
        *step.method.state_dict(keep_vars=True).values(),
        *slots,
        *step.guard.__dict__["_saved"],
        step.guard.skipped,
    ]


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


def run(step, call, spoil=None, steps=STEPS):
    """The terms of each step."""
    kept = []
    for number in range(steps):
        batch = make_batch(seed=number)
        if number == spoil:
            batch.source_image.fill_(0)
            step.method.class_weight.fill_(float("nan"))
        kept.append({name: value.detach().clone() for name, value in call(batch, number).items()})
        if number == spoil:
            step.method.class_weight.fill_(1.0)
    return kept


def check_equal(one, other, terms, expected):
    for number, (ours, theirs) in enumerate(zip(terms, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name].nan_to_num(-1), theirs[name].nan_to_num(-1)), (number, name)
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        assert torch.equal(mine, theirs)


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
