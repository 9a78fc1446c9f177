"""Kept features of source views: encoded once, the same whatever came before, and what the encoder says itself."""

import pytest
import torch
from torch import Tensor, nn

from ssr_fast.data.augment import normalise_batch
from ssr_fast.models.feature_cache import ViewCache
from ssr_fast.models.sam import FrozenEncoder, SamConfig, build_sam


class Counting(nn.Module):
    """Encodes by a convolution, remembers the batches that it was given, and refuses gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batches = nn.Conv2d(3, 4, 8, 8), list[int]()

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        features: Tensor = self.conv(images)
        return features


class MindsItsBatch(Counting):
    """Its features depend on the batch's size and an image's place in it, as rounding may on some machines."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.arange(len(images)).view(-1, 1, 1, 1) + 10 * len(images)


def views(count: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randint(0, 256, (count, *size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_view_and_its_mirror_image_are_encoded_once() -> None:
    inner = Counting()
    cache = ViewCache(FrozenEncoder(inner, None, standardise=True))
    images = views(3)
    first = cache(images)
    assert inner.batches == [2, 2, 2] and len(cache) == 6
    again = cache(images.flip(0).flip(2)[:2])  # other order, mirrored
    assert torch.equal(cache(images), first) and len(inner.batches) == 3
    expected = FrozenEncoder(inner, None, False).encode(normalise_batch(images.flip(0).flip(2)[:2]))
    torch.testing.assert_close(again, expected)
    symmetric = torch.cat([images[:1], images[:1].flip(2)], dim=2)
    cache(symmetric)
    assert len(cache) == 7


@pytest.mark.parametrize("size", [None, 64])
def test_equal_to_the_encoder_and_bit_equal_in_any_order(size: int | None) -> None:
    encoder = FrozenEncoder(build_sam(SamConfig(encoder="small")).encoder, size, standardise=False)
    images = views(4, size=(64, 96))
    one, two = ViewCache(encoder), ViewCache(encoder)
    found = one(images)
    torch.testing.assert_close(found, encoder.encode(normalise_batch(images)), rtol=1e-4, atol=1e-5)
    two(images.flip(0).flip(2))  # a resumed run meets the views in another order
    assert torch.equal(found[2:], two(images[2:])) and torch.equal(found[:2], two(images[:2]))


def test_features_are_the_same_in_any_order_even_if_the_encoder_minds_its_batch() -> None:
    encoder = FrozenEncoder(MindsItsBatch(), None, False)
    images = views(6)
    one, two = ViewCache(encoder), ViewCache(encoder)
    two(images[:3].flip(2))
    two(images.flip(0)[:2])
    assert torch.equal(one(images), two(images))


def test_views_of_other_pixels_or_another_shape_are_other_views() -> None:
    cache = ViewCache(FrozenEncoder(Counting(), None, False))
    image = views(1)
    other = image.clone()
    other[0, 31, 47, 2] ^= 1
    assert not torch.equal(cache(image), cache(other))
    flat = torch.zeros(1, 16, 48, 3, dtype=torch.uint8)
    assert cache(flat).shape == (1, 4, 2, 6) and cache(flat.view(1, 48, 16, 3)).shape == (1, 4, 6, 2)


def test_a_layout_in_memory_changes_no_feature() -> None:
    encoder = build_sam(SamConfig(encoder="small"))
    images = normalise_batch(views(2, size=(64, 96)))
    assert torch.equal(encoder.encode(images), encoder.encode(images.contiguous()))
    assert torch.equal(encoder(images), encoder.finish(encoder.encode(images)))
