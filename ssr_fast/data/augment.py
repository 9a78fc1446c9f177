"""Normalisation and strong augmentation of images, on the device, sync-free.

B batch, H W pixels. Images are RGB; "normalised" means (value - MEAN) / STD with values in 0..255.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssr_fast.data.geometry import MEAN, STD
from ssr_kernels import counter

BLUR_TAPS = 13  # sigma <= 1.15: further taps are below 1e-6


def normalise(image: NDArray[np.uint8]) -> Tensor:
    """image uint8 [H, W, 3] RGB -> float32 [3, H, W], normalised."""
    return normalise_batch(torch.from_numpy(np.ascontiguousarray(image))[None])[0]


def normalise_batch(images: Tensor) -> Tensor:
    """images uint8 [B, H, W, 3] RGB -> float32 [B, 3, H, W] on the same device, channels-last in memory.

    Images of floating point come from a loader that has done it, and are returned as they are.
    """
    if images.is_floating_point():
        return images
    mean, std = _constant(MEAN, images.device), _constant(STD, images.device)
    return images.to(torch.float32).sub_(mean).div_(std).permute(0, 3, 1, 2)


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [len(values)], made on the device: torch.tensor would copy it there, and wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def strong_augment(images: Tensor, key: Tensor, strength: float, jitter_p: float, blur_p: float) -> Tensor:
    """Colour jitter and Gaussian blur, one draw for the whole batch, as a pure function of (images, key).

    Brightness, contrast, saturation factors U(1 - s, 1 + s) and hue shift U(-s, s) turns with probability `jitter_p`;
    blur of sigma U(0.15, 1.15) with probability `blur_p` (DAFormer's values: s 0.2, 0.8, 0.5).

    Args:
        images: float32 [B, 3, H, W], normalised.
        key: int64 scalar tensor of ssr_kernels.counter, on the images' device.
        strength: s.
        jitter_p: probability of the colour jitter.
        blur_p: probability of the blur.

    Returns:
        float32 [B, 3, H, W], normalised.
    """
    draw = counter.uniform(key, 0, (7,))
    mean, std = (_constant(values, images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    rgb = ((images.contiguous() * std + mean) / 255.0).clamp(0.0, 1.0)  # planes: a pixel's channels meet in no vector
    factors = 1.0 + strength * (2.0 * draw[:3] - 1.0)
    jittered = color_jitter(rgb, factors[0], factors[1], factors[2], strength * (2.0 * draw[3] - 1.0))
    rgb = torch.where(draw[4] < jitter_p, jittered, rgb)
    rgb = torch.where(draw[5] < blur_p, gaussian_blur(rgb, 0.15 + draw[6]), rgb)
    return (rgb * 255.0 - mean) / std


def color_jitter(rgb: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Adjust brightness, contrast, saturation and hue, in this order, with torchvision's definitions.

    Args:
        rgb: [B, 3, H, W] in [0, 1].
        brightness, contrast, saturation: factors, scalar tensors; 1 changes nothing.
        hue: shift in turns, scalar tensor; 0 changes nothing.
    """
    rgb = (rgb * brightness).clamp(0.0, 1.0)
    rgb = (_grey(rgb).mean((1, 2, 3), keepdim=True) * (1 - contrast) + rgb * contrast).clamp(0.0, 1.0)
    rgb = (_grey(rgb) * (1 - saturation) + rgb * saturation).clamp(0.0, 1.0)
    return _shift_hue(rgb, hue)


def _grey(rgb: Tensor) -> Tensor:
    return 0.2989 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]


def _shift_hue(rgb: Tensor, hue: Tensor) -> Tensor:
    """Rotate the hue of rgb [B, 3, H, W] by `hue` turns, through HSV."""
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    r, g, b = rgb.unbind(1)
    turn = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    turn = (turn / 6 + hue) % 1.0 * 6  # [B, H, W] in sixths of a turn
    offsets = _constant((5.0, 3.0, 1.0), rgb.device).view(1, 3, 1, 1)
    k = (turn[:, None] + offsets) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0.0, 1.0)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur of images [B, 3, H, W] with sigma in pixels (scalar tensor), edges replicated."""
    reach = BLUR_TAPS // 2
    offset = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    taps = torch.exp(-0.5 * (offset / sigma) ** 2)
    taps = torch.where(taps > 1e-30, taps, 0.0)  # a subnormal tap adds nothing, and slows a CPU down 15 times
    taps = taps / taps.sum()
    channels = images.shape[1]
    images = images.contiguous(memory_format=torch.channels_last)
    # not F.pad, which on a GPU takes a slow way where kernels must be deterministic; without a gradient all are
    images = torch.ops.aten.replication_pad2d(images, (reach, reach, reach, reach))
    images = F.conv2d(images, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(images, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
