"""ssr_kernels: fused operators for segmentation training. Usable from any trainer; imports nothing of ssr_fast."""
