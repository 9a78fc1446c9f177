"""Triton kernels of gelu(dw3x3(x) + bias). A program slides down its rows: each row of x is read once by it, three
times shifted, and goes into the three sums of products that it is part of; two of them wait for rows to come."""

import triton
import triton.language as tl

from .triton_common import INV_SQRT_2PI, along, nine, normal, offsets, place, tile


@triton.jit
def three(image, row, w, c, H, W, C: tl.constexpr):
    """Columns w - 1, w and w + 1 of a row: see tile."""
    return tile(image, row, w - 1, c, H, W, C), tile(image, row, w, c, H, W, C), tile(image, row, w + 1, c, H, W, C)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def gelu_forward(
    x, weight, bias, out, H, W, rows, C: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr
):
    """out = gelu(dw3x3(x) + bias). One program: `rows` rows, TW columns, BC channels.

    Registers: five tiles [TW, BC], the filter. Moves: x in (a row above and one below again), out.
    """
    image, row0, end, strip, _, c0 = place(H, tl.cdiv(W, TW), rows, C, BC)
    w, c = strip * TW + tl.arange(0, TW), c0 + tl.arange(0, BC)
    base = image.to(tl.int64) * H * W * C
    x += base
    out += base
    k = nine(weight, c, C)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    keep = (w < W)[:, None] & (c < C)[None, :]
    left, middle, right = three(x, row0 - 1, w, c, H, W, C)
    this = b + along(left, middle, right, k[0], k[1], k[2])
    left, middle, right = three(x, row0, w, c, H, W, C)
    this += along(left, middle, right, k[3], k[4], k[5])
    following = b + along(left, middle, right, k[0], k[1], k[2])
    for row in tl.range(row0, end, num_stages=STAGES):
        left, middle, right = three(x, row + 1, w, c, H, W, C)
        z = this + along(left, middle, right, k[6], k[7], k[8])
        this = following + along(left, middle, right, k[3], k[4], k[5])
        following = b + along(left, middle, right, k[0], k[1], k[2])
        cdf, bell = normal(z)
        tl.store(out + offsets(row, w, c, W, C), (z * cdf).to(out.dtype.element_ty), mask=keep)


@triton.jit
def beside(values, step: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """values [TW, BC] of the column `step` (1 or -1) to the right; 0 where there is none."""
    column = tl.arange(0, TW) + step
    inside = (column >= 0) & (column < TW)
    index = tl.broadcast_to(tl.where(inside, column, 0)[:, None], [TW, BC])
    return tl.where(inside[:, None], tl.gather(values, index, 0), 0.0)


@triton.jit(do_not_specialize=["H", "W", "rows", "strips"])
def gelu_backward(
    grad, x, weight, bias, dx, partials, H, W, rows, strips,
    C: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, HALO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and partials [programs of the same channels, 10, C]: gradients of the nine filter elements and of the bias.

    One program: `rows` rows, BC channels, and TW - 2 HALO columns of its own: HALO columns on either side it works on
    without owning them. The gradient of what lies before the GELU, dz, is made once a pixel and handed to the columns
    beside. dx may be None, and partials too: then they are not wanted.
    Registers: nineteen tiles [TW, BC], the filter. Moves: x and grad in (two rows above and below again), dx out.
    """
    image, row0, end, strip, here, c0 = place(H, strips, rows, C, BC)
    column = tl.arange(0, TW)
    w, c = strip * (TW - 2 * HALO) - HALO + column, c0 + tl.arange(0, BC)
    base = image.to(tl.int64) * H * W * C
    x += base
    grad += base
    own = ((column >= HALO) & (column < TW - HALO) & (w < W))[:, None] & (c < C)[None, :]
    k = nine(weight, c, C)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    left, middle, right = three(x, row0 - 2, w, c, H, W, C)
    this = b + along(left, middle, right, k[0], k[1], k[2])
    left, middle, right = three(x, row0 - 1, w, c, H, W, C)
    this += along(left, middle, right, k[3], k[4], k[5])
    following = b + along(left, middle, right, k[0], k[1], k[2])
    zero = tl.zeros([TW, BC], tl.float32)
    x_above, x_here, dx_here, dx_below = zero, zero, zero, zero  # of rows that it does not own: 0
    dk0, dk1, dk2, dk3, dk4, dk5, dk6, dk7, dk8, db = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for row in tl.range(row0 - 1, end + 1, num_stages=STAGES):
        left, middle, right = three(x, row + 1, w, c, H, W, C)
        z = this + along(left, middle, right, k[6], k[7], k[8])
        this = following + along(left, middle, right, k[3], k[4], k[5])
        following = b + along(left, middle, right, k[0], k[1], k[2])
        cdf, bell = normal(z)
        dy = tile(grad, row, w, c, H, W, C)
        dz = dy * (cdf + z * bell * INV_SQRT_2PI)  # 0 outside of the map, as dy is
        dz_left, dz_right = beside(dz, -1, TW, BC), beside(dz, 1, TW, BC)
        if dx is not None:
            dx_above = dx_here + along(dz_left, dz, dz_right, k[2], k[1], k[0])
            dx_here = dx_below + along(dz_left, dz, dz_right, k[5], k[4], k[3])
            dx_below = along(dz_left, dz, dz_right, k[8], k[7], k[6])
            at = dx + base + offsets(row - 1, w, c, W, C)
            tl.store(at, dx_above.to(dx.dtype.element_ty), mask=own & (row - 1 >= row0))
        if partials is not None:
            x_below = tl.where(own & (row + 1 >= row0) & (row + 1 < end), middle, 0.0)
            dk0 += x_above * dz_right
            dk1 += x_above * dz
            dk2 += x_above * dz_left
            dk3 += x_here * dz_right
            dk4 += x_here * dz
            dk5 += x_here * dz_left
            dk6 += x_below * dz_right
            dk7 += x_below * dz
            dk8 += x_below * dz_left
            db += tl.where(own & (row >= row0) & (row < end), dz, 0.0)
            x_above, x_here = x_here, x_below
    if partials is not None:
        at = partials + here.to(tl.int64) * 10 * C + c
        tl.store(at, tl.sum(dk0, 0), mask=c < C)
        tl.store(at + C, tl.sum(dk1, 0), mask=c < C)
        tl.store(at + 2 * C, tl.sum(dk2, 0), mask=c < C)
        tl.store(at + 3 * C, tl.sum(dk3, 0), mask=c < C)
        tl.store(at + 4 * C, tl.sum(dk4, 0), mask=c < C)
        tl.store(at + 5 * C, tl.sum(dk5, 0), mask=c < C)
        tl.store(at + 6 * C, tl.sum(dk6, 0), mask=c < C)
        tl.store(at + 7 * C, tl.sum(dk7, 0), mask=c < C)
        tl.store(at + 8 * C, tl.sum(dk8, 0), mask=c < C)
        tl.store(at + 9 * C, tl.sum(db, 0), mask=c < C)
