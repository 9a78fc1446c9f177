"""The methods against brute-force definitions of the recipe, and the rules of a step: no sync, no hidden state."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from ssr_fast.data.augment import normalise_batch
from ssr_fast.methods import method as method_module
from ssr_fast.methods import regularisers, self_training
from ssr_fast.methods.method import class_weights, step_key
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models import heads, mit
from ssr_fast.models.segmentor import ModelConfig
from tests.methods.support import K, make_batch, make_method
from tests.syncfree import NoHostSync

VARIANTS = {
    "supervised": ("supervised", {}),
    "self_training": ("self_training", {}),
    "waiting": ("self_training", {"start_step": 10}),
    "distance": ("self_training", {"feature_distance": 0.005}),
    "cosine": ("ssr", {}),
    "cosine_source": ("ssr", {"ssr": SsrConfig(domains="source", points=("stage2",))}),
    "cosine_before_start": ("ssr", {"start_step": 10, "ssr": SsrConfig(points=("fused",))}),
    "injection": ("ssr", {"ssr": SsrConfig(regulariser="injection")}),
    "injection_mixed": ("ssr", {"ssr": SsrConfig(regulariser="injection", domains="mixed", points=("stage1",))}),
    "injection_before_start": ("ssr", {"start_step": 10, "ssr": SsrConfig(regulariser="injection")}),
}


def make(variant, seed=0):
    name, options = VARIANTS[variant]
    return make_method(name, seed, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_needs_no_sync_and_no_generator(variant):
    method, batch = make(variant), make_batch()
    before = torch.get_rng_state()
    with NoHostSync():
        terms = method.losses(batch, 3)
        terms["loss"].backward()
    assert torch.equal(before, torch.get_rng_state())
    assert all(value.ndim == 0 and math.isfinite(float(value)) for value in terms.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_inputs_give_bit_equal_losses_and_gradients(variant):
    def once():
        method = make(variant)
        out = [method.losses(make_batch(seed=step), step) for step in range(2)]
        out[-1]["loss"].backward()
        return [float(terms["loss"].detach()) for terms in out], [
            p.grad for module in method.trainable().values() for p in module.parameters() if p.grad is not None
        ]

    (losses, grads), (again, grads_again) = once(), once()
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("variant", ["cosine", "cosine_source"])
@pytest.mark.parametrize("head", ["daformer", "segformer"])
def test_a_step_aligns_what_the_compiled_backends_take(variant, head, monkeypatch):
    """Otherwise `auto` would run the PyTorch form on every GPU, and only be slow."""
    calls, op = [], regularisers.align_stages

    def recorded(features, weights, biases, target, *rest):
        calls.append([target, *features, *weights, *(bias for bias in biases if bias is not None)])
        return op(features, weights, biases, target, *rest)

    monkeypatch.setattr(regularisers, "align_stages", recorded)
    name, options = VARIANTS[variant]
    model = ModelConfig(backbone="mit_tiny", channels=16, head=head)
    make_method(name, model=model, **options).losses(make_batch(), 2)["loss"].backward()
    assert len(calls) == 1 and len({tensor.dtype for tensor in calls[0]}) == 1
    assert all(tensor.is_contiguous() for tensor in calls[0]), [tensor.stride() for tensor in calls[0]]


@pytest.mark.parametrize("head", ["daformer", "segformer"])
def test_a_step_gives_the_other_kernels_what_triton_takes(head, monkeypatch):
    calls = {}
    for module, name in (
        (mit, "dwconv_gelu"), (heads, "dwconv_dilated"), (method_module, "segloss"), (self_training, "pseudo_label")
    ):  # fmt: skip
        original = getattr(module, name)

        def recorded(*arguments, op=original, name=name):
            flat = [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]
            calls.setdefault(name, []).append([t for t in flat if isinstance(t, torch.Tensor)])
            return op(*arguments)

        monkeypatch.setattr(module, name, recorded)
    model = ModelConfig(backbone="mit_tiny", channels=16, head=head)
    make_method("self_training", model=model).losses(make_batch(), 2)["loss"].backward()
    expected = {"dwconv_gelu", "segloss", "pseudo_label"} | ({"dwconv_dilated"} if head == "daformer" else set())
    assert calls.keys() == expected and len(calls["segloss"]) == 2
    for name, every in calls.items():
        assert all(tensor.is_contiguous() for call in every for tensor in call), name


@pytest.mark.parametrize("variant", ["self_training", "cosine", "injection", "supervised"])
def test_every_trainable_parameter_gets_a_gradient_and_nothing_else_does(variant):
    method = make(variant)
    method.losses(make_batch(), 2)["loss"].backward()
    for role, module in method.trainable().items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (role, name)
    trained = {id(p) for module in method.trainable().values() for p in module.parameters()}
    assert all(p.grad is None for p in method.parameters() if id(p) not in trained)


@pytest.mark.parametrize("start_step", [0, 10])
@pytest.mark.parametrize(
    "ssr",
    [SsrConfig(), SsrConfig(domains="source", points=("stage2",)), SsrConfig(regulariser="injection")],
    ids=["cosine", "cosine_source", "injection"],
)
def test_kept_features_change_no_loss_and_no_gradient(ssr, start_step):
    def once(features):
        method = make_method("ssr", ssr=ssr, features=features, start_step=start_step)
        batch = method.prepare(make_batch())
        if features == "cached_views":
            source = normalise_batch(batch.source_image)
            torch.testing.assert_close(batch.source_features, method.encoder.encode(source))
            with NoHostSync():
                method.losses(batch, 3)
        terms = method.losses(batch, 3)
        terms["loss"].backward()
        return terms, [p.grad for module in method.trainable().values() for p in module.parameters()]

    (terms, grads), (kept, kept_grads) = once("online"), once("cached_views")
    torch.testing.assert_close(kept, terms)
    total = torch.stack([grad.norm() for grad in grads]).norm()
    for one, two in zip(grads, kept_grads, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm() + 1e-8 * total


def test_kept_features_are_what_is_aligned_to():
    method = make_method("ssr", features="cached_views", start_step=10)
    batch = method.prepare(make_batch())
    assert make_method("ssr").prepare(make_batch()).source_features is None
    other = dataclasses.replace(batch, source_features=-batch.source_features)
    name = "loss/cosine"
    assert abs(float(method.losses(batch, 3)[name].detach()) - float(method.losses(other, 3)[name].detach())) > 1e-2


def test_seeds_and_steps_change_the_draws():
    def keys(seed, step, rank):
        return step_key(seed, step, rank)

    assert len({keys(s, t, r) for s in range(10) for t in range(100) for r in range(4)}) == 4000


def test_teacher_follows_by_the_recipes_rate_and_keeps_its_own_buffers():
    method = make_method("self_training", momentum=0.9)
    teacher = method.teacher.net
    expected = [p.clone() for p in teacher.parameters()]
    buffers = [b.clone() for b in teacher.buffers()]
    for step in range(13):
        with torch.no_grad():
            for p in method.student.parameters():
                p.add_(0.1)
        method.teacher.follow(method.student, step)
        alpha = min(1 - 1 / (step + 1), 0.9)
        expected = [alpha * e + (1 - alpha) * s for e, s in zip(expected, method.student.parameters(), strict=True)]
    for mine, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(buffers, teacher.buffers(), strict=True))


def test_teacher_normalises_by_batch_statistics_without_noise_even_in_eval():
    method = make_method("self_training")
    images = normalise_batch(make_batch().target_image)
    one = method.teacher(images)
    method.student.noise.key.fill_(99)
    method.teacher.net.noise.key.fill_(7)
    assert torch.equal(one, method.teacher(images))
    with torch.no_grad():
        for buffer in method.teacher.net.buffers():
            if buffer.dtype == torch.float32:
                buffer.fill_(123.0)
    method.eval()
    assert torch.equal(one, method.teacher(images))


def test_mixed_image_label_and_weight_by_brute_force():
    method = make_method(
        "self_training",
        threshold=0.21,
        ignore_top=0.125,
        ignore_bottom=0.25,
        jitter_probability=0.0,
        blur_probability=0.0,
    )
    batch = make_batch()
    source, target = normalise_batch(batch.source_image), normalise_batch(batch.target_image)
    mixed = method.mix(batch, source, torch.tensor(5), True)
    probabilities = F.interpolate(method.teacher(target), (64, 96), mode="bilinear", align_corners=False).softmax(1)
    confidence, pseudo = probabilities.max(1)
    q = (confidence >= 0.21).float().mean()
    assert 0 < q < 1
    torch.testing.assert_close(mixed.confident, q, rtol=0, atol=1e-3)
    valid = torch.zeros(2, 64, 96, dtype=torch.bool)
    valid[:, 8:48] = True
    pasted = (mixed.image - source).abs().amax(1) < 1e-5
    assert 0.05 < pasted.float().mean() < 0.95
    torch.testing.assert_close(
        mixed.image[~pasted.unsqueeze(1).expand_as(source)],
        target[~pasted.unsqueeze(1).expand_as(source)],
        rtol=0,
        atol=1e-4,
    )
    assert torch.equal(mixed.label[pasted], batch.source_label[pasted])
    assert (mixed.label[~pasted].long() == pseudo[~pasted]).float().mean() > 0.999
    expected = torch.where(pasted, 1.0, mixed.confident * valid)
    torch.testing.assert_close(mixed.weight, expected)


def test_cross_entropy_divides_by_all_pixels_and_weighs_classes():
    method = make_method("supervised", weights="inverse_sqrt")
    logits = torch.randn(2, K, 16, 24, generator=torch.Generator().manual_seed(0))
    labels = make_batch().source_label
    up = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)
    each = F.cross_entropy(up, labels.long(), ignore_index=255, reduction="none")
    expected = (each * method.class_weight[labels.long()]).sum() / labels.numel()
    torch.testing.assert_close(method.cross_entropy(logits, labels), expected)


def test_class_weights_have_mean_one_over_the_pixels():
    counts = [100, 50, 25, 13, 12]
    weights = class_weights("inverse_sqrt", counts)[:K]
    share = torch.tensor(counts) / sum(counts)
    assert abs(float((weights * share).sum()) - 1) < 1e-5
    torch.testing.assert_close(weights[0] / weights[2], torch.tensor(0.5))
    assert class_weights("none", counts).eq(1).all()


def test_feature_distance_by_brute_force_and_without_things():
    method = make_method("self_training", feature_distance=0.5)
    batch = make_batch(size=(64, 128))
    batch.source_label[:] = 0
    batch.source_label[0, :32, :64] = 3
    batch.source_label[1, 32:, 32:64] = 4
    source = normalise_batch(batch.source_image)
    output = method.student(source)
    features, anchor = output.features[-1], method.reference(source)[-1]
    distance = (features - anchor).norm(dim=1)
    expected = 0.5 * torch.stack([distance[0, 0, 0], distance[0, 0, 1], distance[1, 1, 1]]).mean()
    torch.testing.assert_close(method.feature_distance(output, source, batch.source_label), expected)
    nothing = method.feature_distance(output, source, torch.zeros_like(batch.source_label))
    assert float(nothing) == 0.0
    nothing.backward()


def test_one_pass_over_both_domains_equals_two():
    method = make_method("self_training")
    method.student.backbone.eval()  # drop path draws by position in the batch
    method.student.decode_head.dropout.p = 0.0
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = method.student(images, domains=2).logits
    torch.testing.assert_close(both[:2], method.student(images[:2]).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[2:], method.student(images[2:]).logits, rtol=1e-4, atol=1e-5)
