"""ssr_fast: domain-adaptive semantic segmentation, regularised by a frozen SAM."""

__version__ = "0.1.0"
