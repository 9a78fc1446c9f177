"""A CUDA graph of a whole step on a GPU: equal to eager steps bit for bit, no host sync, evaluation in between."""

import pytest
import torch

from ssr_fast.engine import graphs
from tests.engine.graph_support import METHODS, STEPS, check_equal, everything, make_step, run
from tests.methods.support import make_batch

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def on_gpu(call):
    return lambda batch, number: call(batch.to(GPU), number)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_equal_eager_ones_bit_for_bit(name, precision):
    lines = []
    one, other = make_step(name, precision, device=GPU), make_step(name, precision, device=GPU)
    terms = run(one, on_gpu(graphs.on_cuda(one, GPU, lines.append)))
    check_equal(one, other, terms, run(other, on_gpu(other)))
    assert len(lines) == (1 if name == "supervised" else 2) and all("replay" in line for line in lines), lines


@pytest.mark.parametrize("name", ["cosine", "source_free"])
def test_a_replay_never_waits_for_the_device(name):
    step = make_step(name, "bf16", device=GPU)
    call = graphs.on_cuda(step, GPU, print)
    batches = [make_batch(seed=number).to(GPU) for number in range(STEPS)]
    for number in range(STEPS - 2):
        call(batches[number], number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(STEPS - 2, STEPS):
            call(batches[number], number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_evaluation_between_replays_changes_nothing():
    one, other = make_step("self_training", "bf16", device=GPU), make_step("self_training", "bf16", device=GPU)
    call = graphs.on_cuda(one, GPU)

    def interrupted(batch, number):
        terms = {name: value.clone() for name, value in call(batch.to(GPU), number).items()}
        with torch.no_grad():
            one.method.student.eval()(torch.randn(3, 3, 160, 96, device=GPU))
        one.method.train()
        return terms

    check_equal(one, other, run(one, interrupted), run(other, on_gpu(other)))


def test_what_cannot_be_captured_is_said_and_trained_eagerly(monkeypatch):
    lines = []
    step = make_step("supervised", "fp32", device=GPU)
    compute = step.method.compute

    def reads(batch, begun):
        terms = compute(batch, begun)
        terms["loss"].item()
        return terms

    monkeypatch.setattr(step.method, "compute", reads)
    terms = run(step, on_gpu(graphs.on_cuda(step, GPU, lines.append)))
    assert len(lines) == 1 and "no CUDA graph" in lines[0]
    assert len(terms) == STEPS and all(torch.isfinite(tensor).all() for tensor in everything(step))
