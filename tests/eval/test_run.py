"""Evaluation of samples on disk: sizes, modes, errors."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssr_fast.data.augment import normalise
from ssr_fast.data.images import read_image
from ssr_fast.data.index import Sample
from ssr_fast.errors import UserError
from ssr_fast.eval.inference import InferenceConfig, predict_logits
from ssr_fast.eval.run import evaluate_samples

K = 4


@dataclass
class Output:
    logits: Tensor


class Net(nn.Module):
    """Random convolution with a BatchNorm, which shows whether it ran in eval mode; gives an object with `logits`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, K, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(K)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Output:
        self.batches.append(images.shape[0])
        return Output(self.norm(self.conv(images)))


def read_label(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


FILES = SimpleNamespace(read_image=read_image, read_label=read_label)


def write_samples(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Pictures of (width, height) with labels of classes 0..K-1 and 255."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, (width, height) in enumerate(sizes):
        image, label = folder / f"{number}.png", folder / f"{number}_label.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.choice([0, 1, 2, 3, 255], (height, width)).astype(np.uint8)).save(label)
        samples.append(Sample(str(number), str(image), str(label), width, height, (1,) * K))
    return samples


@pytest.mark.parametrize("resize", [None, (64, 48)])
def test_counts_equal_each_picture_by_hand(tmp_path: Path, resize: tuple[int, int] | None) -> None:
    samples = write_samples(tmp_path, [(80, 60), (61, 47), (100, 40), (33, 90)] * 3)
    net = Net().eval()
    matrix = evaluate_samples(net, samples, FILES, InferenceConfig(), resize, "cpu", K)
    expected = np.zeros((K, K), np.int64)
    for sample in samples:
        assert sample.label is not None
        image = np.array(Image.open(sample.image))
        if resize:
            scale = min(64 / max(image.shape[:2]), 48 / min(image.shape[:2]))
            to = (int(image.shape[1] * scale + 0.5), int(image.shape[0] * scale + 0.5))
            image = cv2.resize(image, to, interpolation=cv2.INTER_LINEAR)
        label = read_label(Path(sample.label))
        with torch.no_grad():
            logits = predict_logits(lambda x: net(x).logits, normalise(image)[None], InferenceConfig(), label.shape)
        prediction = logits.argmax(1)[0].numpy()
        np.add.at(expected, (label[label != 255], prediction[label != 255]), 1)
    assert np.array_equal(matrix.counts.numpy(), expected)


def test_neighbours_of_one_size_share_a_forward_and_the_counts_stay(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(80, 60)] * 11 + [(61, 47)] * 3 + [(80, 60)] + [(500, 300)] * 2)
    net = Net()
    together = evaluate_samples(net, samples, FILES, InferenceConfig(), None, "cpu", K).counts
    assert net.batches == [8, 3, 3, 1, 1, 1]  # at most 8 images, at most 2**18 pixels
    alone = sum(evaluate_samples(net, [one], FILES, InferenceConfig(), None, "cpu", K).counts for one in samples)
    assert torch.equal(together, alone)


def test_sliding_windows_of_one_forward_are_as_many_as_the_option_says(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(80, 60)] * 2)
    net = Net()
    config = InferenceConfig(mode="slide", crop=(32, 32), stride=(32, 32), batch=4)
    evaluate_samples(net, samples, FILES, config, None, "cpu", K)
    assert net.batches == [4, 2] * 2  # 2 x 3 windows an image


def test_every_module_gets_its_own_mode_back_and_buffers_stay(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(40, 40)])
    net = Net()
    net.train()
    net.conv.eval()  # a frozen part
    before = net.norm.running_mean.clone() if net.norm.running_mean is not None else None
    evaluate_samples(net, samples, FILES, InferenceConfig(), None, "cpu", K)
    assert (net.training, net.conv.training, net.norm.training) == (True, False, True)
    assert torch.equal(net.norm.running_mean, before)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_modes_come_back_after_an_error_too(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(40, 40), (40, 40)])
    Path(samples[1].image).write_bytes(b"no picture")
    net = Net().train()
    with pytest.raises(UserError, match=r"1\.png"):
        evaluate_samples(net, samples, FILES, InferenceConfig(), None, "cpu", K)
    assert net.training and net.norm.training


def test_a_label_value_outside_the_classes_names_file_and_value(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(40, 40), (40, 40)])
    label = np.zeros((40, 40), np.uint8)
    label[7, 9] = 17
    Image.fromarray(label).save(str(samples[1].label))
    with pytest.raises(UserError, match=r"1_label\.png does not fit the network: label holds the value 17"):
        evaluate_samples(Net(), samples, FILES, InferenceConfig(), None, "cpu", K)


def test_a_sample_without_label_is_refused(tmp_path: Path) -> None:
    sample = write_samples(tmp_path, [(40, 40)])[0]
    bare = Sample(sample.name, sample.image, None, 40, 40, None)
    with pytest.raises(UserError, match="has no label"):
        evaluate_samples(Net(), [bare], FILES, InferenceConfig(), None, "cpu", K)


def test_progress_and_visit_see_every_sample_in_order(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(40 + n, 50) for n in range(9)])
    seen: list[tuple[int, int]] = []
    visited: list[str] = []

    def visit(sample: Sample, prediction: np.ndarray, label: np.ndarray) -> None:
        assert prediction.dtype == np.uint8 and prediction.shape == label.shape == (sample.height, sample.width)
        visited.append(sample.name)

    evaluate_samples(
        Net(), samples, FILES, InferenceConfig(), None, "cpu", K, lambda done, of: seen.append((done, of)), visit
    )
    assert seen == [(n, 9) for n in range(1, 10)]
    assert visited == [sample.name for sample in samples]


def test_shares_of_ranks_add_up(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, [(40, 44)] * 5)
    whole = evaluate_samples(Net(), samples, FILES, InferenceConfig(), None, "cpu", K).counts
    shares = [
        evaluate_samples(Net(), samples[rank::2], FILES, InferenceConfig(), None, "cpu", K).counts for rank in (0, 1)
    ]
    assert torch.equal(whole, shares[0] + shares[1])


def test_no_samples_give_an_empty_matrix() -> None:
    assert int(evaluate_samples(Net(), [], FILES, InferenceConfig(), None, "cpu", K).counts.sum()) == 0


def test_out_of_memory_says_what_to_do(tmp_path: Path) -> None:
    class Hungry(Net):
        def forward(self, images: Tensor) -> Output:
            raise torch.OutOfMemoryError("CUDA out of memory")

    samples = write_samples(tmp_path, [(50, 40)])
    with pytest.raises(UserError, match="50x40 pixels: use --inference.mode slide"):
        evaluate_samples(Hungry(), samples, FILES, InferenceConfig(), None, "cpu", K)
