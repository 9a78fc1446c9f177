"""The row on transformers' Segformer takes the released loop's steps: the same function, gradients, losses, weights."""

import dataclasses
import importlib.util

import pytest
import torch

from bench import huggingface, variants
from bench.draws import CounterDraws
from bench.harness import Setting
from bench.huggingface import TransformersBackbone, TransformersStep
from bench.released import ReleasedStep
from bench.stepping import Comparison, loss_terms
from bench.variants import TRANSFORMERS
from bench.workload import STEPS, decided, demo_workload
from ssr_fast.models.segmentor import ModelConfig, build_segmentor
from tests.bench.teaching import teach

CPU = torch.device("cpu")
BOUND = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the [dev] extra brings transformers")


def apart(found, expected):
    return float(((found - expected).norm() / expected.norm().clamp_min(1e-30)).detach())


def as_theirs(segmentor, tensors):
    """Tensors by our parameters' names -> by transformers'."""
    holder = build_segmentor(segmentor.config, segmentor.class_count).backbone
    holder.load_state_dict(tensors, strict=True)
    return dict(TransformersBackbone(segmentor, holder).net.named_parameters())


def test_features_and_gradients_without_stochastic_depth(transformers):
    segmentor = build_segmentor(ModelConfig(backbone="mit_b0", channels=16, drop_path=0.0), 5, 1)
    ours = segmentor.backbone.train()
    with torch.no_grad():  # random weights leave norms and biases at their start, where much cancels
        for number, parameter in enumerate(ours.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    theirs = TransformersBackbone(segmentor, ours).train()
    assert theirs.net.config._attn_implementation == "sdpa"  # its default, which the row is described by
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected, found = ours(images), theirs(images)
    assert len(found) == 4 and max(apart(a, b) for a, b in zip(found, expected, strict=True)) < BOUND
    probes = [torch.randn(one.shape, generator=torch.Generator().manual_seed(7)) for one in expected]
    for features in (expected, found):
        sum((one * probe).sum() for one, probe in zip(features, probes, strict=True)).backward()
    gradients = as_theirs(segmentor, {name: one.grad for name, one in ours.named_parameters()})
    worst = {}
    for name, parameter in theirs.net.named_parameters():
        if not name.endswith("k_proj.bias"):  # a constant in front of the softmax: its gradient is rounding
            worst[name] = apart(parameter.grad, gradients[name])
    print(max(worst, key=worst.get), max(worst.values()))
    assert len(worst) == len(gradients) - 8 and max(worst.values()) < BOUND


def test_losses_and_weights_of_several_steps(transformers):
    """With stochastic depth, on the same random numbers, at rates that move the losses by far more than the bound."""
    fresh = demo_workload(2, 96, 192)
    optim = dataclasses.replace(fresh.optim, lr=3.5e-4, head_lr_factor=2.0, warmup_steps=0, weight_decay=1.0)
    workload = dataclasses.replace(fresh, optim=optim)
    runs, methods, taught = [], [], None
    for build in (ReleasedStep, TransformersStep):
        method = workload.method(CPU)
        logits = teach(method, taught)
        step = build(method, workload.optim, STEPS)
        step.draws = CounterDraws()
        runs.append([loss_terms(step(workload.batches[number], number)) for number in range(4)])
        methods.append(method)
        assert taught is None or max(apart(a, b) for a, b in zip(logits, taught, strict=True)) < BOUND
        taught = logits
    expected, found = runs
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "loss/source", "loss/mixed"):
            assert abs(a[name] - b[name]) < BOUND * b[name], (name, found, expected)
    assert abs(expected[1]["loss/mixed"] / expected[0]["loss/mixed"] - 1) > 1e-3
    for net in ("student", "teacher.net"):
        ours, theirs = (method.get_submodule(net) for method in methods)
        start = as_theirs(ours, fresh.student.backbone.state_dict())
        wanted, found = as_theirs(ours, ours.backbone.state_dict()), dict(theirs.backbone.net.named_parameters())
        pairs = [(found[name], wanted[name], start[name]) for name in wanted if not name.endswith("k_proj.bias")]
        head = fresh.student.decode_head.get_parameter
        pairs += [
            (theirs.decode_head.get_parameter(name), one, head(name))
            for name, one in ours.decode_head.named_parameters()
        ]
        off, moved = (
            torch.cat([(pair[a] - pair[b]).detach().flatten() for pair in pairs]).norm() for a, b in ((0, 1), (1, 2))
        )
        print(net, float(off / moved))
        # AdamW moves what has next to no gradient as far as anything else, whose sign is rounding
        assert len(found) == len(wanted) and off < 1e-2 * moved, (net, off, moved)


def test_the_random_numbers_matter(transformers):
    """Else the losses above would say nothing of stochastic depth."""
    workload, found = demo_workload(2, 64, 64), []
    for numbers in (CounterDraws, variants.HostDraws):
        step = TransformersStep(workload.method(CPU), workload.optim, STEPS)
        step.draws = CounterDraws()
        branches = numbers()
        step.draws.branch = branches.branch
        begin, enter = step.draws.begin, step.draws.enter
        step.draws.begin = lambda *a, b=begin, n=branches: (b(*a), n.begin(*a))
        step.draws.enter = lambda *a, e=enter, n=branches: (e(*a), n.enter(*a))
        found.append(step(workload.batches[0], 0)["loss/source"])
    assert abs(found[0] - found[1]) > 10 * BOUND


def test_other_weights_are_noticed(transformers, monkeypatch):
    workload = demo_workload(1, 64, 64)
    decided(workload.student)
    (row,) = Comparison(workload, [TRANSFORMERS], Setting(CPU, True), None).run()
    assert row.status == "ok", row
    right = huggingface.from_native

    def other(*arguments):
        return {name: 1.1 * one if "dense2.weight" in name else one for name, one in right(*arguments).items()}

    monkeypatch.setattr(huggingface, "from_native", other)
    (row,) = Comparison(workload, [TRANSFORMERS], Setting(CPU, True), None).run()
    assert row.status == "wrong", row


def test_other_parameters_are_refused(transformers, monkeypatch):
    right = huggingface.from_native
    monkeypatch.setattr(huggingface, "from_native", lambda *a: {k: v for k, v in right(*a).items() if ".3." not in k})
    segmentor = build_segmentor(ModelConfig(backbone="mit_tiny", channels=16), 5)
    with pytest.raises(ValueError, match="other parameters than a MiT"):
        TransformersBackbone(segmentor, segmentor.backbone)


def test_without_transformers_the_row_is_skipped(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else found(name)
    )
    (row,) = Comparison(demo_workload(1, 64, 64), [TRANSFORMERS], Setting(CPU, True), None).run()
    assert row.status == "skipped" and row.reasons == ["transformers is not installed (the [dev] extra brings it)"]
