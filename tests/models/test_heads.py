"""The decode heads, BatchNorm over several domains, and the segmentor's configuration."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.models.heads import HEADS, DAFormerHead, SegFormerHead, SplitBatchNorm2d, resize
from ssr_fast.models.noise import Noise
from ssr_fast.models.segmentor import ModelConfig, build_segmentor

DIMS = (16, 32, 64, 128)


def make_features(batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four stages of a 52x76 image, channels-last."""
    sizes = [(13, 19), (7, 10), (4, 5), (2, 3)]
    return [
        torch.randn(batch, dim, *size, dtype=dtype).to(memory_format=torch.channels_last)
        for dim, size in zip(DIMS, sizes, strict=True)
    ]


def scramble(module: nn.Module) -> None:
    """Give every parameter and statistic a value of its own, so that a swap of two shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def test_daformer_names() -> None:
    def bn(prefix: str) -> set[str]:
        return {f"{prefix}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

    expected = {f"embed_layers.{i}.proj.{x}" for i in range(4) for x in ("weight", "bias")}
    expected |= {"conv_seg.weight", "conv_seg.bias"}
    convs = ["fuse_layer.aspp_modules.0", "fuse_layer.bottleneck"]
    convs += [f"fuse_layer.aspp_modules.{i}.{kind}_conv" for i in (1, 2, 3) for kind in ("depthwise", "pointwise")]
    for conv in convs:
        expected |= {f"{conv}.conv.weight"} | bn(f"{conv}.bn")
    head = DAFormerHead((64, 128, 320, 512), 19, noise=Noise())
    assert set(head.state_dict()) == expected
    assert head.state_dict()["fuse_layer.aspp_modules.2.depthwise_conv.conv.weight"].shape == (1024, 1, 3, 3)
    assert head.state_dict()["fuse_layer.bottleneck.conv.weight"].shape == (256, 1024, 3, 3)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == 3.71


def test_segformer_names() -> None:
    expected = {f"linear_c{i}.proj.{x}" for i in (1, 2, 3, 4) for x in ("weight", "bias")}
    expected |= {"linear_fuse.conv.weight", "linear_pred.weight", "linear_pred.bias"}
    expected |= {
        f"linear_fuse.bn.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert set(SegFormerHead(DIMS, 19, 64, noise=Noise()).state_dict()) == expected


def test_daformer_head_against_plain_convolutions(seed: int) -> None:
    head = DAFormerHead(DIMS, 5, 64, noise=Noise()).double().eval()
    scramble(head)
    weights = head.state_dict()
    features = make_features(2, torch.float64)

    def conv_norm(x: Tensor, name: str, **options: Any) -> Tensor:
        p = {k: weights[f"{name}.{k}"] for k in ("conv.weight", "bn.weight", "bn.bias")}
        mean, var = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
        x = F.conv2d(x, p["conv.weight"], **options)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (x * p["bn.weight"][:, None, None] + p["bn.bias"][:, None, None]).relu()

    embedded = []
    for index, feature in enumerate(features):
        w, b = weights[f"embed_layers.{index}.proj.weight"], weights[f"embed_layers.{index}.proj.bias"]
        x = F.conv2d(feature, w[:, :, None, None], b)
        embedded.append(F.interpolate(x, size=(13, 19), mode="bilinear", align_corners=False))
    x = torch.cat(embedded, dim=1)
    outs = [conv_norm(x, "fuse_layer.aspp_modules.0")]
    for index, dilation in enumerate((6, 12, 18), start=1):
        name = f"fuse_layer.aspp_modules.{index}"
        y = conv_norm(x, f"{name}.depthwise_conv", padding=dilation, dilation=dilation, groups=256)
        outs.append(conv_norm(y, f"{name}.pointwise_conv"))
    fused = conv_norm(torch.cat(outs, dim=1), "fuse_layer.bottleneck", padding=1)
    logits = F.conv2d(fused, weights["conv_seg.weight"], weights["conv_seg.bias"])

    got_fused, got_logits = head(features)
    torch.testing.assert_close(got_fused, fused, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_logits, logits, rtol=1e-10, atol=1e-10)


def test_segformer_head_against_plain_convolutions(seed: int) -> None:
    head = SegFormerHead(DIMS, 5, 64, noise=Noise()).double().eval()
    scramble(head)
    p = head.state_dict()
    features = make_features(2, torch.float64)
    embedded = []
    for index, feature in enumerate(features, start=1):
        x = F.conv2d(feature, p[f"linear_c{index}.proj.weight"][:, :, None, None], p[f"linear_c{index}.proj.bias"])
        embedded.append(F.interpolate(x, size=(13, 19), mode="bilinear", align_corners=False))
    x = F.conv2d(torch.cat(embedded[::-1], dim=1), p["linear_fuse.conv.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    fused = F.batch_norm(x, *(p[f"linear_fuse.bn.{name}"] for name in names)).relu()
    logits = F.conv2d(fused, p["linear_pred.weight"], p["linear_pred.bias"])

    got_fused, got_logits = head(features)
    torch.testing.assert_close(got_fused, fused, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_logits, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((7, 10), (13, 19)), ((3, 6), (24, 48)), ((1, 1), (5, 4)), ((9, 4), (9, 11)), ((12, 8), (5, 3)), ((6, 6), (6, 6))],
)
def test_resize_is_bilinear_interpolation(size: tuple[int, int], wanted: tuple[int, int], seed: int) -> None:
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got = resize(x, wanted)
    expected = F.interpolate(y.permute(0, 3, 1, 2), size=wanted, mode="bilinear", align_corners=False)
    expected = expected.permute(0, 2, 3, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert resize(x.float(), wanted).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(HEADS))
def test_fused_is_what_the_classifier_reads_before_dropout(name: str, seed: int) -> None:
    head = HEADS[name](DIMS, 5, 64, 0.5, noise=Noise())
    classifier = head.conv_seg if isinstance(head, DAFormerHead) else head.linear_pred
    features = make_features(2)
    head.eval()
    fused, logits = head(features)
    assert fused.shape == (2, 64, 13, 19) and logits.shape == (2, 5, 13, 19)
    torch.testing.assert_close(classifier(fused), logits)
    head.train()
    fused, logits = head(features)
    assert not torch.allclose(classifier(fused), logits), "dropout did nothing in training"
    assert (fused.mean((2, 3)) != 0).all(), "dropout must not reach the fused feature"


def test_dropout_takes_whole_channels(seed: int) -> None:
    head = SegFormerHead(DIMS, 5, 64, 0.5, noise=Noise())
    x = torch.ones(2, 64, 3, 3)
    out = head.dropout(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(out.amin((2, 3)), out.amax((2, 3)))


def test_split_batch_norm_is_two_passes(seed: int) -> None:
    split, plain = SplitBatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    scramble(split)
    plain.load_state_dict(split.state_dict())
    split.splits = 2
    source = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    mixed = torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 2
    x = torch.cat([source, mixed]).requires_grad_()
    y = torch.cat([source, mixed]).requires_grad_()
    upstream = torch.randn(6, 6, 5, 4, dtype=torch.float64)
    out = split(x)
    expected = torch.cat([plain(y[:3]), plain(y[3:])])
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.equal(out, expected)
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(split.named_buffers())[name]), name
    assert split.num_batches_tracked == 2
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(split.named_parameters())[name].grad, parameter.grad)
    assert not torch.allclose(out, nn.BatchNorm2d(6).double()(torch.cat([source, mixed])))


def test_split_batch_norm_in_evaluation_is_batch_norm(seed: int) -> None:
    norm = SplitBatchNorm2d(6).eval()
    norm.splits = 2
    x = torch.randn(3, 6, 5, 4)  # odd: there is nothing to split
    assert torch.equal(norm(x), nn.BatchNorm2d(6).eval()(x))


def test_split_batch_norm_refuses_unequal_domains() -> None:
    norm = SplitBatchNorm2d(6)
    norm.splits = 2
    with pytest.raises(ValueError, match="3 images cannot be split into 2"):
        norm(torch.randn(3, 6, 5, 4))


def test_one_pass_over_both_domains_equals_two(seed: int) -> None:
    config = ModelConfig(backbone="mit_tiny", channels=64, drop_path=0.0, dropout=0.0)
    together = build_segmentor(config, class_count=5)
    apart = copy.deepcopy(together)
    source, mixed = torch.randn(2, 3, 40, 56), torch.randn(2, 3, 40, 56) * 2 + 1
    one = together(torch.cat([source, mixed]), domains=2).logits
    two = torch.cat([apart(source).logits, apart(mixed).logits])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    one.square().sum().backward()
    two.square().sum().backward()
    for (name, a), b in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-5, name
    for (name, first), second in zip(together.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=name)
    # a later pass over one domain is plain again
    images = torch.randn(3, 3, 40, 56)
    torch.testing.assert_close(together(images).logits, apart(images).logits, rtol=1e-3, atol=1e-4)


def test_config_reports_all_problems_at_once(tmp_path: Path) -> None:
    assert ModelConfig().problems("model") == []
    assert ModelConfig(weights=str(tmp_path)).problems("model") == []
    bad = ModelConfig(backbone="mit_b9", head="fcn", channels=0, drop_path=1.0, dropout=-0.1, weights="/none/x.pth")
    problems = bad.problems("model")
    assert len(problems) == 6
    for name in ("backbone", "head", "channels", "drop_path", "dropout", "weights"):
        assert sum(problem.startswith(f"--model.{name} ") for problem in problems) == 1
    assert "mit_b5" in problems[0] and "mit_b9" in problems[0]
    assert len(ModelConfig(drop_path=float("nan")).problems("model")) == 1


def test_no_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="class_count"):
        build_segmentor(ModelConfig(backbone="mit_tiny"), class_count=0)
