"""Segmentation loss from low-resolution logits, and pseudo-labels."""

from .op import PSEUDO_LABEL, SEGLOSS, check_labels, pseudo_label, segloss

OPS = (SEGLOSS, PSEUDO_LABEL)

__all__ = ["OPS", "check_labels", "pseudo_label", "segloss"]
