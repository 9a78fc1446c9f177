"""Geometry is exact: sizes, crops, mirrors, and what lies outside of an image."""

import numpy as np
import pytest

from ssr_fast.data import geometry
from ssr_fast.data.augment import normalise


def test_fitted_size_keeps_the_ratio_as_the_recipe_says():
    assert geometry.fitted_size(1914, 1052, (1280, 720)) == (1280, 704)
    assert geometry.fitted_size(1914, 1052, (2560, 1440)) == (2560, 1407)
    assert geometry.fitted_size(2048, 1024, (1024, 512)) == (1024, 512)
    assert geometry.fitted_size(1280, 760, (1280, 760)) == (1280, 760)
    assert geometry.fitted_size(31, 17, None) == (31, 17)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_of_image_and_label_stay_aligned(flip):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 200, (40, 60), dtype=np.uint8)
    image = np.repeat(label[..., None], 3, 2)
    cut = geometry.crop_label(label, (13, 7), (16, 24), flip)
    np.testing.assert_array_equal(geometry.crop_image(image, (13, 7), (16, 24), flip)[..., 1], cut)
    assert not np.shares_memory(cut, label)  # which may be a file's pages
    expected = label[7:23, 13:37]
    np.testing.assert_array_equal(cut, expected[:, ::-1] if flip else expected)


def test_small_images_are_padded_with_mean_colour_and_ignore():
    image, label = np.zeros((5, 9, 3), np.uint8), np.zeros((5, 9), np.uint8)
    cut = geometry.crop_label(label, (0, 0), (8, 12), False)
    assert (cut[:5, :9] == 0).all() and (cut[5:] == 255).all() and (cut[:, 9:] == 255).all()
    pixels = normalise(geometry.crop_image(image, (0, 0), (8, 12), False))
    assert pixels[:, 5:].abs().max() < 0.01 and pixels[:, :5, :9].abs().min() > 1
