"""Projection + cosine alignment of student features with a frozen encoder's."""

from .op import ALIGN, align_loss, align_stages

OPS = (ALIGN,)

__all__ = ["OPS", "align_loss", "align_stages"]
