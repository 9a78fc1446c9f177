"""MiT: its shapes, names, numbers, noise and memory layout."""

import copy

import pytest
import torch
from torch import nn

from ssr_fast.errors import UserError
from ssr_fast.models.heads import DROPOUT_STREAM, DAFormerHead
from ssr_fast.models.mit import MIT, Attention, MixTransformer
from ssr_fast.models.noise import ChannelDropout, Noise, StochasticDepth
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor
from tests.syncfree import NoHostSync

from .networks import assert_equal


def tiny(drop_path: float = 0.0, dropout: float = 0.0, seed: int = 0, head: str = "daformer") -> Segmentor:
    config = ModelConfig(backbone="mit_tiny", head=head, channels=64, drop_path=drop_path, dropout=dropout)
    return build_segmentor(config, class_count=5, seed=seed)


# Parameters without a classification head, in thousands: the sums of the published shapes.
@pytest.mark.parametrize(
    ("name", "thousands"),
    [("mit_b0", 3319), ("mit_b1", 13151), ("mit_b2", 24196), ("mit_b3", 44072), ("mit_b4", 60842), ("mit_b5", 81443)],
)
def test_parameter_counts(name: str, thousands: int) -> None:
    with torch.device("meta"):
        backbone = MixTransformer(MIT[name], 0.1, Noise())
    assert sum(p.numel() for p in backbone.parameters()) // 1000 == thousands


def test_b5_has_the_originals_tensors_and_daformer_its_size() -> None:
    with torch.device("meta"):
        backbone = MixTransformer(MIT["mit_b5"], 0.1, Noise())
    head = DAFormerHead(MIT["mit_b5"].dims, 19, noise=Noise())
    names = backbone.state_dict()
    assert len(names) == 1052
    size = sum(p.numel() for p in backbone.parameters())
    assert size == 81_443_008
    assert round((size + sum(p.numel() for p in head.parameters())) / 1e6, 2) == 85.16
    expected = {
        "patch_embed1.proj.weight": [64, 3, 7, 7],
        "patch_embed4.norm.bias": [512],
        "block1.2.attn.sr.weight": [64, 64, 8, 8],
        "block1.0.attn.norm.weight": [64],
        "block2.5.attn.kv.weight": [256, 128],
        "block3.39.mlp.dwconv.dwconv.weight": [1280, 1, 3, 3],
        "block3.39.mlp.dwconv.dwconv.bias": [1280],
        "block4.2.mlp.fc2.weight": [512, 2048],
        "block4.0.attn.q.bias": [512],
        "norm4.weight": [512],
    }
    assert {name: list(names[name].shape) for name in expected} == expected
    assert "block4.0.attn.sr.weight" not in names, "the last stage has no spatial reduction"


def test_norms_have_the_two_epsilons() -> None:
    for name, module in tiny().backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            after_convolution = name.startswith("patch_embed") or ".attn." in name
            assert module.eps == (1e-5 if after_convolution else 1e-6), name


@pytest.mark.parametrize("size", [(64, 96), (37, 61), (33, 32), (17, 200)])
def test_feature_sizes_and_layout(size: tuple[int, int]) -> None:
    features = tiny().eval().features(torch.randn(2, 3, *size))
    for feature, dim, stride in zip(features, MIT["mit_tiny"].dims, (4, 8, 16, 32), strict=True):
        assert feature.shape == (2, dim, -(-size[0] // stride), -(-size[1] // stride))
        assert feature.permute(0, 2, 3, 1).is_contiguous(), "tokens must stay channels-last rows"


@pytest.mark.parametrize("name", ["mit_tiny", "mit_b0"])
def test_the_smallest_image_works_and_a_smaller_one_is_refused(name: str) -> None:
    backbone = MixTransformer(MIT[name], 0.0, Noise()).eval()
    side = MIT[name].smallest_side
    assert side == {"mit_tiny": 17, "mit_b0": 29}[name]
    assert backbone(torch.randn(1, 3, side, side))[3].shape[2:] == (1, 1)
    with pytest.raises(UserError, match=f"{side}x{side - 1} pixels is too small.*at least {side}"):
        backbone(torch.randn(1, 3, side - 1, side))


def test_attention_against_its_formula(seed: int) -> None:
    attention = Attention(dim=12, heads=3, sr_ratio=2).double()
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        reduced = attention.norm(attention.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))  # [B, M, C]
        q = attention.q(x.flatten(1, 2))
        k = reduced @ attention.kv.weight[:12].T + attention.kv.bias[:12]
        v = reduced @ attention.kv.weight[12:].T + attention.kv.bias[12:]
        heads = []
        for part in torch.arange(12).chunk(3):
            scores = (q[..., part] @ k[..., part].transpose(1, 2)) / 4**0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        expected = attention.proj(torch.cat(heads, dim=-1)).view(2, 5, 7, 12)
        torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_images_of_a_batch_do_not_mix(seed: int) -> None:
    segmentor = tiny().eval()
    images = torch.randn(3, 3, 40, 56)
    whole = segmentor(images).logits
    single = torch.cat([segmentor(image[None]).logits for image in images])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-6)


def test_every_parameter_learns(seed: int) -> None:
    for head in ("daformer", "segformer"):
        segmentor = tiny(drop_path=0.1, dropout=0.1, head=head)
        output = segmentor(torch.randn(4, 3, 64, 64), domains=2)
        (output.logits.square().mean() + output.fused.square().mean()).backward()
        for name, parameter in segmentor.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_drop_path_rises_linearly_and_no_two_layers_share_a_stream() -> None:
    with torch.device("meta"):
        backbone = MixTransformer(MIT["mit_b2"], 0.3, Noise())
    rates = backbone.stochastic_depth.rates
    assert len(rates) == 2 * len(list(backbone.blocks())) == 32
    assert list(rates[::2]) == list(rates[1::2]) == pytest.approx([0.3 * i / 15 for i in range(16)])
    assert 2 * 52 < DROPOUT_STREAM
    segmentor = tiny()
    noisy = [m for m in segmentor.modules() if isinstance(m, (StochasticDepth, ChannelDropout))]
    assert len(noisy) == 2 and all(m.noise is segmentor.noise for m in noisy)


def test_each_branch_of_each_sample_is_dropped_by_its_own_factor() -> None:
    """Against the blocks' branches added by hand, with the numbers that the streams draw one by one."""
    segmentor = tiny(drop_path=0.6)
    segmentor.noise.key.fill_(11)
    backbone, seen, dropped = segmentor.backbone, [], 0
    blocks = list(backbone.blocks())
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    backbone(torch.randn(3, 3, 64, 64))
    for number, (block, (x, out)) in enumerate(zip(blocks, seen, strict=True)):
        rate = 0.6 * number / (len(blocks) - 1)
        for stream, norm, branch in ((2 * number, block.norm1, block.attn), (2 * number + 1, block.norm2, block.mlp)):
            keep = segmentor.noise.uniform(stream, (3, 1, 1, 1)) >= rate
            dropped += int((~keep).sum())
            x = x + branch(norm(x)) * keep / (1 - rate)
        torch.testing.assert_close(out, x)
    assert dropped > 0


def test_noise_is_a_function_of_the_key_alone() -> None:
    segmentor = tiny(drop_path=0.5, dropout=0.5)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def run(key: int) -> torch.Tensor:
        segmentor.noise.key.fill_(key)
        logits: torch.Tensor = segmentor(images).logits.detach()
        return logits

    before = torch.get_rng_state()
    first, other, again = run(1), run(2), run(1)
    assert torch.equal(torch.get_rng_state(), before), "a training forward drew from the global generator"
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    segmentor.eval()
    assert torch.equal(run(1), run(2))


def test_a_copy_has_its_own_noise() -> None:
    student = tiny(drop_path=0.5)
    teacher = copy.deepcopy(student)
    teacher.noise.key.fill_(7)
    assert student.noise.key == 0
    assert all(m.noise is teacher.noise for m in teacher.modules() if isinstance(m, (StochasticDepth, ChannelDropout)))


def test_the_key_is_not_saved() -> None:
    assert not [name for name in tiny().state_dict() if "noise" in name or "key" in name]


def test_drop_path_drops_whole_samples_at_its_rate() -> None:
    noise = Noise()
    factors = StochasticDepth([0.25, 0.0, 0.5], noise)(4000, torch.float32)
    assert factors is not None and factors.shape == (3, 4000)
    for row, rate in zip(factors, (0.25, 0.0, 0.5), strict=True):
        kept = row != 0
        assert torch.equal(row, kept.float() / (1 - rate))
        assert abs(kept.float().mean() - (1 - rate)) < 0.03
    assert StochasticDepth([0.0, 0.0], noise)(4, torch.float32) is None
    off = StochasticDepth([0.5], noise)
    off.disable()
    assert off(4, torch.float32) is None


def test_equal_seeds_build_equal_networks_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(first.state_dict(), again.state_dict())
    name = "backbone.block1.0.attn.q.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_initial_values() -> None:
    backbone = build_segmentor(ModelConfig(backbone="mit_b0"), class_count=2).backbone
    values = backbone.state_dict()
    for name, std in {
        "block4.0.mlp.fc1.weight": 0.02,
        "patch_embed2.proj.weight": (2 / (9 * 64)) ** 0.5,
        "block4.0.mlp.dwconv.dwconv.weight": (2 / 9) ** 0.5,
    }.items():
        assert values[name].std().item() == pytest.approx(std, rel=0.05), name
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_a_training_pass_never_waits_for_the_device() -> None:
    segmentor = tiny(drop_path=0.2, dropout=0.2)
    images = torch.randn(2, 3, 64, 64)
    with NoHostSync():
        segmentor(images, domains=2).logits.sum().backward()


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    segmentor = tiny(drop_path=0.2, dropout=0.2)
    images = torch.randn(2, 3, 64, 64)
    expected = copy.deepcopy(segmentor)(images, domains=2).logits
    compiled = torch.compile(segmentor, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, domains=2).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(dtype: torch.dtype, seed: int) -> None:
    results, kept = [], []
    images = torch.randn(2, 3, 64, 64).to(dtype)
    for again in (False, True):
        segmentor = tiny(drop_path=0.5, dropout=0.2).to(dtype)
        segmentor.noise.key.fill_(9)
        segmentor.backbone.recompute_blocks = again
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = segmentor.backbone(images)
        kept.append(sum(held.values()))
        sum(feature.float().square().sum() for feature in features).backward()
        results.append([p.grad for p in segmentor.backbone.parameters()])
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    assert kept[1] < 0.8 * kept[0]
    segmentor.eval()
    assert not segmentor.backbone(images)[0].grad_fn.name().startswith("Checkpoint")  # only training computes again
