"""Cosine alignment and injection against plain definitions."""

import pytest
import torch
import torch.nn.functional as F

from ssr_fast.methods.regularisers import CosineAlignment, Injection, StageInjection
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.segmentor import SegmentorOutput


def output(batch=4):
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)]
    features = [torch.randn(batch, c, h, w, generator=generator) for c, h, w in sizes]
    return SegmentorOutput(features, torch.randn(batch, 10, 16, 24, generator=generator), torch.zeros(batch, 2, 16, 24))


def test_cosine_is_the_sum_over_points_of_the_mean_distance():
    out, target = output(), torch.randn(2, 5, 7, 6, generator=torch.Generator().manual_seed(1))
    module = CosineAlignment(("stage2", "fused"), (12, 10), 6)
    expected = torch.zeros(())
    for feature, projection in zip((out.features[1], out.fused), module.projections, strict=True):
        p = projection(feature[2:].permute(0, 2, 3, 1))
        t = F.interpolate(target.permute(0, 3, 1, 2), p.shape[1:3], mode="bilinear", align_corners=False)
        expected = expected + (1 - F.cosine_similarity(p, t.permute(0, 2, 3, 1), dim=-1)).mean()
    torch.testing.assert_close(module(out, slice(2, None), target), expected)


def test_stage_injection_by_explicit_softmax():
    module = StageInjection(12, 3, 6).double()
    feature, target = torch.randn(2, 12, 4, 5).double(), torch.randn(2, 3, 3, 6).double()
    x = feature.flatten(2).transpose(1, 2)
    e = module.embed(target.flatten(1, 2))
    q, (k, v) = module.q(x), module.kv(e).chunk(2, -1)
    heads = []
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        heads.append((q[..., part] @ k[..., part].transpose(1, 2) / 2.0).softmax(-1) @ v[..., part])
    expected = (x + module.proj(torch.cat(heads, -1))).transpose(1, 2).view_as(feature)
    torch.testing.assert_close(module(feature, target), expected)


def test_injection_changes_only_its_stages():
    out, target = output(), torch.randn(4, 5, 5, 6)
    module = Injection(("stage1", "stage3"), (8, 12, 16, 20), (1, 2, 4, 5), 6)
    injected = module(out.features, target)
    assert [torch.equal(a, b) for a, b in zip(injected, out.features, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"points": ("stage5",)}, "stage5"),
        ({"points": ("fused",), "regulariser": "injection"}, "fused"),
        ({"points": ()}, "points"),
        ({"points": ("stage1", "stage1")}, "once"),
        ({"regulariser": "cosin"}, "cosin"),
        ({"weight": 0.0}, "weight"),
        ({"domains": "target"}, "domains"),
    ],
)
def test_illegal_values_are_named(values, word):
    (problem,) = SsrConfig(**values).problems("ssr")
    assert word in problem and problem.startswith("--ssr.")
