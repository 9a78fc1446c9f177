"""The frozen encoder: segment-anything's numbers without attention maps, its files, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssr_fast.errors import UserError
from ssr_fast.models.sam import SHAPES, SamConfig, SamShape, build_sam, build_vit
from ssr_fast.models.sam_attention import SamBlock, use_low_rank_attention


def random_encoder(shape: SamShape, seed: int = 0) -> nn.Module:
    """segment-anything's encoder with random relative positions too, which it initialises with zeros."""
    torch.manual_seed(seed)
    encoder = build_vit(shape).eval()
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
    return encoder


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


SMALL = SHAPES["small"]
CASES = {
    "trained size": (SMALL, (192, 192)),
    "not square, interpolated tables": (SMALL, (96, 192)),
    "windows with padding": (SMALL, (104, 72)),
    "smaller than a window": (SMALL, (16, 24)),
    "one token": (SMALL, (8, 8)),
    "SAM's structure": (SamShape(128, 16, 32, 4, 4, 4.0, 16, 3, (1, 3)), (128, 128)),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_segment_anything(case: str) -> None:
    shape, size = CASES[case]
    encoder = random_encoder(shape).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder(images)
        names = list(encoder.state_dict())
        use_low_rank_attention(encoder)
        found = encoder(images)
    assert list(encoder.state_dict()) == names
    assert all(isinstance(block, SamBlock) for block in encoder.blocks)  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_fp32_error() -> None:
    encoder = random_encoder(SMALL)
    images = torch.randn(2, 3, 96, 192)
    with torch.no_grad():
        expected = encoder(images)
        use_low_rank_attention(encoder)
        found = encoder(images)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_gradients() -> None:
    encoder = random_encoder(SMALL).double()
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    expected = encoder(images)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(encoder.parameters()), cotangent)
    use_low_rank_attention(encoder)
    gradients = torch.autograd.grad(encoder(images), list(encoder.parameters()), cotangent)
    for name, one, two in zip(dict(encoder.named_parameters()), wanted, gradients, strict=True):
        assert (one - two).norm() <= 1e-9 * one.norm(), name


def test_no_attention_map_is_stored() -> None:
    encoder = random_encoder(SMALL)
    tokens = (192 // 8) ** 2
    with torch.no_grad(), LargestTensor() as stock:
        encoder(torch.randn(1, 3, 192, 192))
    use_low_rank_attention(encoder)
    with torch.no_grad(), LargestTensor() as ours:
        encoder(torch.randn(1, 3, 192, 192))
    assert stock.largest >= SMALL.heads * tokens**2 > 3 * ours.largest


def test_the_shipped_encoder_takes_any_size_and_stays_frozen() -> None:
    encoder = build_sam(SamConfig(encoder="small", standardise=True))
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(2, 3, 96, 200)
    features = encoder(images)
    assert features.shape == (2, 12, 25, encoder.channels())
    torch.testing.assert_close(features.mean((0, 1, 2)), torch.zeros(encoder.channels()), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std((0, 1, 2), correction=0), torch.ones(encoder.channels()), atol=1e-3, rtol=0)
    assert torch.equal(features, build_sam(SamConfig(encoder="small", standardise=True))(images))
    assert not torch.allclose(features, build_sam(SamConfig(encoder="small"))(images))


def test_untrained_differs_from_the_shipped_weights_and_is_always_the_same() -> None:
    images = torch.randn(1, 3, 64, 64)
    one, two = (build_sam(SamConfig(encoder="untrained"))(images) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, build_sam(SamConfig(encoder="small"))(images))


def test_a_file_of_another_encoder_names_the_first_difference(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    save_file({key: value.contiguous() for key, value in build_vit(SMALL).state_dict().items()}, file)
    with pytest.raises(UserError, match="small.safetensors is not a vit_b encoder: pos_embed should be .*absent"):
        build_sam(SamConfig(encoder="vit_b", checkpoint=str(file)))


def own_encoder() -> nn.Module:
    """An encoder of one's own for --sam.encoder package.module:function."""
    return nn.Conv2d(3, 5, 4, 4)


def not_a_module() -> int:
    return 3


def test_an_encoder_of_ones_own() -> None:
    built = build_sam(SamConfig(encoder=f"{__name__}:own_encoder", input_size=32))
    assert built(torch.randn(2, 3, 20, 50)).shape == (2, 8, 8, 5) and built.channels() == 5
    with pytest.raises(UserError, match="cannot be imported"):
        build_sam(SamConfig(encoder=f"{__name__}:nothing"))
    with pytest.raises(UserError, match="must return an nn.Module"):
        build_sam(SamConfig(encoder=f"{__name__}:not_a_module"))
