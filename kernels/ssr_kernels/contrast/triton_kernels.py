"""Triton kernels of the contrastive loss: rows i in blocks of BM against columns j, the same rows, in blocks of BN.

x [n, D] goes into the products as it is, so that bfloat16 loses nothing; the inverse norms come in afterwards, in
float32. Scores carry the factor log2(e) / temperature, for exp2; lse in `rows` is the natural one. D is padded to DP, a
power of two. `span` is the number of columns of a split, a multiple of BN.
"""

import triton
import triton.language as tl

from . import reference

EPS = tl.constexpr(reference.EPS)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-3.0e38)
"""Less than any score, and finite: FLOOR - FLOOR is 0."""


@triton.jit
def tile(x, first, left, r, d, D: tl.constexpr):
    """Numbers d of the rows first + r; 0 outside, where r is `left` or more."""
    keep = (r < left)[:, None] & (d < D)[None, :]
    return tl.load(x + tl.cast(first, tl.int64) * D + (r[:, None] * D + d[None, :]), mask=keep, other=0.0)


@triton.jit
def products(
    x, x_i, i0, x_j, j0, n,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i.x_j, float32 [BM, BN]: of the tiles where BK covers a row, else of blocks of BK numbers, read here."""
    if BK >= DP:
        return tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
    else:
        s = tl.zeros([BM, BN], tl.float32)
        for d0 in range(0, DP, BK):
            d = d0 + tl.arange(0, BK)
            rows = tile(x, i0, n - i0, tl.arange(0, BM), d, D)
            columns = tile(x, j0, n - j0, tl.arange(0, BN), d, D)
            s = tl.dot(rows, tl.trans(columns), s, input_precision=PRECISION)
        return s


@triton.jit
def ids(group, klass, row, inside, NONE: tl.constexpr):
    """Group and class of these rows, NONE where there is none; rows and columns have unlike NONEs, both negative."""
    g = tl.load(group + row, mask=inside, other=-1)
    k = tl.load(klass + row, mask=inside, other=-1)
    return tl.where(g < 0, NONE, g), tl.where((g < 0) | (k < 0), NONE, k)


@triton.jit
def relation(g_i, k_i, i, g_j, k_j, j):
    """Which pairs are positive, and which are positive or negative, [BM, BN] each."""
    other = i[:, None] != j[None, :]
    positive = ((g_i[:, None] == g_j[None, :]) | (k_i[:, None] == k_j[None, :])) & other
    known = (k_i[:, None] | k_j[None, :]) >= 0
    return positive, positive | (known & other)


@triton.jit(do_not_specialize=["n"])
def inverse_norms(x, rows, n, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """1 / |x| into rows [0]; 0 where |x| <= EPS. One program: BM rows. Moves: x in, 4 bytes a row out."""
    i0 = tl.program_id(0) * BM
    i = i0 + tl.arange(0, BM)
    inside = i < n
    x_i = tile(x, i0, n - i0, tl.arange(0, BM), tl.arange(0, DP), D).to(tl.float32)
    norm = tl.sqrt(tl.sum(x_i * x_i, 1))
    tl.store(rows + i, tl.where(norm <= EPS, 0.0, 1 / norm), mask=inside)  # NaN stays NaN


@triton.jit(do_not_specialize=["n", "span", "temperature"])
def row_sums(
    x, group, klass, rows, partials, n, span, temperature,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials [5, splits, n] of each row over its split's columns: the highest score of a partner, the sum of
    exp2(score - highest), the sum of the positives' scores, the numbers of positives and of partners.

    One program: BM rows, one split. Registers: scores [BM, BN], five numbers a row; shared memory: x of its rows and of
    BN columns. Moves: x of its rows in, x of its columns from cache, 12 bytes a row and column in, 20 bytes a row out.
    """
    blocks = tl.cdiv(n, BM)
    split = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * BM
    i = i0 + tl.arange(0, BM)
    in_i = i < n
    g_i, k_i = ids(group, klass, i, in_i, -1)
    inverse_i = tl.load(rows + i, mask=in_i, other=0.0) * (LOG2E / temperature)
    x_i = tile(x, i0, n - i0, tl.arange(0, BM), tl.arange(0, DP), D) if BK >= DP else None
    highest = tl.full([BM], FLOOR, tl.float32)
    total = tl.zeros([BM], tl.float32)
    positive_sum = tl.zeros([BM], tl.float32)
    positives = tl.zeros([BM], tl.int32)
    partners = tl.zeros([BM], tl.int32)
    for j0 in range(split * span, tl.minimum(split * span + span, n), BN):
        j = j0 + tl.arange(0, BN)
        in_j = j < n
        x_j = tile(x, j0, n - j0, tl.arange(0, BN), tl.arange(0, DP), D) if BK >= DP else None
        s = products(x, x_i, i0, x_j, j0, n, D, DP, BM, BN, BK, PRECISION)
        g_j, k_j = ids(group, klass, j, in_j, -2)
        positive, paired = relation(g_i, k_i, i, g_j, k_j, j)
        s = s * inverse_i[:, None] * tl.load(rows + j, mask=in_j, other=0.0)[None, :]
        positive_sum += tl.sum(tl.where(positive, s, 0.0), 1)
        s = tl.where(paired, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        highest = higher
        counts = tl.sum(positive.to(tl.int32) + paired.to(tl.int32) * 65536, 1)  # two sums in one: BN < 65536
        positives += counts & 65535
        partners += counts >> 16
    splits = tl.num_programs(0) // blocks
    out = partials + (split * n + i).to(tl.int64)
    step = (splits * n).to(tl.int64)
    tl.store(out, highest, mask=in_i)
    tl.store(out + step, total, mask=in_i)
    tl.store(out + 2 * step, positive_sum, mask=in_i)
    tl.store(out + 3 * step, positives.to(tl.float32), mask=in_i)
    tl.store(out + 4 * step, partners.to(tl.float32), mask=in_i)


@triton.jit(do_not_specialize=["n", "splits"])
def loss_sum(partials, rows, loss, scale, n, splits, BLOCK: tl.constexpr):
    """lse and 1 / number of positives into rows [1] and [2], the loss, and 1 / number of counted rows as its scale.

    One program, in a fixed order. Moves: 20 bytes a row and split in, 8 bytes a row out.
    """
    losses = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    step = (splits * n).to(tl.int64)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < n
        highest = tl.full([BLOCK], FLOOR, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        positive_sum = tl.zeros([BLOCK], tl.float32)
        positives = tl.zeros([BLOCK], tl.float32)
        partners = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            part = partials + (split * n + i).to(tl.int64)
            found = tl.load(part, mask=inside, other=FLOOR)
            higher = tl.maximum(highest, found)
            total = total * tl.exp2(highest - higher)
            total += tl.load(part + step, mask=inside, other=0.0) * tl.exp2(found - higher)
            highest = higher
            positive_sum += tl.load(part + 2 * step, mask=inside, other=0.0)
            positives += tl.load(part + 3 * step, mask=inside, other=0.0)
            partners += tl.load(part + 4 * step, mask=inside, other=0.0)
        counted = (positives > 0) & (partners > positives)
        lse = (highest + tl.log2(total)) * LN2
        losses += tl.where(counted, lse - positive_sum / positives * LN2, 0.0)
        count += counted.to(tl.float32)
        tl.store(rows + n + i, tl.where(counted, lse, float("inf")), mask=inside)
        tl.store(rows + 2 * n + i, tl.where(counted, 1 / positives, 0.0), mask=inside)
    factor = 1 / tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(scale, factor)
    tl.store(loss, tl.sum(losses, 0) * factor)


@triton.jit(do_not_specialize=["n", "span", "temperature"])
def row_gradients(
    x, group, klass, rows, partials, n, span, temperature,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials [splits, n, D]: gradient of the directions by each split, but for grad * scale / temperature.

    One program: BM rows, one split. Registers: the gradient [BM, DP], scores [BM, BN]; shared memory: x of its rows and
    of BN columns. Moves: x of its rows in, x of its columns from cache, 20 bytes a row and column in, 4 D a row out.
    """
    blocks = tl.cdiv(n, BM)
    split = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * BM
    i = i0 + tl.arange(0, BM)
    in_i = i < n
    d = tl.arange(0, DP)
    g_i, k_i = ids(group, klass, i, in_i, -1)
    inverse_i = tl.load(rows + i, mask=in_i, other=0.0) * (LOG2E / temperature)
    lse_i = tl.load(rows + n + i, mask=in_i, other=float("inf")) * LOG2E
    share_i = tl.load(rows + 2 * n + i, mask=in_i, other=0.0)
    x_i = tile(x, i0, n - i0, tl.arange(0, BM), d, D) if BK >= DP else None
    de = tl.zeros([BM, DP], tl.float32)
    for j0 in range(split * span, tl.minimum(split * span + span, n), BN):
        j = j0 + tl.arange(0, BN)
        in_j = j < n
        x_j = tile(x, j0, n - j0, tl.arange(0, BN), d, D)
        s = products(x, x_i, i0, x_j, j0, n, D, DP, BM, BN, BK, PRECISION)
        g_j, k_j = ids(group, klass, j, in_j, -2)
        positive, paired = relation(g_i, k_i, i, g_j, k_j, j)
        inverse_j = tl.load(rows + j, mask=in_j, other=0.0)
        lse_j = tl.load(rows + n + j, mask=in_j, other=float("inf")) * LOG2E
        share_j = tl.load(rows + 2 * n + j, mask=in_j, other=0.0)
        s = s * inverse_i[:, None] * inverse_j[None, :]
        both = tl.where(paired, tl.exp2(s - lse_i[:, None]) + tl.exp2(s - lse_j[None, :]), 0.0)
        both -= tl.where(positive, share_i[:, None] + share_j[None, :], 0.0)
        de = tl.dot((both * inverse_j[None, :]).to(x_j.dtype), x_j, de, input_precision=PRECISION)
    keep = in_i[:, None] & (d < D)[None, :]
    tl.store(partials + (split * n + i).to(tl.int64)[:, None] * D + d[None, :], de, mask=keep)


@triton.jit(do_not_specialize=["n", "splits", "temperature"])
def gradient_sums(
    x, rows, grad, scale, partials, out, n, splits, temperature, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr
):
    """Gradient of x [n, D] from the splits' partials, added in a fixed order.

    One program: BM rows. Moves: x and the partials in, the gradient out.
    """
    i0 = tl.program_id(0) * BM
    i = i0 + tl.arange(0, BM)
    inside = i < n
    d = tl.arange(0, DP)
    keep = inside[:, None] & (d < D)[None, :]
    de = tl.zeros([BM, DP], tl.float32)
    for split in range(splits):
        de += tl.load(partials + (split * n + i).to(tl.int64)[:, None] * D + d[None, :], mask=keep, other=0.0)
    inverse = tl.load(rows + i, mask=inside, other=0.0)
    e = tile(x, i0, n - i0, tl.arange(0, BM), d, D).to(tl.float32) * inverse[:, None]
    across = de - e * tl.sum(e * de, 1)[:, None]  # what moves along e leaves the direction as it is
    dx = across * (inverse * (tl.load(grad) * tl.load(scale) / temperature))[:, None]
    tl.store(out + i.to(tl.int64)[:, None] * D + d[None, :], dx.to(out.dtype.element_ty), mask=keep)
