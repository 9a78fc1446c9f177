"""Triton kernels of the segmentation loss and of pseudo-labels: BP pixels of one row times all classes.

Logits [B, h, w, K] are read where they are used, from cache, and upsampled in registers, in float32, columns before
rows: no map of [B, K, height, width] exists. sy = h / height and sx = w / width are the steps of the upsampling,
computed by the host. A bilinear tap is a lower pixel and the weight of the upper one.

K is padded to KR * KL, powers of two. A tile is [BP, KR, KL]: the compiler gives KL neighbouring threads a pixel and
each of them KR classes, so that what is computed once a pixel is repeated in KL threads, not in K.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tap(position, step, coarse):
    """Lower pixel and weight of the upper one, as ATen's align_corners False; weight 0 where there is no upper."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), coarse - 1)
    return low, tl.where(low < coarse - 1, source - low.to(tl.float32), 0.0)


@triton.jit
def share(pixel, low, upper):
    """The weight of a pixel in a bilinear tap."""
    return tl.where(low == pixel, 1 - upper, tl.where(low + 1 == pixel, upper, 0.0))


@triton.jit
def first(pixel, fine, coarse):
    """The first of the fine positions to which a pixel of the coarse ones may contribute."""
    return (tl.maximum((2 * pixel - 1) * fine - coarse, 0) + 2 * coarse - 1) // (2 * coarse)


@triton.jit
def classes(KR: tl.constexpr, KL: tl.constexpr):
    """The class of each place of a tile, [1, KR, KL]."""
    return tl.arange(0, KR)[None, :, None] * KL + tl.arange(0, KL)[None, None, :]


@triton.jit
def across(logits, image, y, x, upper, inside, h, w, K: tl.constexpr, KR: tl.constexpr, KL: tl.constexpr):
    """Logits of row y between the columns x and x + 1, float32 [BP, KR, KL]; 0 where there is no class."""
    k = classes(KR, KL)
    keep = inside[:, None, None] & (k < K)
    row = logits + (image * h + y).to(tl.int64) * (w * K)
    right = tl.minimum(x + 1, w - 1)
    left_part = tl.load(row + (x[:, None, None] * K + k), mask=keep, other=0.0).to(tl.float32)
    right_part = tl.load(row + (right[:, None, None] * K + k), mask=keep, other=0.0).to(tl.float32)
    return (1 - upper)[:, None, None] * left_part + upper[:, None, None] * right_part


@triton.jit
def upsampled(logits, image, y, x, inside, h, w, sy, sx, K: tl.constexpr, KR: tl.constexpr, KL: tl.constexpr):
    """Logits of the pixels x of row y of the labels, float32 [BP, KR, KL]; -inf where there is no class."""
    y0, fy = tap(y, sy, h)
    x0, fx = tap(x, sx, w)
    top = across(logits, image, y0, x0, fx, inside, h, w, K, KR, KL)
    bottom = across(logits, image, tl.minimum(y0 + 1, h - 1), x0, fx, inside, h, w, K, KR, KL)
    return tl.where(classes(KR, KL) < K, (1 - fy) * top + fy * bottom, float("-inf"))


@triton.jit
def total(tile):
    """Sum over the classes, [BP]."""
    return tl.sum(tl.sum(tile, 2), 1)


@triton.jit
def targets(labels, weights, at, inside, ignore_index, K: tl.constexpr):
    """The class of each pixel and its weight, [BP]: -1 and 0 outside and where the label is no class."""
    label = tl.load(labels + at, mask=inside, other=0).to(tl.int64)
    known = inside & (label >= 0) & (label < K) & (label != ignore_index)
    if weights is None:
        weight = known.to(tl.float32)
    else:
        weight = tl.load(weights + at, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, label, -1).to(tl.int32), weight


@triton.jit(do_not_specialize=["h", "w", "height", "width", "sy", "sx", "ignore_index"])
def pixel_losses(
    logits, labels, weights, lse, partials, h, w, height, width, sy, sx, ignore_index,
    K: tl.constexpr, KR: tl.constexpr, KL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """lse of every pixel of the labels, and the sum of each program's losses into partials.

    One program: BP pixels of a row of the labels. Registers: their logits, a tile. Moves: 4 logits a pixel and class
    from cache, label and weight in, 4 bytes a pixel out.
    """
    blocks = tl.cdiv(width, BP)
    row = tl.program_id(0) // blocks
    x = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    inside = x < width
    at = row.to(tl.int64) * width + x
    u = upsampled(logits, row // height, row % height, x, inside, h, w, sy, sx, K, KR, KL)
    highest = tl.max(tl.max(u, 2), 1)
    above = tl.log2(total(tl.exp2((u - highest[:, None, None]) * LOG2E))) * LN2
    label, weight = targets(labels, weights, at, inside, ignore_index, K)
    own = total(tl.where(classes(KR, KL) == label[:, None, None], u, 0.0))
    tl.store(lse + at, highest + above, mask=inside)
    loss = tl.where(label >= 0, weight * ((highest - own) + above), 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(loss, 0))


@triton.jit(do_not_specialize=["length", "factor"])
def loss_sum(partials, loss, length, factor, BLOCK: tl.constexpr):
    """factor times the sum of the partials. One program, in a fixed order. Moves: 4 bytes a partial in."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + place, mask=place < length, other=0.0)
    tl.store(loss, tl.sum(sums, 0) * factor)


@triton.jit(do_not_specialize=["h", "w", "height", "width", "sy", "sx", "reach_y", "reach_x", "factor", "ignore_index"])
def logit_gradients(
    grad, logits, labels, weights, lse, out, h, w, height, width, sy, sx, reach_y, reach_x, factor, ignore_index,
    K: tl.constexpr, KR: tl.constexpr, KL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits: of each the sum over the pixels of the labels to which it contributes, times factor.

    These are at most reach_y rows and reach_x columns. One program: BP pixels of a row of the logits. Registers: their
    gradient, and the logits of three rows at one column of the labels, a tile each. Moves: 6 logits a column of the
    labels, pixel and class from cache; lse, label and weight of the labels' pixels four times, the gradient out.
    """
    blocks = tl.cdiv(w, BP)
    row = tl.program_id(0) // blocks
    image, i = row // h, row % h
    j = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    k = classes(KR, KL)
    y_first, x_first = first(i, height, h), first(j, width, w)
    rows = tl.minimum(reach_y, height - y_first)
    d = tl.zeros([BP, KR, KL], tl.float32)
    for step_x in range(reach_x):
        x = x_first + step_x
        x0, fx = tap(x, sx, w)
        share_x = share(j, x0, fx)
        inside = (j < w) & (x < width)
        top = across(logits, image, tl.maximum(i - 1, 0), x0, fx, inside, h, w, K, KR, KL)
        middle = across(logits, image, i, x0, fx, inside, h, w, K, KR, KL)
        bottom = across(logits, image, tl.minimum(i + 1, h - 1), x0, fx, inside, h, w, K, KR, KL)
        for step_y in range(rows):
            y = y_first + step_y
            y0, fy = tap(y, sy, h)
            share_y = share(i, y0, fy)
            u = share(i - 1, y0, fy) * top + share_y * middle + share(i + 1, y0, fy) * bottom
            both = share_x * share_y
            counts = inside & (both > 0)
            at = (image * height + y).to(tl.int64) * width + x
            z = tl.load(lse + at, mask=counts, other=float("inf"))  # exp(u - inf) is 0
            label, weight = targets(labels, weights, at, counts, ignore_index, K)
            p = tl.exp2((u - z[:, None, None]) * LOG2E)
            d += (both * weight)[:, None, None] * tl.where(k == label[:, None, None], p - 1, p)
    d *= tl.load(grad).to(tl.float32) * factor
    place = (row.to(tl.int64) * w + j)[:, None, None] * K + k
    tl.store(out + place, d.to(out.dtype.element_ty), mask=(j < w)[:, None, None] & (k < K))


@triton.jit(do_not_specialize=["h", "w", "height", "width", "sy", "sx", "threshold"])
def surest_classes(
    logits, labels, confidence, partials, h, w, height, width, sy, sx, threshold,
    K: tl.constexpr, KR: tl.constexpr, KL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The class of the highest logit of every pixel, its probability, and each program's number of sure pixels.

    One program: BP pixels of a row of the labels. Registers: their logits, a tile. Moves: 4 logits a pixel and class
    from cache, 5 bytes a pixel out.
    """
    blocks = tl.cdiv(width, BP)
    row = tl.program_id(0) // blocks
    x = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    inside = x < width
    at = row.to(tl.int64) * width + x
    u = upsampled(logits, row // height, row % height, x, inside, h, w, sy, sx, K, KR, KL)
    highest = tl.max(tl.max(u, 2), 1)
    at_top = tl.where(u == highest[:, None, None], classes(KR, KL), K - 1)  # NaN is nowhere: the last class
    label = tl.min(tl.min(at_top, 2), 1)
    sure = 1 / total(tl.exp2((u - highest[:, None, None]) * LOG2E))
    tl.store(labels + at, label.to(tl.uint8), mask=inside)
    tl.store(confidence + at, sure, mask=inside)
    tl.store(partials + tl.program_id(0), tl.sum((inside & (sure >= threshold)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["length"])
def count_sum(partials, count, length, BLOCK: tl.constexpr):
    """The sum of the partials, int64. One program. Moves: 4 bytes a partial in."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + place, mask=place < length, other=0).to(tl.int64)
    tl.store(count, tl.sum(sums, 0))
