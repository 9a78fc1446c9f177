"""Our encoder of SAM against segment-anything's: every kind of block, every form of attention, each precision."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_fast.models import sam_forms
from ssr_fast.models.sam import SHAPES, SamShape, build_vit
from ssr_fast.models.sam_encoder import ChannelNorm, SamEncoder
from tests.models.sam_nets import CASES, SMALL, STRUCTURE, LargestTensor, error, ours, random_encoder
from tests.syncfree import NoHostSync


def biased_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor) -> Tensor:
    """xformers' memory_efficient_attention in plain PyTorch, with what its kernel demands of a bias."""
    assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1]) and attn_bias.stride(2) % 8 == 0
    scores = torch.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k) + attn_bias
    return torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex as it is written, not compiled, and xformers by a stand-in."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(sam_forms, "_flex", lambda: flex_attention)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", biased_attention, raising=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", sam_forms.FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_segment_anything(case: str, form: str, anywhere: None) -> None:
    shape, size = CASES[case]
    encoder = random_encoder(shape).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, found = encoder(images), ours(encoder, shape, form)(images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_state_dict_and_initial_weights_are_segment_anythings() -> None:
    states = []
    for build in (build_vit, SamEncoder):
        torch.manual_seed(0)
        states.append(build(STRUCTURE).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("form", ["low_rank", "mask"])
def test_fp32_error(form: str) -> None:
    for shape, size in CASES.values():
        encoder, images = random_encoder(shape), torch.randn(2, 3, *size)
        assert error(ours(encoder, shape, form)(images), encoder(images)) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", sam_forms.FORMS)
def test_bf16_error_is_at_most_stocks(form: str, anywhere: None) -> None:
    for case in ("trained size", "windows with padding", "SAM's structure"):
        shape, size = CASES[case]
        encoder = random_encoder(shape).bfloat16()
        images = torch.randn(4, 3, *size).bfloat16()
        exact = copy.deepcopy(encoder).double()(images.double())
        stock, found = error(encoder(images), exact), error(ours(encoder, shape, form)(images), exact)
        print(f"{case}: {form} {found:.2e}, stock {stock:.2e}")
        assert found <= 1.5 * stock


def test_the_necks_norm_is_accurate_in_bf16() -> None:
    x = torch.randn(2, 64, 8, 8) + 30
    stock, norm = LayerNorm2d(64).requires_grad_(False), ChannelNorm(64)
    exact = stock.double()(x.bfloat16().double())
    theirs = error(stock.bfloat16()(x.bfloat16()), exact)
    assert error(norm.bfloat16()(x.bfloat16()), exact) < 4e-3 < theirs


@pytest.mark.parametrize("shape", [SMALL, STRUCTURE])
def test_values_of_their_own_width_give_the_same(shape: SamShape) -> None:
    """As a GPU whose kernels take them runs it."""
    encoder = ours(random_encoder(shape).double(), shape)
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    expected = encoder(images)
    (prepared,) = encoder._prepared.values()
    assert all(layout.wide_value for layout, _ in prepared)
    prepared[:] = [(layout._replace(wide_value=False), tables) for layout, tables in prepared]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-12, atol=1e-12)


def test_widths_are_those_that_fused_kernels_take() -> None:
    for shape in SHAPES.values():
        side = shape.size // shape.patch
        with FakeTensorMode():
            prepared = SamEncoder(shape).requires_grad_(False).prepare(side, side)
        for layout, tables in prepared:
            head, more = shape.width // shape.heads, layout.one_hot.shape[1]
            assert more == tables.rows.shape[2] + tables.columns.shape[2]
            assert (head + more) % 8 == 0 and head + more <= 256


def test_gradients() -> None:
    encoder = random_encoder(SMALL).double().requires_grad_()
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    expected, other = encoder(images), ours(encoder, SMALL).requires_grad_()
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(encoder.parameters()), cotangent)
    gradients = torch.autograd.grad(other(images), list(other.parameters()), cotangent)
    for name, one, two in zip(dict(encoder.named_parameters()), wanted, gradients, strict=True):
        assert (one - two).norm() <= 1e-9 * one.norm(), name
    assert not other._prepared


def test_what_is_kept_follows_the_weights() -> None:
    encoder = random_encoder(SMALL)
    found, images = ours(encoder, SMALL), torch.randn(1, 3, 64, 64)
    found(images)
    kept = next(iter(found._prepared.values()))
    assert found.prepare(8, 8) is kept and found.prepare(8, 16) is not kept
    other = random_encoder(SMALL, seed=1)
    found.load_state_dict(other.state_dict())
    assert error(found(images), other(images)) < 1e-5
    found.double()
    assert error(found(images.double()), other.double()(images.double())) < 1e-12
    with torch.no_grad():
        for one in (found, other):
            one.blocks[1].attn.rel_pos_w.mul_(2)  # type: ignore[union-attr,index,operator]
    assert error(found(images.double()), other(images.double())) < 1e-12
    assert list(found.state_dict()) == list(other.state_dict())


def test_one_call_for_source_and_mixed_images() -> None:
    encoder, images = ours(random_encoder(SMALL), SMALL), torch.randn(4, 3, 72, 72)
    assert error(torch.cat([encoder(half) for half in images.chunk(2)]), encoder(images)) < 1e-6


@pytest.mark.parametrize("form", ["low_rank", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_sync_and_the_same_bits_each_time(form: str, dtype: torch.dtype) -> None:
    encoder, images = ours(random_encoder(SMALL).to(dtype), SMALL, form), torch.randn(2, 3, 72, 72).to(dtype)
    with NoHostSync():
        first, second = encoder(images), encoder(images)
    assert torch.equal(first, second)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of 128 x 128 \(it got \(128, 96\)\)"):
        SamEncoder(STRUCTURE)(torch.zeros(1, 3, 128, 96))


def test_half_size_equals_stock_with_the_same_positions() -> None:
    shape = SamShape(128, 16, 32, 4, 4, 4.0, 16, 3, (1, 3))
    large = random_encoder(shape).double()
    small = build_vit(SamShape(64, 16, 32, 4, 4, 4.0, 16, 3, (1, 3))).double().eval().requires_grad_(False)
    state = large.state_dict()
    state["pos_embed"] = F.interpolate(
        state["pos_embed"].permute(0, 3, 1, 2), (4, 4), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    for name, wanted in small.state_dict().items():
        if "rel_pos" in name and state[name].shape != wanted.shape:
            state[name] = F.interpolate(state[name].T[None], len(wanted), mode="linear")[0].T
    small.load_state_dict(state)
    found = ours(large, shape)
    found.resize(64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(found(images), small(images), rtol=1e-10, atol=1e-10)
    assert found(images).shape == (2, 16, 4, 4) and not found.pos_embed.requires_grad  # type: ignore[union-attr]


def largest_at_1024(encoder: nn.Module) -> int:
    with LargestTensor() as mode:
        encoder(torch.empty(1, 3, 1024, 1024))
    return mode.largest


def test_no_map_of_attention_is_stored_at_1024() -> None:
    """The largest tensor of ViT-B's forward pass on one image, against 4096 x 4096 scores in each of 12 heads."""
    shape, tokens = SHAPES["vit_b"], 64 * 64
    with FakeTensorMode(), torch.no_grad():
        stock = largest_at_1024(build_vit(shape).eval())
        found = {form: largest_at_1024(SamEncoder(shape, form)) for form in ("low_rank", "mask")}
    print(f"largest tensor, elements: stock {stock:,}, " + ", ".join(f"{k} {v:,}" for k, v in found.items()))
    assert stock == found["mask"] == shape.heads * tokens**2
    assert found["low_rank"] == tokens * 4 * shape.width  # the hidden layer of an MLP


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [1024, 512])
def test_vit_b(size: int) -> None:
    shape = SHAPES["vit_b"]
    encoder = random_encoder(shape)
    images = torch.randn(1, 3, size, size)
    found = ours(encoder, shape)
    if size != shape.size:
        found.resize(size)
        encoder.pos_embed = found.pos_embed
    expected = encoder(images)  # at 512 too: its get_rel_pos interpolates the tables
    for form in ("low_rank", "mask"):
        other = SamEncoder(shape, form).requires_grad_(False)
        other.resize(size)
        other.load_state_dict(found.state_dict())
        off = error(other(images), expected)
        print(f"ViT-B at {size}, fp32, {form}: {off:.2e}")
        assert off < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_flex_compiled() -> None:
    encoder = random_encoder(SMALL)
    images = torch.randn(2, 3, 104, 72)
    assert error(ours(encoder, SMALL, "flex")(images), encoder(images)) < 1e-5
