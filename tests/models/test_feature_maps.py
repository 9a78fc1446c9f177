"""Whole images through the frozen encoder: SAM's own preprocessing, valid tokens only, and what a store says of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssr_fast.data.augment import normalise
from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import create_features
from ssr_fast.data.images import BadFile
from ssr_fast.data.stores import Recipe
from ssr_fast.errors import UserError
from ssr_fast.models.feature_maps import (
    MapEncoder,
    build_map_encoder,
    check_recipe,
    longest_side,
    recipe,
    weights_digest,
)
from ssr_fast.models.sam import SHAPES, FrozenEncoder, SamConfig, SamShape, build_sam, build_vit
from tests.data.builders import assert_sentence, picture

CPU = torch.device("cpu")
PATH = Path("a.png")


def blobs(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """A picture with areas."""
    coarse = picture(seed, -(-width // 9), -(-height // 9))
    return np.kron(coarse, np.ones((9, 9, 1), np.uint8))[:height, :width]


def vit(shape: SamShape) -> FrozenEncoder:
    torch.manual_seed(0)
    encoder = build_vit(shape)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.2)
    return FrozenEncoder(encoder, shape.size, False)


TINY_SAM = SamShape(128, 16, 32, 2, 2, 4.0, 8, 3, (1,))


class Conv(nn.Module):
    """Patches of any stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 6, stride, stride)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images)
        return features


def conv_14() -> nn.Module:
    return Conv(14)


def conv_16() -> nn.Module:
    return Conv(16)


class Pooled(Conv):
    """The same number of tokens for every image."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(super().forward(images), 3)


def pooled() -> nn.Module:
    return Pooled(16)


@pytest.mark.parametrize("size", [(1914, 1052), (2048, 1024), (100, 100), (37, 211), (1024, 3), (7, 5000)])
def test_the_longest_side_is_resized_as_segment_anything_does(size: tuple[int, int]) -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    image = picture(3, *size)
    assert (longest_side(image, 1024) == ResizeLongestSide(1024).apply_image(image)).all()


@pytest.mark.parametrize(("size", "seen", "grid"), [
    ((128, 64), (128, 64), (4, 8)),
    ((191, 105), (128, 70), (5, 8)),
    ((50, 90), (71, 128), (8, 5)),
    ((128, 128), (128, 128), (8, 8)),
])  # fmt: skip
def test_sam_sees_the_padded_square_and_keeps_the_tokens_of_the_image(
    size: tuple[int, int], seen: tuple[int, int], grid: tuple[int, int]
) -> None:
    encoder, image = vit(TINY_SAM), blobs(1, *size)
    features, geometry = MapEncoder(encoder, 16, pads=True)(PATH, image)
    assert geometry == Geometry(size, seen, 16) and features.shape == (*grid, 8) and features.dtype == np.float32
    resized = normalise(longest_side(image, 128))
    square = torch.zeros(1, 3, 128, 128)
    square[0, :, : seen[1], : seen[0]] = resized
    with torch.no_grad():
        expected = encoder.encoder(square)[0].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(features), expected[: grid[0], : grid[1]])


@pytest.mark.parametrize("size", [(192, 96), (201, 117), (8, 9)])
def test_the_small_encoder_sees_the_image_as_it_is(size: tuple[int, int]) -> None:
    config, image = SamConfig(encoder="small"), blobs(2, *size)
    features, geometry = build_map_encoder(config, CPU, "fp32")(PATH, image)
    assert geometry == Geometry(size, size, 8) and features.shape == (size[1] // 8, size[0] // 8, 64)
    expected = build_sam(config).encode(normalise(image)[None])[0].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(features), expected)


def test_an_image_smaller_than_a_token_is_named() -> None:
    with pytest.raises(BadFile) as error:
        build_map_encoder(SamConfig(encoder="small"), CPU, "fp32")(PATH, blobs(2, 40, 7))
    assert_sentence(error.value, PATH, "40x7")


@pytest.mark.parametrize(("name", "stride"), [("conv_14", 14), ("conv_16", 16)])
def test_an_encoder_of_ones_own(name: str, stride: int) -> None:
    plain = build_map_encoder(SamConfig(encoder=f"{__name__}:{name}"), CPU, "fp32")
    features, geometry = plain(PATH, blobs(0, 100, 61))
    assert geometry == Geometry((100, 61), (100, 61), stride) and features.shape == (61 // stride, 100 // stride, 6)
    config = SamConfig(encoder=f"{__name__}:{name}", input_size=8 * stride)
    features, geometry = build_map_encoder(config, CPU, "fp32")(PATH, blobs(0, 100, 61))
    assert geometry == Geometry((100, 61), (8 * stride, 8 * stride), stride) and features.shape == (8, 8, 6)
    expected = build_sam(config).encode(normalise(blobs(0, 100, 61))[None])[0].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(features), expected)


def test_tokens_that_are_no_grid_are_refused() -> None:
    for config in (
        SamConfig(encoder=f"{__name__}:pooled"),
        SamConfig(encoder=f"{__name__}:conv_16", input_size=100),
    ):
        with pytest.raises(UserError) as error:
            build_map_encoder(config, CPU, "fp32")
        assert_sentence(error.value, config.encoder, "no whole number", "--sam.features online")
    with pytest.raises(BadFile) as error:
        MapEncoder(build_sam(SamConfig(encoder=f"{__name__}:pooled")), 16, pads=False)(PATH, blobs(0, 100, 64))
    assert_sentence(error.value, PATH, "3x3", "7x4")


def cosines(encoder: MapEncoder, images: list[NDArray[np.uint8]], root: Path) -> NDArray[np.float64]:
    """Of each token as int8 and as fp16 keep it."""
    stores = [create_features(root / dtype, root, Recipe("x", {"dtype": dtype}), False) for dtype in ("int8", "fp16")]
    found = []
    for number, image in enumerate(images):
        features, geometry = encoder(PATH, image)
        parts = []
        for store in stores:
            store.write(root / f"{number}.png", features, geometry)
            parts.append(store.read(root / f"{number}.png").dense().astype(np.float64).reshape(-1, features.shape[2]))
        norms = np.linalg.norm(parts[0], axis=1) * np.linalg.norm(parts[1], axis=1)
        found.append((parts[0] * parts[1]).sum(1) / norms)
    return np.concatenate(found)


VIT_B = SHAPES["vit_b"]


@pytest.mark.parametrize("name", ["small", "vit_b at 256"])
def test_int8_keeps_the_direction_of_a_token(name: str, tmp_path: Path) -> None:
    if name == "small":
        encoder = build_map_encoder(SamConfig(encoder="small"), CPU, "fp32")
    else:
        shape = SamShape(256, 16, VIT_B.width, VIT_B.depth, VIT_B.heads, 4.0, VIT_B.out, 14, VIT_B.global_blocks)
        encoder = MapEncoder(vit(shape), 16, pads=True)
    found = cosines(encoder, [blobs(seed, 192, 96) for seed in range(3)], tmp_path)
    print(name, "mean", found.mean(), "least", found.min())
    assert found.mean() > 0.9995 and found.min() > 0.999


def test_a_recipe_names_what_the_features_depend_on() -> None:
    small = recipe(SamConfig(encoder="small"), "int8", "fp32")
    others = [
        recipe(SamConfig(encoder="untrained"), "int8", "fp32"),
        recipe(SamConfig(encoder="small"), "fp16", "fp32"),
        recipe(SamConfig(encoder="small"), "int8", "bf16"),
        recipe(SamConfig(encoder=f"{__name__}:conv_16"), "int8", "fp32"),
        recipe(SamConfig(encoder=f"{__name__}:conv_16", input_size=64), "int8", "fp32"),
        recipe(SamConfig(encoder=f"{__name__}:conv_14", input_size=64), "int8", "fp32"),
    ]
    assert len({found.digest for found in [small, *others]}) == 7
    assert small == recipe(SamConfig(encoder="small", standardise=True), "int8", "fp32")
    weights = weights_digest(SamConfig(encoder=f"{__name__}:conv_16"))
    assert weights == weights_digest(SamConfig(encoder=f"{__name__}:conv_16", input_size=64)) and len(weights) == 64
    with pytest.raises(UserError) as error:
        recipe(SamConfig(encoder="vit_b", checkpoint="none.pth"), "int8", "fp32")
    assert_sentence(error.value, "--sam.checkpoint none.pth", "does not exist")


def test_a_store_of_another_encoder_is_refused(tmp_path: Path) -> None:
    small = SamConfig(encoder="small")
    found = recipe(small, "int8", "fp32")
    check_recipe(found, small, "data.source_features", with_weights=True)
    other = Recipe(found.generator, {**found.options, "weights_sha256": "0"})
    check_recipe(other, small, "data.source_features", with_weights=False)
    file = tmp_path / "b.pth"
    file.write_bytes(b"weights")
    vit_b = SamConfig(encoder="vit_b", checkpoint=str(file))
    cases = [
        (other, small, "other weights"),
        (found, SamConfig(encoder="vit_b"), "give --sam.encoder small"),
        (Recipe("cached_full", {**recipe(vit_b, "int8", "fp32").options, "size": 512}), vit_b, "size 512"),
        (Recipe("cached_full", {**found.options, "format": 0}), small, "--overwrite"),
        (Recipe("something", found.options), small, "something"),
    ]
    for one, config, part in cases:
        with pytest.raises(UserError) as error:
            check_recipe(one, config, "data.source_features", with_weights=True)
        assert_sentence(error.value, "--data.source_features", part)


def test_the_half_size_of_sams_encoders_is_part_of_a_stores_recipe(tmp_path: Path) -> None:
    file = tmp_path / "sam.pth"
    file.write_bytes(b"weights")
    whole, half = (SamConfig(encoder="vit_b", checkpoint=str(file), input_size=size) for size in (None, 512))
    made = recipe(whole, "int8", "fp32")
    assert made.digest != recipe(half, "int8", "fp32").digest
    check_recipe(made, whole, "data.source_features", with_weights=True)
    with pytest.raises(UserError, match=r"of the size 1024 and the run's is 512; leave --sam\.input_size out, or"):
        check_recipe(made, half, "data.source_features", with_weights=True)
    with pytest.raises(UserError, match=r"of the size 512 and the run's is 1024; give --sam\.input_size 512, or"):
        check_recipe(recipe(half, "int8", "fp32"), whole, "data.source_features", with_weights=True)
