"""Prediction at any image size: whole, or in sliding windows whose overlapping logits are averaged.

Logits go to the image's size first and from there to the asked size, both bilinear with align_corners False: the two
steps of the mmseg-based systems (DAFormer, HRDA, MIC), so that scores compare.

Legend: B batch, K classes, H W pixels of the image, h w logits of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# A MiT's first stages reduce keys by 8 on a stride-4 map: below 29 pixels its convolutions have nothing to read.
MIN_SIDE = 32
DEFAULT_CROP = (512, 512)
DEFAULT_BATCH = 4
MODES = ("whole", "slide")

_STRIP_ELEMENTS = 1 << 25  # logits upsampled at once by predict_labels: 128 MiB in float32

Network = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class InferenceConfig:
    """How a network sees an image at evaluation and prediction."""

    mode: str = "whole"
    """whole: one forward of the whole image; slide: windows (HRDA: crop 1024 1024, stride 512 512)."""
    crop: tuple[int, int] | None = None
    """slide: height and width of a window; default 512 512. A side longer than the image's is the image's."""
    stride: tuple[int, int] | None = None
    """slide: vertical and horizontal step between windows; default half the crop."""
    batch: int | None = None
    """slide: windows in one forward; default 4."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; `where` is the options' prefix, e.g. "inference"."""
        if self.mode not in MODES:
            return [f"--{where}.mode must be one of {', '.join(MODES)} (it is {self.mode!r})"]
        if self.mode == "whole":
            given = [name for name in ("crop", "stride", "batch") if getattr(self, name) is not None]
            return [f"--{where}.{name} has no effect with --{where}.mode whole: leave it out" for name in given]
        found = []
        crop, stride = self.crop or DEFAULT_CROP, self.stride
        if min(crop) < MIN_SIDE:
            found.append(f"--{where}.crop must be at least {MIN_SIDE} pixels a side (it is {_pair(crop)})")
        if stride is not None and min(stride) < 1:
            found.append(f"--{where}.stride must be > 0 (it is {_pair(stride)})")
        elif stride is not None and (stride[0] > crop[0] or stride[1] > crop[1]):
            found.append(
                f"--{where}.stride {_pair(stride)} is larger than --{where}.crop {_pair(crop)}: "
                "pixels between the windows would get no prediction"
            )
        if self.batch is not None and self.batch < 1:
            found.append(f"--{where}.batch must be > 0 (it is {self.batch})")
        return found


def _pair(pair: tuple[int, int]) -> str:
    return f"[{pair[0]}, {pair[1]}]"


def predict_logits(model: Network, image: Tensor, config: InferenceConfig, size: tuple[int, int]) -> Tensor:
    """Logits of an image at any output size.

    Args:
        model: [b, 3, H', W'] -> logits [b, K, h', w'] at any stride.
        image: float [B, 3, H, W], normalised; any size.
        config: legal (`config.problems` is empty).
        size: (height, width) of the result.

    Returns:
        float32 [B, K, height, width]. It takes B * K * height * width * 4 bytes: `predict_labels` does not.
    """
    return _resize(_image_logits(model, image, config), size)


def predict_labels(
    model: Network,
    image: Tensor,
    config: InferenceConfig,
    size: tuple[int, int],
    strip_elements: int = _STRIP_ELEMENTS,
) -> Tensor:
    """Predicted classes of an image at any output size.

    Args:
        model, image, config, size: as in `predict_logits`.
        strip_elements: upsampled logits that may exist at one time; more are computed in strips of rows.

    Returns:
        int64 [B, height, width].
    """
    return labels_of(_image_logits(model, image, config), size, strip_elements)


def labels_of(logits: Tensor, size: tuple[int, int], strip_elements: int = _STRIP_ELEMENTS) -> Tensor:
    """argmax of logits [B, K, h, w] upsampled bilinearly to `size`, without all upsampled logits at one time.

    Returns:
        int64 [B, height, width]; equal classes decide for the lower one.
    """
    batch, classes, _, _ = logits.shape
    height, width = size
    rows = strip_elements // (batch * classes * width)
    if rows >= height:
        return _resize(logits, size).argmax(1)
    starts = range(0, height, max(rows, 1))
    return torch.cat([_strip(logits, size, y, min(y + starts.step, height)).argmax(1) for y in starts], dim=1)


def _strip(logits: Tensor, size: tuple[int, int], first: int, last: int) -> Tensor:
    """Rows [first, last) of the bilinear upsampling of [B, K, h, w] to `size`: [B, K, last - first, width]."""
    height = logits.shape[2]
    y = torch.arange(first, last, device=logits.device, dtype=torch.float32)
    y = ((y + 0.5) * (height / size[0]) - 0.5).clamp_(min=0)  # align_corners False
    above = y.to(torch.int64).clamp_(max=height - 1)
    below = (above + 1).clamp_(max=height - 1)
    share = (y - above).clamp_(max=1)[:, None]
    rows = torch.lerp(logits[:, :, above], logits[:, :, below], share)  # [B, K, last - first, w]
    return _resize(rows, (last - first, size[1]))


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _image_logits(model: Network, image: Tensor, config: InferenceConfig) -> Tensor:
    """float32 logits [B, K, H, W] at the image's own size; sides below MIN_SIDE see a border of mean colour."""
    height, width = image.shape[2:]
    missing = (max(MIN_SIDE - height, 0), max(MIN_SIDE - width, 0))
    if any(missing):
        image = functional.pad(image, (0, missing[1], 0, missing[0]))
    logits = _slide(model, image, config) if config.mode == "slide" else _forward(model, image)
    return logits[:, :, :height, :width]


def _forward(model: Network, image: Tensor) -> Tensor:
    return _resize(model(image).float(), (image.shape[2], image.shape[3]))


def _slide(model: Network, image: Tensor, config: InferenceConfig) -> Tensor:
    """Mean of the windows' logits, [B, K, H, W]. No window leaves the image: the last ones are shifted back."""
    batch, _, height, width = image.shape
    crop = config.crop or DEFAULT_CROP
    stride = config.stride or (max(crop[0] // 2, 1), max(crop[1] // 2, 1))
    tall, wide = min(crop[0], height), min(crop[1], width)
    windows = [(y, x) for y in _starts(height, tall, stride[0]) for x in _starts(width, wide, stride[1])]
    group_size = config.batch or DEFAULT_BATCH
    total: Tensor | None = None
    seen = torch.zeros(1, 1, height, width, device=image.device)
    for begin in range(0, len(windows), group_size):
        group = windows[begin : begin + group_size]
        crops = torch.cat([image[:, :, y : y + tall, x : x + wide] for y, x in group])  # [group * B, 3, tall, wide]
        logits = _forward(model, crops)  # [group * B, K, tall, wide]
        if total is None:
            total = logits.new_zeros(batch, logits.shape[1], height, width)
        for (y, x), part in zip(group, logits.split(batch), strict=True):
            total[:, :, y : y + tall, x : x + wide] += part
            seen[:, :, y : y + tall, x : x + wide] += 1
    assert total is not None  # an image has at least one window
    return total.div_(seen)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, so that the last one ends at the side's end."""
    starts = list(range(0, length - window, stride))
    return [*starts, length - window]
