"""Crops of stored features: exactly the stored tokens where the grids coincide, else bilinear, as PyTorch's."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ssr_fast.data.feature_map import FeatureMap, Geometry, grid_of
from ssr_fast.data.geometry import crop_label, fitted_size

STRIDES = [8, 16]


def stored(size: tuple[int, int], seen: tuple[int, int], stride: int, dtype: str = "fp16") -> FeatureMap:
    """Noise in the tokens of an image (width, height)."""
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    shape = -(-seen[1] // stride), -(-seen[0] // stride), 5
    geometry = Geometry(size, seen, stride)
    if dtype == "fp16":
        return FeatureMap(rng.normal(size=shape).astype(np.float16), None, geometry)
    values = rng.integers(-127, 128, shape).astype(np.int8)
    return FeatureMap(values, rng.uniform(0.01, 0.1, (*shape[:2], 1)).astype(np.float32), geometry)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(192, 96), (208, 112), (201, 117)], ids=str)
def test_aligned_crops_and_their_mirrors_are_the_stored_tokens(size: tuple[int, int], stride: int, dtype: str) -> None:
    features = stored(size, size, stride, dtype)
    dense = features.dense()
    crop = (3 * stride, 5 * stride)
    for row, column in itertools.product(range(size[1] // stride - 2), range(size[0] // stride - 4)):
        part = dense[row : row + 3, column : column + 5]
        corner = (column * stride, row * stride)
        assert (features.cut(size, corner, crop, False) == part).all()
        assert (features.cut(size, corner, crop, True) == part[:, ::-1]).all()


@pytest.mark.parametrize(("size", "seen"), [((1914, 1052), (1024, 563)), ((2048, 1024), (1024, 512))])
def test_an_image_resized_to_what_the_encoder_saw_gives_the_stored_tokens(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    features = stored(size, seen, 16)
    assert fitted_size(*size, seen) == seen
    assert (features.cut(seen, (32, 48), (512 - 48, 512), False) == features.dense()[3:32, 2:34]).all()
    assert (features.cut(seen, (32, 48), (512 - 48, 512), True) == features.dense()[3:32, 2:34][:, ::-1]).all()


def test_a_whole_image_at_half_and_double_size() -> None:
    features = stored((128, 64), (128, 64), 16)
    dense = features.dense()
    half = features.cut((64, 32), (0, 0), (32, 64), False)
    assert half.shape == (2, 4, 5)
    np.testing.assert_allclose(half, dense.reshape(2, 2, 4, 2, 5).mean((1, 3)), atol=1e-6)
    double = features.cut((256, 128), (0, 0), (128, 256), False)
    planes = torch.from_numpy(dense).permute(2, 0, 1)[None]
    expected = F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(double, expected.numpy(), atol=1e-6)


def sampled(features: FeatureMap, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]) -> NDArray:
    """grid_sample at the centres of the crop's tokens: an independent way to say the same."""
    dense, geometry = features.dense(), features.geometry
    grids = []
    for axis in (0, 1):
        n = grid_of(crop[axis], geometry.stride)
        pixels = corner[1 - axis] + (np.arange(n) + 0.5) * crop[axis] / n
        tokens = pixels / size[1 - axis] * geometry.seen[1 - axis] / geometry.stride
        grids.append(torch.from_numpy(tokens / dense.shape[axis] * 2 - 1))
    grid = torch.stack(torch.meshgrid(*grids, indexing="ij")[::-1], -1)[None]
    planes = torch.from_numpy(dense).double().permute(2, 0, 1)[None]
    out = F.grid_sample(planes, grid, "bilinear", "border", align_corners=False)
    return out[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_any_crop_is_what_grid_sample_gives(dtype: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        size = tuple(int(n) for n in rng.integers(40, 260, 2))
        seen = fitted_size(*size, (128, 128)) if rng.random() < 0.5 else size
        view = fitted_size(*size, tuple(int(n) for n in rng.integers(50, 300, 2)))
        crop = tuple(int(n) for n in rng.integers(32, 160, 2))
        corner = tuple(int(rng.integers(0, max(0, view[k] - crop[1 - k]) + 1)) for k in (0, 1))
        features = stored(size, seen, int(rng.choice(STRIDES)), dtype)
        found = features.cut(view, corner, crop, False)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, sampled(features, view, corner, crop), atol=2e-4)
        assert (features.cut(view, corner, crop, True) == found[:, ::-1]).all()


def test_a_crop_beyond_the_image_repeats_its_edge() -> None:
    features = stored((48, 32), (48, 32), 16)
    dense = features.dense()
    found = features.cut((48, 32), (0, 0), (64, 80), False)
    assert found.shape == (4, 5, 5)
    assert (found[:2, :3] == dense).all() and (found[2:] == found[1]).all() and (found[:, 3:] == found[:, 2:3]).all()
    mirrored = features.cut((48, 32), (0, 0), (64, 80), True)
    assert (mirrored == found[:, ::-1]).all() and (mirrored[:2, :2] == dense[:, 2:3]).all()


def test_tokens_move_with_the_labels() -> None:
    """A step in the features lies where the step in a label lies, after resize, crop and mirror."""
    columns = np.arange(24)[None, :, None] >= 10
    features = FeatureMap(
        np.broadcast_to(columns, (12, 24, 1)).astype(np.float16), None, Geometry((384, 192), (384, 192), 16)
    )
    for width, x, flip in itertools.product((384, 300, 500), (0, 37, 90), (False, True)):
        size = fitted_size(384, 192, (width, width))
        label = np.broadcast_to(np.arange(size[0]) >= size[0] * 10 / 24, (size[1], size[0])).astype(np.uint8)
        cut = crop_label(label, (x, 3), (96, 160), flip)
        shares = cut.reshape(6, 16, 10, 16).mean((1, 3))
        found = features.cut(size, (x, 3), (96, 160), flip)[..., 0]
        assert np.abs(found - shares).max() <= 0.5 + 1e-6


def test_grids() -> None:
    assert [grid_of(pixels, 16) for pixels in (1, 16, 23, 24, 40, 512, 500)] == [1, 1, 1, 2, 3, 32, 31]
