"""What the Triton kernels of dwconv share: tiles of a row of a map, filters, the GELU, the sum of partial gradients.

Maps are [B, H, W, C] rows. A program owns `rows` rows of one image, TW columns and BC channels; along a row it works on
tiles [TW, BC]. A filter is a tuple of nine [BC] float32 vectors, row by row.
"""

import triton
import triton.language as tl

INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
HALF_LOG2E = tl.constexpr(0.7213475204444817)
ERF_SLOPE = tl.constexpr(0.23164189)
"""0.3275911 / sqrt(2), see normal."""


@triton.jit
def place(H, strips, rows, C: tl.constexpr, BC: tl.constexpr):
    """What this program owns: image, first row, end of the rows, strip of columns, number among all of the same
    channels, first channel. Neighbours in space are neighbours in time, so that what they share is in cache."""
    channel_blocks: tl.constexpr = (C + BC - 1) // BC
    segments = tl.cdiv(H, rows)
    here = tl.program_id(0) % (tl.num_programs(0) // channel_blocks)
    block = tl.program_id(0) // (tl.num_programs(0) // channel_blocks)
    strip = here % strips
    row0 = here // strips % segments * rows
    return here // (strips * segments), row0, tl.minimum(row0 + rows, H), strip, here, block * BC


@triton.jit
def offsets(row, w, c, W, C: tl.constexpr):
    """Offsets [TW, BC] of columns w and channels c of a row, within an image."""
    return (row * W + w)[:, None] * C + c[None, :]


@triton.jit
def tile(image, row, w, c, H, W, C: tl.constexpr):
    """Columns w and channels c of a row, float32 [TW, BC]; 0 outside of the map."""
    keep = ((w >= 0) & (w < W) & (row >= 0) & (row < H))[:, None] & (c < C)[None, :]
    return tl.load(image + offsets(row, w, c, W, C), mask=keep, other=0.0).to(tl.float32)


@triton.jit
def nine(weight, c, C: tl.constexpr):
    """The filters of channels c of a weight [C, 1, 3, 3]: a tuple of nine [BC], float32."""
    at = weight + c * 9
    k0 = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    k1 = tl.load(at + 1, mask=c < C, other=0.0).to(tl.float32)
    k2 = tl.load(at + 2, mask=c < C, other=0.0).to(tl.float32)
    k3 = tl.load(at + 3, mask=c < C, other=0.0).to(tl.float32)
    k4 = tl.load(at + 4, mask=c < C, other=0.0).to(tl.float32)
    k5 = tl.load(at + 5, mask=c < C, other=0.0).to(tl.float32)
    k6 = tl.load(at + 6, mask=c < C, other=0.0).to(tl.float32)
    k7 = tl.load(at + 7, mask=c < C, other=0.0).to(tl.float32)
    k8 = tl.load(at + 8, mask=c < C, other=0.0).to(tl.float32)
    return k0, k1, k2, k3, k4, k5, k6, k7, k8


@triton.jit
def along(left, middle, right, k_left, k_middle, k_right):
    """Sum of three tiles [TW, BC] times a row of a filter."""
    return left * k_left[None, :] + middle * k_middle[None, :] + right * k_right[None, :]


@triton.jit
def normal(z):
    """The normal distribution's cdf(z), within 7.5e-8, and exp(-z^2 / 2).

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, whose exponential is that of the density too.
    """
    bell = tl.exp2(z * z * -HALF_LOG2E)
    t = 1.0 / (1.0 + ERF_SLOPE * tl.abs(z))
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = tail * t + 0.254829592
    tail = tail * t * bell * 0.5
    return tl.where(z < 0, tail, 1.0 - tail), bell


@triton.jit(do_not_specialize=["splits"])
def tap_sums(partials, filters, bias, splits, TAPS: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Gradients of filters and bias from partials [splits, TAPS, C], added in a fixed order.

    filters: a tuple of [C, 1, 3, 3]; tap 9 f + k of the partials is element k of filter f, a last one the bias [C].
    One program: one tap, BC channels. Moves: the partials in, the gradients out.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    tap = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    total = tl.zeros([BS, BC], tl.float32)
    for s0 in range(0, splits, BS):
        keep = (s0 + s < splits)[:, None] & (c < C)[None, :]
        at = ((s0 + s).to(tl.int64) * TAPS + tap)[:, None] * C + c[None, :]
        total += tl.load(partials + at, mask=keep, other=0.0)
    found = tl.sum(total, 0)
    for f in tl.static_range(len(filters)):
        if tap // 9 == f:
            tl.store(filters[f] + c * 9 + tap % 9, found.to(filters[f].dtype.element_ty), mask=c < C)
    if bias is not None:
        if tap == 9 * len(filters):
            tl.store(bias + c, found.to(bias.dtype.element_ty), mask=c < C)
