"""ClassMix draws exactly half of the classes present, never an ignored pixel, and never waits for the device."""

import math

import pytest
import torch

from ssr_fast.methods.mixing import class_masks, paste
from tests.syncfree import NoHostSync


def key(value):
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize("present", [1, 2, 3, 5, 8])
def test_half_of_the_classes_rounded_up(present):
    generator = torch.Generator().manual_seed(present)
    labels = torch.randint(0, present, (4, 32, 32), generator=generator).to(torch.uint8)
    labels[:, :, 0] = 255
    for number in range(10):
        mask = class_masks(labels, 8, key(number))
        for label, drawn in zip(labels, mask, strict=True):
            classes = set(label[drawn].tolist())
            assert len(classes) == math.ceil(present / 2) and 255 not in classes
            for c in classes:
                assert bool(drawn[label == c].all())  # a drawn class is drawn whole


def test_images_draw_for_themselves_and_every_class_gets_its_turn():
    labels = torch.arange(8, dtype=torch.uint8).view(1, 1, 8).expand(2, 8, 8).contiguous()
    masks = torch.stack([class_masks(labels, 8, key(number)) for number in range(300)])  # [300, 2, 8, 8]
    share = masks[:, :, 0].float().mean(0)  # [2, 8]
    assert (share - 0.5).abs().max() < 0.15
    assert not torch.equal(masks[:, 0], masks[:, 1])


def test_all_ignored_draws_nothing():
    assert not class_masks(torch.full((2, 4, 4), 255, dtype=torch.uint8), 19, key(1)).any()


def test_paste_images_and_labels():
    mask = torch.tensor([[[True, False]]])
    assert paste(mask, torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])).tolist() == [[[1, 4]]]
    image = paste(mask, torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
    assert image[0, :, 0].tolist() == [[1.0, 0.0]] * 3


def test_never_waits_for_the_device():
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    drawn = key(0)
    with NoHostSync():
        paste(class_masks(labels, 5, drawn), labels, labels)
