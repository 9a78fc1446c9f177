"""Whole and sliding inference against a brute-force reference, at odd sizes."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssr_fast.eval.inference import InferenceConfig, labels_of, predict_labels, predict_logits

K = 5


class StrideFour:
    """A small convolutional net of stride 4 that sees its surroundings; it notes the batches that it was given."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(K, 3, 7, 7, generator=generator) / 7
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        assert min(images.shape[2:]) >= 32, "a MiT cannot read less"
        return functional.conv2d(images, self.weight, stride=4, padding=3)


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def up(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def brute_force(net: StrideFour, image: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Every window by itself, every pixel's logits collected in a list and averaged."""
    _, _, height, width = image.shape
    tall, wide = min(crop[0], height), min(crop[1], width)
    tops, lefts = set(), set()
    for i in range(math.ceil(max(height - tall, 0) / stride[0]) + 1):
        tops.add(min(i * stride[0], height - tall))
    for i in range(math.ceil(max(width - wide, 0) / stride[1]) + 1):
        lefts.add(min(i * stride[1], width - wide))
    total, count = torch.zeros(1, K, height, width, dtype=torch.float64), torch.zeros(height, width)
    for y in tops:
        for x in lefts:
            total[..., y : y + tall, x : x + wide] += up(net(image[..., y : y + tall, x : x + wide]), (tall, wide))
            count[y : y + tall, x : x + wide] += 1
    assert int(count.min()) >= 1
    return (total / count).float()


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 150), (32, 32)])
@pytest.mark.parametrize(
    ("crop", "stride"), [((32, 32), (16, 16)), ((48, 40), (48, 40)), ((40, 64), (13, 29)), ((33, 33), (7, 31))]
)
def test_slide_equals_brute_force(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> None:
    image, net = picture(*size), StrideFour()
    config = InferenceConfig(mode="slide", crop=crop, stride=stride, batch=3)
    logits = predict_logits(net, image, config, size)
    assert max(shape[0] for shape in net.shapes) <= 3
    torch.testing.assert_close(logits, brute_force(StrideFour(), image, crop, stride), rtol=1e-5, atol=1e-5)


def test_default_stride_is_half_the_crop() -> None:
    image = picture(70, 90)
    default = predict_logits(StrideFour(), image, InferenceConfig(mode="slide", crop=(40, 60)), (70, 90))
    torch.testing.assert_close(default, brute_force(StrideFour(), image, (40, 60), (20, 30)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (45, 131), (32, 32), (20, 100), (1, 1)])
@pytest.mark.parametrize("out", [(64, 96), (131, 77), (7, 5)])
def test_slide_with_a_crop_as_large_as_the_image_is_whole(size: tuple[int, int], out: tuple[int, int]) -> None:
    image = picture(*size, batch=2)
    whole = predict_logits(StrideFour(), image, InferenceConfig(), out)
    slide = predict_logits(StrideFour(), image, InferenceConfig(mode="slide", crop=(512, 512), stride=(100, 7)), out)
    assert whole.shape == (2, K, *out)
    assert torch.equal(whole, slide)


def test_whole_goes_to_the_image_size_first_as_the_hosts_do() -> None:
    image = picture(64, 96)
    expected = up(up(StrideFour()(image), (64, 96)), (128, 192))
    assert torch.equal(predict_logits(StrideFour(), image, InferenceConfig(), (128, 192)), expected)


def test_a_batch_is_its_pictures() -> None:
    images = picture(50, 70, batch=3)
    config = InferenceConfig(mode="slide", crop=(32, 40), stride=(20, 20), batch=2)
    together = predict_logits(StrideFour(), images, config, (50, 70))
    for b in range(3):
        alone = predict_logits(StrideFour(), images[b : b + 1], config, (50, 70))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_small_images_are_not_distorted_by_their_border() -> None:
    """A 20-pixel side is widened to 32 with zeros (the mean colour) and the prediction is cut back, not squeezed."""
    image = picture(20, 64)
    padded = functional.pad(image, (0, 0, 0, 12))
    expected = up(StrideFour()(padded), (32, 64))[:, :, :20]
    assert torch.equal(predict_logits(StrideFour(), image, InferenceConfig(), (20, 64)), expected)


@pytest.mark.parametrize("size", [(63, 95), (128, 40), (9, 200), (17, 24), (5, 3), (1, 1)])
@pytest.mark.parametrize("strip", [1, 2000, 10**9])
def test_strips_equal_the_whole_argmax(size: tuple[int, int], strip: int) -> None:
    """Up- and downsampling, strips of one row and more. Only pixels where two classes are equal may differ."""
    logits = torch.randn(2, K, 17, 24, generator=torch.Generator().manual_seed(1))
    upsampled = up(logits, size)
    labels = labels_of(logits, size, strip)
    assert labels.shape == (2, *size) and labels.dtype == torch.int64
    lost = upsampled.amax(1) - upsampled.gather(1, labels[:, None])[:, 0]
    assert float(lost.max()) < 1e-5


def test_labels_are_the_logits_argmax() -> None:
    image, config = picture(60, 44), InferenceConfig(mode="slide", crop=(32, 32))
    labels = predict_labels(StrideFour(), image, config, (81, 60))
    assert torch.equal(labels, predict_logits(StrideFour(), image, config, (81, 60)).argmax(1))


def test_half_precision_logits_are_averaged_in_fp32() -> None:
    net = StrideFour()
    config = InferenceConfig(mode="slide", crop=(32, 32), stride=(8, 8))
    logits = predict_logits(lambda x: net(x).bfloat16(), picture(64, 64), config, (64, 64))
    assert logits.dtype == torch.float32


def test_problems_name_every_illegal_value() -> None:
    assert InferenceConfig().problems("inference") == []
    assert InferenceConfig(mode="slide").problems("inference") == []
    assert InferenceConfig(mode="slide", crop=(64, 32), stride=(64, 32), batch=1).problems("inference") == []
    assert "must be one of whole, slide (it is 'tiles')" in InferenceConfig(mode="tiles").problems("inference")[0]
    unused = InferenceConfig(crop=(64, 64), stride=(8, 8), batch=2).problems("eval")
    assert [line.split()[0] for line in unused] == ["--eval.crop", "--eval.stride", "--eval.batch"]
    assert all("no effect" in line for line in unused)
    wrong = InferenceConfig(mode="slide", crop=(16, 64), stride=(0, 8), batch=0).problems("inference")
    assert len(wrong) == 3 and "[16, 64]" in wrong[0] and "stride must be > 0" in wrong[1] and "batch" in wrong[2]
    gap = InferenceConfig(mode="slide", crop=(64, 64), stride=(64, 65)).problems("inference")
    assert len(gap) == 1 and "no prediction" in gap[0]
    gap = InferenceConfig(mode="slide", stride=(513, 1)).problems("inference")
    assert len(gap) == 1 and "[512, 512]" in gap[0], "the default crop counts too"
