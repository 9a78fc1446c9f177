"""The frozen encoder: its options, its files, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ssr_fast.errors import UserError
from ssr_fast.models.sam import SHAPES, SamConfig, SamShape, build_sam, build_vit
from ssr_fast.models.sam_attention import SamBlock, use_low_rank_attention
from tests.models.sam_nets import SMALL, STRUCTURE, random_encoder


def test_segment_anythings_own_encoder_with_our_blocks() -> None:
    encoder = random_encoder(STRUCTURE).double()
    images, names = torch.randn(2, 3, 128, 128, dtype=torch.float64), list(encoder.state_dict())
    expected = encoder(images)
    use_low_rank_attention(encoder)
    assert list(encoder.state_dict()) == names
    assert all(isinstance(block, SamBlock) for block in encoder.blocks)  # type: ignore[union-attr]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-10, atol=1e-10)


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


def test_the_options_name_what_is_wrong() -> None:
    def problems(**options: object) -> list[str]:
        return SamConfig(**options).problems("sam")  # type: ignore[arg-type]

    large, own = {"encoder": "vit_b", "checkpoint": "x.pth"}, {"encoder": "a:b"}
    assert not problems(**large) and not problems(**large, input_size=512, attention="flex")
    (found,) = problems(**large, input_size=768)
    assert found == ("--sam.input_size must be 512 or unset, which is 1024, with --sam.encoder vit_b (it is 768)")
    (found,) = problems(encoder="small", input_size=512)
    assert "--sam.input_size has no effect with --sam.encoder small" in found
    (found,) = problems(**large, attention="flash")
    assert found == "--sam.attention must be one of low_rank, flex, mask, xformers (it is flash)"
    (found,) = problems(**own, attention="mask")
    assert found == "--sam.attention has no effect with --sam.encoder a:b: leave it out"
    assert problems(**own, input_size=16) and not problems(**own, input_size=48)


def test_half_size_is_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SamShape(1024, 16, 32, 2, 2, 4.0, 16, 14, (1,))
    monkeypatch.setitem(SHAPES, "vit_b", shape)
    file = tmp_path / "own.safetensors"
    state = {f"image_encoder.{key}": value.contiguous() for key, value in random_encoder(shape).state_dict().items()}
    save_file(state, file)
    images = torch.randn(1, 3, 96, 96)
    options = {"encoder": "vit_b", "checkpoint": str(file)}
    assert build_sam(SamConfig(**options))(images).shape == (1, 64, 64, 16)  # type: ignore[arg-type]
    half = build_sam(SamConfig(**options, input_size=512, attention="mask"))  # type: ignore[arg-type]
    assert half(images).shape == (1, 32, 32, 16)
    assert {block.form for block in half.encoder.blocks} == {"mask"}  # type: ignore[union-attr]
