"""One benchmark for each op of ssr_kernels."""
