"""Networks: MiT, heads, the segmentor, the SAM encoder, weights of every format."""
