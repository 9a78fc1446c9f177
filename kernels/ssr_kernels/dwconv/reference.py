"""Depthwise 3x3 convolutions of channels-last maps in plain PyTorch: the definition of the op.

B batch, H W pixels, C channels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(dw3x3(x) + bias) with zero padding 1 and the exact (erf) GELU. See op.dwconv_gelu."""
    return F.gelu(depthwise(x, weight, bias, dilation=1))


def dwconv_dilated(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """One dilated depthwise 3x3 of x for each (weight, dilation). See op.dwconv_dilated."""
    return [depthwise(x, weight, None, dilation) for weight, dilation in zip(weights, dilations, strict=True)]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """One depthwise 3x3 convolution.

    Args:
        x: [B, H, W, C].
        weight: [C, 1, 3, 3].
        bias: [C] or None.
        dilation: of both directions; the zero padding is as wide, so that the size stays.

    Returns:
        [B, H, W, C], contiguous.
    """
    # the permuted view of contiguous rows IS the channels_last memory format: nothing is copied on the way in
    maps = x.permute(0, 3, 1, 2)  # [B, C, H, W]
    maps = F.conv2d(maps, weight, bias, padding=dilation, dilation=dilation, groups=x.shape[3])
    # rows in, rows out; only an x that was itself laid out as NCHW is answered in NCHW, and copied here
    return maps.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
