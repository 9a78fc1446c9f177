"""Triton kernels of the Gram form: everything a fine row in C channels, everything of D channels on the target's grid.

Tables (float32, P = C + 8 columns, see forms.py): tokens [B hs ws, P], gram [C + 1, P], y [B hs ws, P].
"""

import triton
import triton.language as tl

from .triton_common import PAD, finish_rows, interpolate, locate, pick, row_factors, tap, taps, tile_pixels


@triton.jit
def _times(xs, table, PRECISION: tl.constexpr):
    """xs times a float32 matrix, in float32 accuracy: bfloat16 operands take the matrix in two bfloat16 parts."""
    if xs.dtype == tl.bfloat16:
        high = table.to(tl.bfloat16)
        low = (table - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(xs, high) + tl.dot(xs, low)
    else:
        return tl.dot(xs.to(tl.float32), table, input_precision=PRECISION)


@triton.jit(do_not_specialize=["hs", "ws", "batch"])
def gram_tables(
    weights, biases, channels, ends, tokens, grams, target, hs, ws, batch,
    D: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tables tokens and gram. One program: BC columns of BM rows of one of them, of one stage.

    Registers: the block [BM, BC], six sums a row. Moves: the target or W in (from cache beyond the first column block),
    the table out.
    """
    stage, first = locate(ends, tl.program_id(0))
    weight, C = pick(weights, stage), pick(channels, stage)
    bias = None if biases is None else pick(biases, stage)
    blocks = tl.cdiv(C, BC)
    count = batch * hs * ws
    block = (tl.program_id(0) - first) % blocks
    m = (tl.program_id(0) - first) // blocks * BM + tl.arange(0, BM)
    c = block * BC + tl.arange(0, BC)
    if (tl.program_id(0) - first) // blocks < tl.cdiv(count, BM):
        _token_rows(
            target, weight, bias, pick(tokens, stage), m, c, count, hs, ws, C, block == 0, D, BK, PRODUCTS, PRECISION
        )  # fmt: skip
    else:
        m -= tl.cdiv(count, BM) * BM
        _gram_rows(weight, bias, pick(grams, stage), m, c, C, block == 0, D, BK, PRECISION)


@triton.jit
def _token_rows(
    target, weight, bias, out, m, c, count, hs, ws, C, first_block,
    D: tl.constexpr, BK: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    inside = m < count
    has_right = inside & (m % ws < ws - 1)
    has_down = inside & (m // ws % hs < hs - 1)
    tw = tl.zeros([m.shape[0], c.shape[0]], tl.float32)
    tb = tl.zeros([m.shape[0]], tl.float32)
    own = tl.zeros([m.shape[0]], tl.float32)
    across = tl.zeros([m.shape[0]], tl.float32)
    along = tl.zeros([m.shape[0]], tl.float32)
    diagonal = tl.zeros([m.shape[0]], tl.float32)
    anti = tl.zeros([m.shape[0]], tl.float32)
    for d0 in range(0, D, BK):
        d = d0 + tl.arange(0, BK)
        at = target + m.to(tl.int64)[:, None] * D + d[None, :]
        ts = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        wd = tl.load(weight + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        tw = tl.dot(ts, wd, tw, input_precision=PRECISION)
        t = ts.to(tl.float32)
        if bias is not None:
            tb += tl.sum(t * tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
        if PRODUCTS and first_block:
            right = tl.load(at + D, mask=has_right[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            down = tl.load(at + ws * D, mask=has_down[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            both = (has_right & has_down)[:, None] & (d < D)[None, :]
            corner = tl.load(at + (ws + 1) * D, mask=both, other=0.0).to(tl.float32)
            own += tl.sum(t * t, 1)
            across += tl.sum(t * right, 1)
            along += tl.sum(t * down, 1)
            diagonal += tl.sum(t * corner, 1)
            anti += tl.sum(tl.where(both, right * down, 0.0), 1)
    row = out + m.to(tl.int64) * (C + PAD)
    tl.store(row[:, None] + c[None, :], tw, mask=inside[:, None] & (c < C)[None, :])
    if first_block:
        tl.store(row + C, tb, mask=inside)
        if PRODUCTS:
            tl.store(row + C + 1, own, mask=inside)
            tl.store(row + C + 2, across, mask=inside)
            tl.store(row + C + 3, along, mask=inside)
            tl.store(row + C + 4, diagonal, mask=inside)
            tl.store(row + C + 5, anti, mask=inside)


@triton.jit
def _gram_rows(weight, bias, out, m, c, C, first_block, D: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Rows m of [W, b]^T [W, b]: m < C are W's columns, m = C is b."""
    products = tl.zeros([m.shape[0], c.shape[0]], tl.float32)
    last = tl.zeros([m.shape[0]], tl.float32)
    for d0 in range(0, D, BK):
        d = d0 + tl.arange(0, BK)
        left = tl.load(weight + d[None, :] * C + m[:, None], mask=(d < D)[None, :] & (m < C)[:, None], other=0.0)
        if bias is not None:
            b = tl.load(bias + d, mask=d < D, other=0.0)
            left = tl.where((m == C)[:, None], b[None, :], left)
            last += tl.sum(left.to(tl.float32) * b.to(tl.float32)[None, :], 1)
        wd = tl.load(weight + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        products = tl.dot(left, wd, products, input_precision=PRECISION)
    row = out + m * (C + PAD)
    tl.store(row[:, None] + c[None, :], products, mask=(m <= C)[:, None] & (c < C)[None, :])
    if first_block:
        tl.store(row + C, last, mask=m <= C)


@triton.jit
def _x_times_gram(
    x, gram, row, inside, c, C, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(A x)_c of each row, float32 [rows, len(c)]."""
    ax = tl.zeros([row.shape[0], c.shape[0]], tl.float32)
    for e0 in range(0, C, BK):
        e = e0 + tl.arange(0, BK)
        xs = tl.load(x + row[:, None] * C + e[None, :], mask=inside[:, None] & (e < C)[None, :], other=0.0)
        a = tl.load(gram + e[:, None] * (C + PAD) + c[None, :], mask=(e < C)[:, None] & (c < C)[None, :], other=0.0)
        ax += _times(xs, a, PRECISION)
    return ax


@triton.jit(do_not_specialize=["hs", "ws"])
def gram_rows(
    features, tokens, grams, masks, heights, widths, channels, row0s, tile0s, ends,
    hs, ws, rows, total, partials,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cos, 1 / |p|, 1 / |t| of every row, and each tile's sums for the loss. One program: one tile of one stage.

    Registers: A x and interp(T W) [BH BW, BC]. Moves: x in (again from cache for each block of C), 12 bytes a row out,
    tables from cache.
    """
    stage, first = locate(ends, tl.program_id(0))
    tile = tl.program_id(0) - first
    x, table, gram, h, w, C = (
        pick(features, stage), pick(tokens, stage), pick(grams, stage), pick(heights, stage), pick(widths, stage),
        pick(channels, stage),
    )  # fmt: skip
    valid = None if masks is None else pick(masks, stage)
    image, i, j, inside, row = tile_pixels(tile, h, w, BH, BW)
    token, down, right, fy, fx = taps(image, i, j, h, w, hs, ws)
    stride = C + PAD
    last = gram + C * stride
    pt = _interpolate_column(table + C, token, down, right, fy, fx, inside, stride)
    pp = tl.zeros([BH * BW], tl.float32) + tl.load(last + C)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        ax = _x_times_gram(x, gram, row, inside, c, C, BK, PRECISION)
        u = tl.load(last + c, mask=c < C, other=0.0)
        xc = tl.load(x + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        xc = xc.to(tl.float32)
        pp += tl.sum(xc * (ax + 2 * u[None, :]), 1)
        pt += tl.sum(xc * interpolate(table, token, down, right, fy, fx, inside, c, stride, c < C), 1)
    tt = _squared_norm(table + C + 1, token, down, right, fy, fx, inside, stride)
    finish_rows(
        pt, pp, tt, valid, row, inside, rows + pick(row0s, stage), total, partials, pick(tile0s, stage) + tile
    )  # fmt: skip


@triton.jit
def _interpolate_column(column, token, down, right, fy, fx, inside, stride):
    at = column + token * stride
    top = (1 - fx) * tl.load(at, mask=inside, other=0.0) + fx * tl.load(at + right * stride, mask=inside, other=0.0)
    bottom = (1 - fx) * tl.load(at + down * stride, mask=inside, other=0.0)
    bottom += fx * tl.load(at + (down + right) * stride, mask=inside, other=0.0)
    return (1 - fy) * top + fy * bottom


@triton.jit
def _squared_norm(products, token, down, right, fy, fx, inside, stride):
    """|t|^2 of each row from the products of neighbouring tokens (own, right, down, diagonal, anti-diagonal)."""
    at = products + token * stride
    aside = at + right * stride
    below = at + down * stride
    corner = below + right * stride
    top, left = 1 - fy, 1 - fx
    squares = top * top * left * left * tl.load(at, mask=inside, other=0.0)
    squares += top * top * fx * fx * tl.load(aside, mask=inside, other=0.0)
    squares += fy * fy * left * left * tl.load(below, mask=inside, other=0.0)
    squares += fy * fy * fx * fx * tl.load(corner, mask=inside, other=0.0)
    cross = left * fx * top * top * tl.load(at + 1, mask=inside, other=0.0)
    cross += left * fx * fy * fy * tl.load(below + 1, mask=inside, other=0.0)
    cross += top * fy * left * left * tl.load(at + 2, mask=inside, other=0.0)
    cross += top * fy * fx * fx * tl.load(aside + 2, mask=inside, other=0.0)
    both = tl.load(at + 3, mask=inside, other=0.0) + tl.load(at + 4, mask=inside, other=0.0)
    return squares + 2 * (cross + top * fy * left * fx * both)


@triton.jit(do_not_specialize=["hs", "ws"])
def gram_dx(
    features, tokens, grams, masks, heights, widths, channels, row0s, indices, ends, gradients,
    hs, ws, rows, total, grad, scale,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the features. One program: one tile of one stage.

    Registers: A x and interp(T W) [BH BW, BC]. Moves: x and 12 bytes a row in, dx out, tables from cache.
    """
    stage, first = locate(ends, tl.program_id(0))
    x, table, gram, h, w, C = (
        pick(features, stage), pick(tokens, stage), pick(grams, stage), pick(heights, stage), pick(widths, stage),
        pick(channels, stage),
    )  # fmt: skip
    valid = None if masks is None else pick(masks, stage)
    image, i, j, inside, row = tile_pixels(tl.program_id(0) - first, h, w, BH, BW)
    token, down, right, fy, fx = taps(image, i, j, h, w, hs, ws)
    r, k = row_factors(rows + pick(row0s, stage), total, valid, row, inside)
    factor = -tl.load(grad) * tl.load(scale + pick(indices, stage))
    r *= factor
    k *= factor
    out = pick(gradients, stage)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        ax = _x_times_gram(x, gram, row, inside, c, C, BK, PRECISION)
        ax += tl.load(gram + C * (C + PAD) + c, mask=c < C, other=0.0)[None, :]
        tw = interpolate(table, token, down, right, fy, fx, inside, c, C + PAD, c < C)
        dx = r[:, None] * tw - k[:, None] * ax
        tl.store(
            out + row[:, None] * C + c[None, :], dx.to(out.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :]
        )  # fmt: skip


@triton.jit(do_not_specialize=["hs", "ws", "batch"])
def gram_adjoint(
    features, masks, heights, widths, channels, row0s, indices, ends, ys,
    hs, ws, batch, rows, total, grad, scale,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y: for each token the sum over the rows it touches of tap weight * -grad * scale * r * [x, 1]. One program: BC
    columns of BM tokens of one stage, their rows in raster order.

    Registers: y [BM, BC]. Moves: x in, about four times, all but once from cache; y out.
    """
    stage, first = locate(ends, tl.program_id(0))
    x, h, w, C = pick(features, stage), pick(heights, stage), pick(widths, stage), pick(channels, stage)
    valid = None if masks is None else pick(masks, stage)
    blocks = tl.cdiv(C, BC)
    block = (tl.program_id(0) - first) % blocks
    token = (tl.program_id(0) - first) // blocks * BM + tl.arange(0, BM)
    c = block * BC + tl.arange(0, BC)
    known = token < batch * hs * ws
    image, py, px = token // (hs * ws), token // ws % hs, token % ws
    ratio_y, ratio_x = h.to(tl.float32) / hs.to(tl.float32), w.to(tl.float32) / ws.to(tl.float32)
    # source (i + 1/2) / ratio - 1/2 lies within 1 of the token for these rows, give or take one for rounding
    i0 = tl.floor((py.to(tl.float32) - 0.5) * ratio_y - 0.5).to(tl.int32)
    j0 = tl.floor((px.to(tl.float32) - 0.5) * ratio_x - 0.5).to(tl.int32)
    y = tl.zeros([BM, BC], tl.float32)
    y_ones = tl.zeros([BM], tl.float32)
    for down in range(0, (2 * ratio_y).to(tl.int32) + 3):
        i = i0 + down
        share_y = _share(i, py, h, hs)
        for aside in range(0, (2 * ratio_x).to(tl.int32) + 3):
            j = j0 + aside
            share = share_y * _share(j, px, w, ws)
            touched = known & (share > 0)
            row = (image * h + i).to(tl.int64) * w + j
            r, _ = row_factors(rows + pick(row0s, stage), total, valid, row, touched)
            r *= share
            xs = tl.load(x + row[:, None] * C + c[None, :], mask=touched[:, None] & (c < C)[None, :], other=0.0)
            y += r[:, None] * xs.to(tl.float32)
            y_ones += r
    factor = -tl.load(grad) * tl.load(scale + pick(indices, stage))
    out = pick(ys, stage) + token.to(tl.int64) * (C + PAD)
    tl.store(out[:, None] + c[None, :], factor * y, mask=known[:, None] & (c < C)[None, :])
    tl.store(out + C, factor * y_ones, mask=known & (block == 0))


@triton.jit
def _share(position, sample, fine, coarse):
    """Weight of a coarse sample in a fine position; 0 outside the image."""
    low, weight = tap(position, fine, coarse)
    share = tl.where(low == sample, 1 - weight, tl.where(low + 1 == sample, weight, 0.0))
    return tl.where((position >= 0) & (position < fine), share, 0.0)
