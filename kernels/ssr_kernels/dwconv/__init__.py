"""Depthwise 3x3 convolutions of channels-last maps."""

from .op import DILATED, GELU, dwconv_dilated, dwconv_gelu

OPS = (GELU, DILATED)

__all__ = ["OPS", "dwconv_dilated", "dwconv_gelu"]
