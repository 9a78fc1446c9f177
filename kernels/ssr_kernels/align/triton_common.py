"""What the Triton kernels of align share: which stage and pixels a program owns, bilinear taps, tiles of a GEMM.

Every kernel serves all stages of a grouped call in one launch: what differs from stage to stage comes as a tuple, and a
program finds its stage from its number. Rows are dense [B h w, C]; a tile of them is a BH x BW patch of one image, so
that the target's tokens that its rows share are read from the first-level cache.
"""

import triton
import triton.language as tl

from . import forms, reference

EPS = tl.constexpr(reference.EPS)
PAD = tl.constexpr(forms.PAD)


@triton.jit
def pick(values, stage):
    """Entry `stage` of a tuple of equal types, as a value of the device (a 1 arrives as a constant)."""
    chosen = tl.where(stage >= 0, values[0], values[0])
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(stage == i, values[i], chosen)
    return chosen


@triton.jit
def locate(ends, program):
    """Stage that owns program `program` and the first program of that stage; `ends` are the stages' last plus one."""
    stage = 0
    first = 0
    for i in tl.static_range(len(ends) - 1):
        stage += (program >= ends[i]).to(tl.int32)
        first = tl.where(program >= ends[i], ends[i], first)
    return stage, first


@triton.jit
def tile_pixels(tile, h, w, BH: tl.constexpr, BW: tl.constexpr):
    """Image, pixel row and column [BH BW] of a tile, whether each is inside the image, and its row number (int64)."""
    across = tl.cdiv(w, BW)
    patches = tl.cdiv(h, BH) * across
    image = tile // patches
    patch = tile % patches
    inner = tl.arange(0, BH * BW)
    i = patch // across * BH + inner // BW
    j = patch % across * BW + inner % BW
    inside = (i < h) & (j < w)
    row = (image * h + i).to(tl.int64) * w + j
    return image, i, j, inside, row


@triton.jit
def tap(position, fine, coarse):
    """Lower sample and weight of the upper one, as ATen's align_corners False; weight 0 where there is no upper."""
    scale = coarse.to(tl.float32) / fine.to(tl.float32)  # ATen: float(coarse) / fine
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), coarse - 1)
    return low, tl.where(low < coarse - 1, source - low.to(tl.float32), 0.0)


@triton.jit
def taps(image, i, j, h, w, hs, ws):
    """Token at the upper left of each pixel (int64), the steps to its lower and right ones, and their weights."""
    y, fy = tap(i, h, hs)
    x, fx = tap(j, w, ws)
    token = (image * hs + y).to(tl.int64) * ws + x
    down = tl.where(y < hs - 1, ws, 0)
    right = tl.where(x < ws - 1, 1, 0)
    return token, down, right, fy, fx


@triton.jit
def interpolate(table, token, down, right, fy, fx, inside, columns, stride, columns_inside):
    """Bilinear mix, float32 [rows, columns], of four rows of a table of rows `stride` long; weight 0: unread."""
    keep = inside[:, None] & columns_inside[None, :]
    at = table + token[:, None] * stride + columns[None, :]
    below = (down * stride)[:, None]
    aside = (right * stride)[:, None]
    lower = (fy > 0)[:, None] & keep
    side = (fx > 0)[:, None]
    top = (1 - fx)[:, None] * tl.load(at, mask=keep, other=0.0).to(tl.float32)
    top += fx[:, None] * tl.load(at + aside, mask=keep & side, other=0.0).to(tl.float32)
    bottom = (1 - fx)[:, None] * tl.load(at + below, mask=lower, other=0.0).to(tl.float32)
    bottom += fx[:, None] * tl.load(at + below + aside, mask=lower & side, other=0.0).to(tl.float32)
    return (1 - fy)[:, None] * top + fy[:, None] * bottom


@triton.jit
def project(x, weight, bias, row, inside, d, C, D, BK: tl.constexpr, PRECISION: tl.constexpr):
    """p = x W^T + b of a tile for the target channels d: float32 [rows, len(d)]; bias None: no bias."""
    p = tl.zeros([row.shape[0], d.shape[0]], tl.float32)
    for c0 in range(0, C, BK):
        c = c0 + tl.arange(0, BK)
        xs = tl.load(x + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        ws = tl.load(weight + d[None, :] * C + c[:, None], mask=(d < D)[None, :] & (c < C)[:, None], other=0.0)
        p = tl.dot(xs, ws, p, input_precision=PRECISION)
    if bias is not None:
        p += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return p


@triton.jit
def mask_values(valid, row, inside):
    """Weight of each row, float32: that of the mask, or 1; 0 outside the image."""
    if valid is None:
        return inside.to(tl.float32)
    else:
        return tl.load(valid + row, mask=inside, other=0).to(tl.float32)


@triton.jit
def finish_rows(pt, pp, tt, valid, row, inside, rows, total, partials, tile):
    """cos, 1 / |p|, 1 / |t| of each row into rows [3, total]; its tile's sums valid (1 - cos), valid into partials."""
    inverse_p = 1 / tl.maximum(tl.sqrt(tl.maximum(pp, 0.0)), EPS)
    inverse_t = 1 / tl.maximum(tl.sqrt(tl.maximum(tt, 0.0)), EPS)
    cos = pt * inverse_p * inverse_t
    tl.store(rows + row, cos, mask=inside)
    tl.store(rows + total + row, inverse_p, mask=inside)
    tl.store(rows + 2 * total + row, inverse_t, mask=inside)
    weight = mask_values(valid, row, inside)
    tl.store(partials + 2 * tile, tl.sum(tl.where(inside, weight * (1 - cos), 0.0), 0))
    tl.store(partials + 2 * tile + 1, tl.sum(weight, 0))


@triton.jit
def row_factors(rows, total, valid, row, inside):
    """r = valid / (|p| |t|) and k = valid cos / |p|^2 of each row (k 0 under the bound of |p|).

    p's gradient is r t - k p, but for the factor -grad * scale.
    """
    cos = tl.load(rows + row, mask=inside, other=0.0)
    inverse_p = tl.load(rows + total + row, mask=inside, other=0.0)
    inverse_t = tl.load(rows + 2 * total + row, mask=inside, other=0.0)
    weight = mask_values(valid, row, inside)
    k = tl.where(inverse_p >= 1 / EPS, 0.0, weight * cos * inverse_p * inverse_p)
    return weight * inverse_p * inverse_t, k
