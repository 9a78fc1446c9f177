"""Contrastive learning over sampled pixels: the sampler and multi-positive InfoNCE."""

from .loss import CONTRAST_LOSS, contrast_loss
from .sampling import SAMPLE_PAIRS, Samples, sample_pairs

OPS = (SAMPLE_PAIRS, CONTRAST_LOSS)

__all__ = ["OPS", "Samples", "contrast_loss", "sample_pairs"]
