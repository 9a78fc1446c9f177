"""The fast step has the released loop's curve: losses and weights on the demo, lever by lever.

Where these steps begin the student has had the demo's 75 source-only steps, so that pseudo-labels say something and its
features are away from the frozen ones. Both loops get the same random numbers (bench.draws.CounterDraws).

The learning rate is a tenth of the demo's. The definition against itself, the classifier's weights moved by one unit in
the last place, 50 steps: the largest relative change of a loss is 3e-7 at 3e-4, 3e-6 at 1e-3 and 8e-5 at 3e-3, of a
weight 1e-6, 3e-6 and 5e-5; from 3e-3 on training is chaotic. The levers stay below 1e-6 at 7e-4.

The threshold is 0 where curves are compared: every pseudo-label counts. With a threshold the share of confident pixels
is a count. One pixel of 73,728 whose probability stands on the threshold moves the share and with it the mixed loss by
1e-5 to 4e-5, at any learning rate (the definition does that to itself). `test_a_threshold...` counts these pixels.

Left out of the weights: biases that the network cancels, whose gradient is rounding and which AdamW moves all the same.
"""

import copy
import dataclasses

import pytest
import torch

from bench import variants
from bench.variants import LOOP, ONE_PASS, OURS, RELEASED, VARIANTS
from bench.workload import STEPS, demo_workload
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.method import Method
from ssr_fast.presets import demo

LOSS_BOUND, WEIGHT_BOUND = 1e-5, 1e-4
SOURCE_ONLY = 75
CPU = torch.device("cpu")
NAMES = [name for name, variant in VARIANTS.items() if not variant.bfloat16 and not variant.reason]
"""Everything in float32."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workload(one_thread):
    """The demo after its source-only steps."""
    fresh = demo_workload()
    student = copy.deepcopy(fresh.student)
    step = TrainStep(Method(student, fresh.weights, fresh.seed).train(), demo().optim, demo().run.steps)
    for number in range(SOURCE_ONLY):
        terms = step(fresh.batches[number % len(fresh.batches)], number)
    assert terms["loss"] < 0.3
    return dataclasses.replace(fresh, student=student, optim=dataclasses.replace(fresh.optim, lr=7e-4))


def cancelled(name, tensor):
    """What is left of a weight without the part that changes no output."""
    if "linear_c" in name and name.endswith("bias") or name.endswith("linear_fuse.bn.running_mean"):
        return tensor[:0]  # a constant in front of BatchNorm
    if name.endswith("attn.kv.bias"):
        return tensor[len(tensor) // 2 :]  # the keys' half: a constant in front of the softmax
    return tensor


def curve(workload, variant, steps, change=None):
    """(losses of every step, weights and running statistics of student and teacher at the end)."""
    method = workload.method(CPU)
    if change:
        change(method)
    step = variant.build(method, workload.optim, STEPS, print)
    losses = []
    for number in range(steps):
        terms = step(workload.batches[number % len(workload.batches)], number)
        losses.append({name: float(terms[name]) for name in sorted(terms) if "loss" in name or name == "confident"})
    state = {f"{net}.{name}": tensor for net, module in method.saved().items() for name, tensor in values(module)}
    return losses, {name: cancelled(name, tensor.detach().clone()) for name, tensor in state.items()}


def values(module):
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if "running" in name)


def deviation(found, expected):
    """Largest relative difference of each loss in any step, and of each weight in its norm."""
    losses = {
        name: max(abs(a[name] - b[name]) / (abs(b[name]) or 1.0) for a, b in zip(found[0], expected[0], strict=True))
        for name in expected[0][0]
    }
    weights = {
        name: float((found[1][name] - tensor).norm() / tensor.norm().clamp_min(1e-30))
        for name, tensor in expected[1].items()
    }
    return losses, weights


def assert_same(name, found, expected):
    losses, weights = deviation(found, expected)
    worst = max(weights, key=lambda key: weights[key])
    print(f"{name}: {', '.join(f'{key} {value:.1e}' for key, value in losses.items())}; {worst} {weights[worst]:.1e}")
    assert max(losses.values()) < LOSS_BOUND, (name, losses)
    assert weights[worst] < WEIGHT_BOUND, (name, worst, weights[worst])


def moved(method):
    """The classifier's weights, one unit in the last place up."""
    weight = method.student.decode_head.linear_pred.weight
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_every_lever_keeps_the_curve(workload, steps):
    expected = curve(workload, LOOP[RELEASED], steps)
    first, last = expected[0][0], expected[0][-1]
    assert (
        last["loss/feature_distance"] > 0.01 and last["confident"] == 1.0 and last["loss/mixed"] != first["loss/mixed"]
    )
    chosen = NAMES if steps > 4 else [*list(LOOP)[-1:], ONE_PASS]
    for name in chosen:
        if name != RELEASED:
            assert_same(name, curve(workload, VARIANTS[name], steps), expected)
    if steps > 4:
        assert_same("one unit in the last place", curve(workload, LOOP[RELEASED], steps, moved), expected)
        assert last["loss"] < first["loss"]  # it does learn


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_threshold_moves_the_curve_by_single_pixels_only(workload, steps):
    """What a pixel on the threshold changes is told from everything else: the mixed loss changes by no more than the
    share of confident pixels does, times the target pixels' mean cross-entropy (below 4 here)."""
    workload = dataclasses.replace(workload, config=dataclasses.replace(workload.config, threshold=0.9))
    pixels = workload.batches[0].source_label.numel()
    expected, _ = curve(workload, LOOP[RELEASED], steps)
    found, _ = curve(workload, OURS[ONE_PASS], steps)
    assert 0.05 < expected[-1]["confident"] < 0.95
    flips = [round(abs(a["confident"] - b["confident"]) * pixels) for a, b in zip(found, expected, strict=True)]
    print("pixels on the threshold:", flips)
    assert max(flips) <= 3
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in ("loss/source", "loss/feature_distance"):
            assert abs(a[name] - b[name]) <= LOSS_BOUND * abs(b[name]), (number, name)
        allowed = LOSS_BOUND * abs(b["loss/mixed"]) + 4 * max(flips[: number + 1]) / pixels
        assert abs(a["loss/mixed"] - b["loss/mixed"]) < allowed, number


def test_a_lever_that_is_wrong_leaves_the_curve(workload):
    def wrong(method, optim, steps, report):
        method.class_weight = torch.ones_like(method.class_weight)
        return variants.ours(method, optim, steps, report)

    expected = curve(workload, OURS[ONE_PASS], 2)
    with pytest.raises(AssertionError, match="loss"):
        assert_same("wrong", curve(workload, variants.Variant(wrong), 2), expected)
