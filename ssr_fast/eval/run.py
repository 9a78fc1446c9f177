"""Evaluation of a network on a list of samples: one global confusion matrix at the labels' own sizes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.geometry import fitted_size, resize_image
from ssr_fast.data.index import Sample
from ssr_fast.errors import UserError
from ssr_fast.eval.confusion import ConfusionMatrix
from ssr_fast.eval.inference import InferenceConfig, Network, predict_labels


class Reader(Protocol):
    """Reads the files of samples; a Layout is one."""

    def read_image(self, path: Path) -> NDArray[np.uint8]:
        """RGB uint8 [H, W, 3]."""

    def read_label(self, path: Path) -> NDArray[np.uint8]:
        """Train ids uint8 [H, W], 255 ignored."""


Visit = Callable[[Sample, NDArray[np.uint8], NDArray[np.uint8]], None]

_AHEAD = 8  # decoded pictures that may wait for the network: reading a PNG takes longer than a forward on a GPU
_GROUP_IMAGES, _GROUP_PIXELS = 8, 1 << 18  # small images share a forward, which costs little more than that of one


def evaluate_samples(
    model: nn.Module,
    samples: Sequence[Sample],
    reader: Reader,
    config: InferenceConfig,
    resize: tuple[int, int] | None,
    device: torch.device | str,
    class_count: int,
    progress: Callable[[int, int], None] | None = None,
    visit: Visit | None = None,
) -> ConfusionMatrix:
    """Count a network's predictions against the labels.

    Each image is resized into the box with OpenCV, its logits go back to the label's own size. The network is in eval
    mode meanwhile; afterwards every module is in the mode that it had.

    Args:
        model: on `device`; [b, 3, H, W] normalised -> logits [b, K, h, w], or an object with such `logits`.
        samples: labelled samples. A rank of a distributed job gives its share and adds the ranks' counts.
        reader: of the samples' files.
        config: legal InferenceConfig.
        resize: (width, height) of the box, or None for the images' own sizes.
        device: where the network runs.
        class_count: K.
        progress: called with (samples done, samples in all) after each sample.
        visit: called with (sample, prediction uint8 [H, W], label uint8 [H, W]) for each sample.

    Returns:
        ConfusionMatrix on `device`.

    Raises:
        UserError: a file is bad, a sample has no label, a label holds a class that the network does not know, or the
            GPU's memory is too small.
    """
    matrix = ConfusionMatrix(class_count, device)
    network = logits_only(model)
    done = 0
    with evaluating(model), torch.no_grad():
        # sliding windows are batched within an image already, as many as --inference.batch says
        most = _GROUP_IMAGES if config.mode == "whole" else 1
        for group in _groups(_read_ahead(samples, reader, resize), most):
            images, size = np.stack([image for _, image, _ in group]), group[0][2].shape
            for (sample, _, label), prediction in zip(
                group, predict_pictures(network, images, config, size, device), strict=True
            ):
                try:
                    matrix.update(prediction, torch.from_numpy(label).to(device))
                except ValueError as error:
                    raise UserError(f"{sample.label} does not fit the network: {error}") from error
                if visit is not None:
                    visit(sample, prediction.to(torch.uint8).cpu().numpy(), label)
                done += 1
                if progress is not None:
                    progress(done, len(samples))
    return matrix


def predict_pictures(
    network: Network,
    images: NDArray[np.uint8],
    config: InferenceConfig,
    size: tuple[int, ...],
    device: torch.device | str,
) -> Tensor:
    """images uint8 [B, H, W, 3] RGB -> predicted classes int64 [B, size[0], size[1]] on `device`.

    Raises:
        UserError: the GPU's memory does not hold the image in this mode.
    """
    pixels = normalise_batch(torch.from_numpy(images).to(device))  # [B, 3, H, W]
    try:
        return predict_labels(network, pixels, config, (size[0], size[1]))
    except torch.OutOfMemoryError as error:
        advice = "use --inference.mode slide" if config.mode == "whole" else "use a smaller --inference.crop or batch"
        raise UserError(
            f"the GPU ran out of memory on an image of {images.shape[2]}x{images.shape[1]} pixels: {advice}, "
            "or resize the images to a smaller box"
        ) from error


def fit_picture(image: NDArray[np.uint8], resize: tuple[int, int] | None) -> NDArray[np.uint8]:
    """image uint8 [H, W, 3] resized into the (width, height) box, its ratio kept."""
    return resize_image(image, fitted_size(image.shape[1], image.shape[0], resize))


def logits_only(model: Callable[[Tensor], Any]) -> Network:
    """The model as a function to logits: some give a Tensor, a Segmentor gives an object with `logits`."""

    def network(images: Tensor) -> Tensor:
        output = model(images)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    return network


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and eager: compiled blocks would be compiled again for each size of image. Afterwards each
    module is as it was: frozen or BatchNorm parts may differ from the rest."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = any(module._compiled_call_impl is not None for module, _ in modes)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training


_Pair = tuple[Sample, NDArray[np.uint8], NDArray[np.uint8]]


def _groups(pairs: Iterator[_Pair], most: int) -> Iterator[list[_Pair]]:
    """The pairs in order; neighbours of one size, image and label, together: at most `most`, and only small ones."""
    group: list[_Pair] = []
    for pair in pairs:
        _, image, label = pair
        if group:
            same = group[0][1].shape == image.shape and group[0][2].shape == label.shape
            pixels = (len(group) + 1) * image.shape[0] * image.shape[1]
            if not same or len(group) == most or pixels > _GROUP_PIXELS:
                yield group
                group = []
        group.append(pair)
    if group:
        yield group


def _read_ahead(samples: Sequence[Sample], reader: Reader, resize: tuple[int, int] | None) -> Iterator[_Pair]:
    """(sample, resized image, label) in order, decoded in threads a few samples ahead."""

    def read(sample: Sample) -> _Pair:
        if sample.label is None:
            raise UserError(f"{sample.image} has no label: an evaluation needs one for each image")
        return sample, fit_picture(reader.read_image(Path(sample.image)), resize), reader.read_label(Path(sample.label))

    waiting: list[Future[_Pair]] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            for sample in samples:
                waiting.append(pool.submit(read, sample))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
