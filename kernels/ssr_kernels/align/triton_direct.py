"""Triton kernels of the direct form: p = x W^T + b a row, the target's D channels streamed in blocks of BN.

A program reads the x of its rows once from memory (again from cache for each block of D) and W from the second-level
cache; p, t and the gradient of p live in registers only.
"""

import triton
import triton.language as tl

from .triton_common import PAD, finish_rows, interpolate, locate, pick, project, row_factors, taps, tile_pixels


@triton.jit(do_not_specialize=["hs", "ws"])
def direct_rows(
    features, weights, biases, masks, heights, widths, channels, row0s, tile0s, ends,
    target, hs, ws, rows, total, partials,
    D: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cos, 1 / |p|, 1 / |t| of every row, and each tile's sums for the loss. One program: one tile of one stage.

    Registers: p and t [BH BW, BN], three sums a row. Moves: x, 12 bytes a row out, W and the target from cache.
    """
    stage, first = locate(ends, tl.program_id(0))
    tile = tl.program_id(0) - first
    x, weight, h, w, C = (
        pick(features, stage), pick(weights, stage), pick(heights, stage), pick(widths, stage), pick(channels, stage),
    )  # fmt: skip
    bias = None if biases is None else pick(biases, stage)
    valid = None if masks is None else pick(masks, stage)
    image, i, j, inside, row = tile_pixels(tile, h, w, BH, BW)
    token, down, right, fy, fx = taps(image, i, j, h, w, hs, ws)
    pt = tl.zeros([BH * BW], tl.float32)
    pp = tl.zeros([BH * BW], tl.float32)
    tt = tl.zeros([BH * BW], tl.float32)
    for d0 in range(0, D, BN):
        d = d0 + tl.arange(0, BN)
        p = project(x, weight, bias, row, inside, d, C, D, BK, PRECISION)
        t = interpolate(target, token, down, right, fy, fx, inside, d, D, d < D)
        pt += tl.sum(p * t, 1)
        pp += tl.sum(p * p, 1)
        tt += tl.sum(t * t, 1)
    finish_rows(
        pt, pp, tt, valid, row, inside, rows + pick(row0s, stage), total, partials, pick(tile0s, stage) + tile
    )  # fmt: skip


@triton.jit(do_not_specialize=["hs", "ws"])
def direct_dx(
    features, weights, biases, masks, heights, widths, channels, row0s, indices, ends, gradients,
    target, hs, ws, rows, total, grad, scale,
    D: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the features. One program: BC channels of one tile of one stage.

    Registers: dx [BH BW, BC], p and t [BH BW, BN]. Moves: x in, dx out, 12 bytes a row in, W and the target from cache.
    """
    stage, first = locate(ends, tl.program_id(0))
    x, weight, h, w, C = (
        pick(features, stage), pick(weights, stage), pick(heights, stage), pick(widths, stage), pick(channels, stage),
    )  # fmt: skip
    bias = None if biases is None else pick(biases, stage)
    valid = None if masks is None else pick(masks, stage)
    blocks = tl.cdiv(C, BC)
    tile = (tl.program_id(0) - first) // blocks
    c = (tl.program_id(0) - first) % blocks * BC + tl.arange(0, BC)
    image, i, j, inside, row = tile_pixels(tile, h, w, BH, BW)
    token, down, right, fy, fx = taps(image, i, j, h, w, hs, ws)
    r, k = row_factors(rows + pick(row0s, stage), total, valid, row, inside)
    dx = tl.zeros([BH * BW, BC], tl.float32)
    for d0 in range(0, D, BN):
        d = d0 + tl.arange(0, BN)
        p = project(x, weight, bias, row, inside, d, C, D, BK, PRECISION)
        t = interpolate(target, token, down, right, fy, fx, inside, d, D, d < D)
        dp = (r[:, None] * t - k[:, None] * p).to(weight.dtype.element_ty)
        wd = tl.load(weight + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        dx = tl.dot(dp, wd, dx, input_precision=PRECISION)
    dx = -tl.load(grad) * tl.load(scale + pick(indices, stage)) * dx
    out = pick(gradients, stage)
    keep = inside[:, None] & (c < C)[None, :]
    tl.store(out + row[:, None] * C + c[None, :], dx.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["hs", "ws"])
def direct_dw(
    features, weights, biases, masks, heights, widths, channels, row0s, tiles, splits, partial0s, ends,
    target, hs, ws, rows, total, partials,
    D: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of weight and bias, [splits, D, C + 8] a stage (column C: the bias), but for the
    factor -grad * scale. One program: BN x BC of them over one split of the stage's tiles, in a fixed order.

    Registers: the partial [BN, BC], p and t [BH BW, BN]. Moves: x in for each block of D, W and the target from cache.
    """
    stage, first = locate(ends, tl.program_id(0))
    x, weight, h, w, C = (
        pick(features, stage), pick(weights, stage), pick(heights, stage), pick(widths, stage), pick(channels, stage),
    )  # fmt: skip
    bias = None if biases is None else pick(biases, stage)
    valid = None if masks is None else pick(masks, stage)
    blocks = tl.cdiv(C, BC)
    block = (tl.program_id(0) - first) % blocks
    rest = (tl.program_id(0) - first) // blocks
    d = rest % tl.cdiv(D, BN) * BN + tl.arange(0, BN)
    split = rest // tl.cdiv(D, BN)
    c = block * BC + tl.arange(0, BC)
    dw = tl.zeros([BN, BC], tl.float32)
    db = tl.zeros([BN], tl.float32)
    for tile in range(split, pick(tiles, stage), pick(splits, stage)):
        image, i, j, inside, row = tile_pixels(tile, h, w, BH, BW)
        token, down, right, fy, fx = taps(image, i, j, h, w, hs, ws)
        r, k = row_factors(rows + pick(row0s, stage), total, valid, row, inside)
        p = project(x, weight, bias, row, inside, d, C, D, BK, PRECISION)
        t = interpolate(target, token, down, right, fy, fx, inside, d, D, d < D)
        dp = r[:, None] * t - k[:, None] * p
        db += tl.sum(dp, 0)
        xs = tl.load(x + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        dw = tl.dot(tl.trans(dp.to(xs.dtype)), xs, dw, input_precision=PRECISION)
    out = partials + pick(partial0s, stage) + (split * D + d).to(tl.int64) * (C + PAD)
    tl.store(out[:, None] + c[None, :], dw, mask=(d < D)[:, None] & (c < C)[None, :])
    tl.store(out + C, db, mask=(d < D) & (block == 0))
