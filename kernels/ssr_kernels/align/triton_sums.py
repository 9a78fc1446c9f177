"""Triton kernels of align's sums over rows: the loss, and what the Gram form's gradient of weight and bias is made of.

Each sum is split over programs that write partial sums, and a last kernel adds these in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .triton_common import PAD, locate, pick, row_factors


@triton.jit
def loss_sums(partials, tile_ends, shares, loss, scale, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """loss = sum of share * sum valid (1 - cos) / sum valid, and scale = share / sum valid, 0 where nothing is valid.

    One program in all. Moves: the tiles' sums [tiles, 2] in, stages + 1 numbers out.
    """
    value = 0.0
    first = 0
    for stage in tl.static_range(STAGES):
        distance = tl.zeros([BLOCK], tl.float32)
        valid = tl.zeros([BLOCK], tl.float32)
        for start in range(first, tile_ends[stage], BLOCK):
            tile = start + tl.arange(0, BLOCK)
            distance += tl.load(partials + 2 * tile, mask=tile < tile_ends[stage], other=0.0)
            valid += tl.load(partials + 2 * tile + 1, mask=tile < tile_ends[stage], other=0.0)
        count = tl.sum(valid, 0)
        factor = tl.where(count > 0, shares[stage] / tl.where(count > 0, count, 1.0), 0.0)
        value += tl.sum(distance, 0) * factor
        tl.store(scale + stage, factor)
        first = tile_ends[stage]
    tl.store(loss, value)


@triton.jit
def moments(
    features, masks, channels, counts, row0s, splits, partial0s, ends, rows, total, partials,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of k [x, 1] [x, 1]^T over the rows of a stage, [splits, C + 1, C + 8]. One program: BC x BC of them
    over one split of the rows, in a fixed order.

    Registers: the partial [BC, BC]. Moves: x in, once for each pair of column blocks (from cache but once).
    """
    stage, first = locate(ends, tl.program_id(0))
    x, C, count = pick(features, stage), pick(channels, stage), pick(counts, stage)
    valid = None if masks is None else pick(masks, stage)
    blocks = tl.cdiv(C, BC)
    left = (tl.program_id(0) - first) % blocks
    right = (tl.program_id(0) - first) // blocks % blocks
    split = (tl.program_id(0) - first) // (blocks * blocks)
    cl = left * BC + tl.arange(0, BC)
    cr = right * BC + tl.arange(0, BC)
    products = tl.zeros([BC, BC], tl.float32)
    sums = tl.zeros([BC], tl.float32)
    ones = tl.zeros([BR], tl.float32)
    for start in range(split * BR, count, pick(splits, stage) * BR):
        row = start + tl.arange(0, BR).to(tl.int64)
        inside = row < count
        _, k = row_factors(rows + pick(row0s, stage), total, valid, row, inside)
        xl = tl.load(x + row[:, None] * C + cl[None, :], mask=inside[:, None] & (cl < C)[None, :], other=0.0)
        xr = tl.load(x + row[:, None] * C + cr[None, :], mask=inside[:, None] & (cr < C)[None, :], other=0.0)
        kx = k[:, None] * xl.to(tl.float32)
        products = tl.dot(tl.trans(kx), xr.to(tl.float32), products, input_precision=PRECISION)
        sums += tl.sum(kx, 0)
        ones += k
    out = partials + pick(partial0s, stage) + (split * (C + 1)).to(tl.int64) * (C + PAD)
    keep = (cl < C)[:, None] & (cr < C)[None, :]
    tl.store(out + cl[:, None] * (C + PAD) + cr[None, :], products, mask=keep)
    if right == 0:
        tl.store(out + cl * (C + PAD) + C, sums, mask=cl < C)
        tl.store(out + C * (C + PAD) + cl, sums, mask=cl < C)
        if left == 0:
            tl.store(out + C * (C + PAD) + C, tl.sum(ones, 0))


@triton.jit(do_not_specialize=["count"])
def token_sums(
    ys, channels, splits, partial0s, ends, target, count, partials,
    D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of T^T y over the tokens, [splits, D, C + 8] a stage. One program: BN x BC of them over one split of
    the tokens, in a fixed order.

    Registers: the partial [BN, BC]. Moves: the target and y in, from cache beyond the first block.
    """
    stage, first = locate(ends, tl.program_id(0))
    y, C = pick(ys, stage), pick(channels, stage)
    blocks = tl.cdiv(C, BC)
    block = (tl.program_id(0) - first) % blocks
    rest = (tl.program_id(0) - first) // blocks
    d = rest % tl.cdiv(D, BN) * BN + tl.arange(0, BN)
    split = rest // tl.cdiv(D, BN)
    c = block * BC + tl.arange(0, BC)
    products = tl.zeros([BN, BC], tl.float32)
    last = tl.zeros([BN], tl.float32)
    for start in range(split * BR, count, pick(splits, stage) * BR):
        m = start + tl.arange(0, BR).to(tl.int64)
        inside = m < count
        ts = tl.load(target + m[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        t = ts.to(tl.float32)
        at = y + m * (C + PAD)
        ym = tl.load(at[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        products = tl.dot(tl.trans(t), ym, products, input_precision=PRECISION)
        last += tl.sum(t * tl.load(at + C, mask=inside, other=0.0)[:, None], 0)
    out = partials + pick(partial0s, stage) + (split * D + d).to(tl.int64) * (C + PAD)
    tl.store(out[:, None] + c[None, :], products, mask=(d < D)[:, None] & (c < C)[None, :])
    tl.store(out + C, last, mask=(d < D) & (block == 0))


@triton.jit
def weight_gradients(
    weights, biases, channels, splits, partial0s, moment_splits, moment0s, indices, ends, dws, dbs,
    partials, moment_partials, grad, scale,
    D: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW and db of every stage from the partial sums. One program: BN x BC of one stage's dW.

    A stage of the direct form (moment_splits 0): -grad * scale * their sum. Of the Gram form: the sum of T^T y, which
    holds that factor, less the factor times [W, b] S, S the sum of the moments. Registers: the block [BN, BC].
    """
    stage, first = locate(ends, tl.program_id(0))
    weight, C, count = pick(weights, stage), pick(channels, stage), pick(splits, stage)
    blocks = tl.cdiv(C, BC)
    block = (tl.program_id(0) - first) % blocks
    d = (tl.program_id(0) - first) // blocks * BN + tl.arange(0, BN)
    c = block * BC + tl.arange(0, BC)
    at = partials + pick(partial0s, stage) + d.to(tl.int64) * (C + PAD)
    keep = (d < D)[:, None] & (c < C)[None, :]
    dw = tl.zeros([BN, BC], tl.float32)
    db = tl.zeros([BN], tl.float32)
    for split in range(0, count):
        step = split * D * (C + PAD)
        dw += tl.load(at[:, None] + step + c[None, :], mask=keep, other=0.0)
        db += tl.load(at + step + C, mask=d < D, other=0.0)
    factor = -tl.load(grad) * tl.load(scale + pick(indices, stage))
    if pick(moment_splits, stage) == 0:
        dw *= factor
        db *= factor
    else:
        source = moment_partials + pick(moment0s, stage)
        ws, wv = _weight_times_moments(weight, source, pick(moment_splits, stage), d, c, C, D, BK, PRECISION)
        if biases is not None:
            b = tl.load(pick(biases, stage) + d, mask=d < D, other=0.0).to(tl.float32)
            v, one = _last_moments(source, pick(moment_splits, stage), c, C)
            ws += b[:, None] * v[None, :]
            wv += b * one
        dw -= factor * ws
        db -= factor * wv
    out = pick(dws, stage)
    tl.store(out + d[:, None] * C + c[None, :], dw.to(out.dtype.element_ty), mask=keep)
    if dbs is not None:
        last = pick(dbs, stage)
        tl.store(last + d, db.to(last.dtype.element_ty), mask=(d < D) & (block == 0))


@triton.jit
def _weight_times_moments(weight, source, splits, d, c, C, D, BK: tl.constexpr, PRECISION: tl.constexpr):
    """(W S)[d, c] and (W v)[d], S and v the sums of the moments' partials."""
    product = tl.zeros([d.shape[0], c.shape[0]], tl.float32)
    vector = tl.zeros([d.shape[0]], tl.float32)
    for e0 in range(0, C, BK):
        e = e0 + tl.arange(0, BK)
        wd = tl.load(weight + d[:, None] * C + e[None, :], mask=(d < D)[:, None] & (e < C)[None, :], other=0.0)
        wd = wd.to(tl.float32)
        s = tl.zeros([BK, c.shape[0]], tl.float32)
        v = tl.zeros([BK], tl.float32)
        for split in range(0, splits):
            at = source + (split * (C + 1) + e) * (C + PAD)
            s += tl.load(at[:, None] + c[None, :], mask=(e < C)[:, None] & (c < C)[None, :], other=0.0)
            v += tl.load(at + C, mask=e < C, other=0.0)
        product = tl.dot(wd, s, product, input_precision=PRECISION)
        vector += tl.sum(wd * v[None, :], 1)
    return product, vector


@triton.jit
def _last_moments(source, splits, c, C):
    """v[c] and the sum of k."""
    v = tl.zeros([c.shape[0]], tl.float32)
    one = 0.0
    for split in range(0, splits):
        at = source + (split * (C + 1) + C) * (C + PAD)
        v += tl.load(at + c, mask=c < C, other=0.0)
        one += tl.load(at + C)
    return v, one
