"""Strong augmentation equals its definition and is a pure function of its key."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from ssr_fast.data import augment
from tests.syncfree import NoHostSync


def key(value=5):
    return torch.tensor(value, dtype=torch.int64)


def test_normalise_matches_the_definition():
    image = np.array([[[255, 0, 128]]], np.uint8)
    expected = [(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (128 - 103.53) / 57.375]
    torch.testing.assert_close(augment.normalise(image)[:, 0, 0], torch.tensor(expected))


def test_hue_shift_matches_colorsys():
    rgb = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rgb[0, :, 0, 0] = 0.5  # grey has no hue
    one, shift = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.13, dtype=torch.float64)
    out = augment.color_jitter(rgb, one, one, one, shift)
    for y in range(4):
        for x in range(5):
            h, s, v = colorsys.rgb_to_hsv(*rgb[0, :, y, x].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + 0.13) % 1, s, v), dtype=torch.float64)
            torch.testing.assert_close(out[0, :, y, x], expected, rtol=0, atol=1e-6)


def test_brightness_contrast_and_saturation_match_torchvision():
    rgb = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(2))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for position, function in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
        factors = [one, one, one]
        factors[position] = torch.tensor(1.17)
        torch.testing.assert_close(augment.color_jitter(rgb, *factors, zero), function(rgb, 1.17), rtol=0, atol=2e-4)


def test_blur_matches_torchvision():
    images = torch.rand(2, 3, 20, 21, generator=torch.Generator().manual_seed(3))
    expected = tv.gaussian_blur(torch.nn.functional.pad(images, (6,) * 4, mode="replicate"), [13, 13], [0.9, 0.9])
    torch.testing.assert_close(augment.gaussian_blur(images, torch.tensor(0.9)), expected[:, :, 6:-6, 6:-6])


@pytest.mark.parametrize("sigma", [0.15, 0.29, 0.36, 0.43, 0.9, 1.15])
def test_blur_is_exact_and_multiplies_by_no_subnormal_number(sigma, monkeypatch):
    images = torch.rand(2, 3, 20, 21, generator=torch.Generator().manual_seed(3))
    used = []
    conv2d = torch.nn.functional.conv2d

    def recorded(image, weight, **options):
        used.append(weight)
        return conv2d(image, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", recorded)
    blurred = augment.gaussian_blur(images, torch.tensor(sigma))
    assert len(used) == 2 and all((weight[weight != 0] > 1e-31).all() for weight in used)
    monkeypatch.undo()
    taps = torch.exp(-0.5 * (torch.arange(-6, 7, dtype=torch.float64) / sigma) ** 2)
    weight = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 13, 13)
    padded = torch.nn.functional.pad(images.double(), (6,) * 4, mode="replicate")
    torch.testing.assert_close(blurred.double(), conv2d(padded, weight, groups=3), rtol=0, atol=1e-6)


def test_strong_augment_is_a_function_of_its_key_and_keeps_its_probabilities():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)).clamp(-1.5, 1.5)
    same = augment.strong_augment(images, key(), 0.2, 0.8, 0.5)
    assert torch.equal(same, augment.strong_augment(images, key(), 0.2, 0.8, 0.5))
    assert not torch.equal(same, augment.strong_augment(images, key(6), 0.2, 0.8, 0.5))
    untouched = augment.strong_augment(images, key(), 0.2, 0.0, 0.0)
    torch.testing.assert_close(untouched, images, rtol=0, atol=2e-5)
    changed = [
        not torch.allclose(augment.strong_augment(images, key(k), 0.2, 0.3, 0.0), images, atol=1e-3) for k in range(200)
    ]
    assert 0.2 < np.mean(changed) < 0.4


def test_strong_augment_never_waits_for_the_device():
    drawn = key()
    with NoHostSync():
        augment.strong_augment(torch.zeros(1, 3, 8, 8), drawn, 0.2, 0.8, 0.5)
