"""Stored features (`cached_full`): what is aligned to, by definition, and no encoder where none is needed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ssr_fast.data.augment import normalise_batch
from ssr_fast.methods import build as build_module
from ssr_fast.methods import regularisers
from ssr_fast.methods.mixing import compose
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.sam import alignment_target
from tests.methods.support import make_batch, make_method, with_features
from tests.syncfree import NoHostSync

COMPOSED = {"mixed": "composed"}
VARIANTS = {
    "composed": (COMPOSED, SsrConfig()),
    "composed, mixed alone": (COMPOSED, SsrConfig(domains="mixed")),
    "composed, injection": (COMPOSED, SsrConfig(regulariser="injection")),
    "source alone": ({}, SsrConfig(domains="source")),
    "mixed online": ({}, SsrConfig()),
    "mixed online, injection": ({}, SsrConfig(regulariser="injection")),
}


def make(variant, **options):
    sam, ssr = VARIANTS[variant]
    return make_method("ssr", ssr=ssr, features="cached_full", sam=sam, **options)


def batch_for(variant, **options):
    return with_features(make_batch(), target="composed" in variant, **options)


def aligned(method, batch, step, monkeypatch):
    """What the step aligns to, and its Mixed."""
    seen = {}
    op, mix = regularisers.align_stages, method.mix
    monkeypatch.setattr(
        regularisers,
        "align_stages",
        lambda f, w, b, target, *rest: (seen.update(target=target), op(f, w, b, target, *rest))[1],
    )
    method.mix = lambda *arguments: seen.setdefault("mixed", mix(*arguments))
    method.losses(batch, step)
    return seen["target"], seen.get("mixed")


@pytest.mark.parametrize("start_step", [0, 10])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_repeats_and_never_waits(variant, start_step):
    def once():
        method = make(variant, start_step=start_step)
        batch = method.prepare(batch_for(variant))
        with NoHostSync():
            terms = method.losses(batch, 3)
            terms["loss"].backward()
        return terms, [p.grad for module in method.trainable().values() for p in module.parameters()]

    (terms, grads), (again, grads_again) = once(), once()
    assert all(torch.equal(terms[name], again[name]) and torch.isfinite(terms[name]) for name in terms)
    assert all(torch.equal(one, two) for one, two in zip(grads, grads_again, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads) or start_step  # before, nothing reaches some of the heads


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "online" not in name])
def test_without_anything_to_encode_there_is_no_encoder(variant, monkeypatch):
    def built(config):
        raise AssertionError("the encoder is built")

    monkeypatch.setattr(build_module, "build_sam", built)
    method = make(variant)
    assert method.encoder is None
    assert sum("encoder" in name for name, _ in method.named_modules()) == 0
    method.compute_in(torch.bfloat16)
    terms = method.losses(batch_for(variant), 3)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])


def test_composed_targets_by_brute_force(monkeypatch):
    method, batch = make("composed"), batch_for("composed")
    target, mixed = aligned(method, batch, 3, monkeypatch)
    count, grid = 2, (4, 6)
    expected = torch.empty(count, 6, *grid)
    for b in range(count):
        for y in range(grid[0]):
            for x in range(grid[1]):
                share = mixed.mask[b, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].float().mean()
                one, two = batch.source_features[b, :, y, x], batch.target_features[b, :, y, x]
                expected[b, :, y, x] = share * one + (1 - share) * two
    shares = F.avg_pool2d(mixed.mask[:, None].float(), 16)
    assert (shares == 0).any() and (shares == 1).any()
    assert ((shares > 0) & (shares < 1)).any(), "the pasted classes end within a token"
    torch.testing.assert_close(target[count:], expected.permute(0, 2, 3, 1))
    assert torch.equal(target[:count], batch.source_features.permute(0, 2, 3, 1)) and target.is_contiguous()
    source_label = batch.source_label[mixed.mask]  # the mask is the one that image and labels were pasted with
    assert torch.equal(mixed.label[mixed.mask], source_label) and (mixed.weight[mixed.mask] == 1.0).all()


def test_a_token_of_one_domain_has_its_feature_exactly():
    source, target = torch.randn(2, 3, 5, 4, 7), torch.zeros(3, 80, 112, dtype=torch.bool)
    mask = target.clone()
    mask[:, 16:48, 32:64] = True
    found = compose(mask, source[0], source[1])
    whole = compose(torch.ones_like(mask), source[0], source[1])
    assert torch.equal(whole, source[0]) and torch.equal(compose(target, source[0], source[1]), source[1])
    assert torch.equal(compose(None, source[0], source[1]), source[1])
    assert torch.equal(found[..., 0], source[1][..., 0]) and not torch.equal(found, source[1])


def test_before_self_training_the_mixed_image_is_the_target(monkeypatch):
    method, batch = make("composed", start_step=10), batch_for("composed")
    target, mixed = aligned(method, batch, 3, monkeypatch)
    assert mixed.mask is None
    halves = torch.cat([batch.source_features, batch.target_features]).permute(0, 2, 3, 1)
    assert torch.equal(target, halves)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_with_mixed_images_online_the_source_alone_is_stored(grid, monkeypatch):
    """An encoder that resizes its input has more tokens a crop: the stored ones are brought to its grid."""
    method, batch = make("mixed online"), batch_for("mixed online", grid=grid)
    target, mixed = aligned(method, batch, 3, monkeypatch)
    kept = F.interpolate(batch.source_features, (4, 6), mode="bilinear", align_corners=False)
    if grid is None:
        assert torch.equal(kept, batch.source_features)
    torch.testing.assert_close(target[:2], kept.permute(0, 2, 3, 1))
    assert torch.equal(target[2:], method.encoder.encode(mixed.image).permute(0, 2, 3, 1))


def test_stored_features_are_standardised_over_the_batch(monkeypatch):
    method = make_method("ssr", features="cached_full", sam={**COMPOSED, "standardise": True}, start_step=10)
    batch = batch_for("composed")
    target, _ = aligned(method, batch, 3, monkeypatch)
    both = torch.cat([batch.source_features, batch.target_features])
    assert torch.equal(target, alignment_target(both, True))
    torch.testing.assert_close(target.mean((0, 1, 2)), torch.zeros(6), atol=1e-5, rtol=0)


def test_features_of_the_encoder_itself_give_the_losses_of_online():
    """The only difference between the modes is where features come from."""
    ssr = SsrConfig(domains="source")
    online, stored = make_method("ssr", ssr=ssr), make("source alone")
    stored.load_state_dict(online.state_dict(), strict=False)
    batch = make_batch()
    features = online.encoder.encode(normalise_batch(batch.source_image))
    one = online.losses(batch, 3)
    two = stored.losses(dataclasses.replace(batch, source_features=features), 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
