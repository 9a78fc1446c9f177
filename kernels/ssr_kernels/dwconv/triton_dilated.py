"""Triton kernels of several dilated depthwise 3x3 convolutions of one map, whose branches share every read of it.

The taps lie `dilation` pixels apart, so a program reads them anew for each row; those of neighbouring rows and programs
are in cache.
"""

import triton
import triton.language as tl

from .triton_common import nine, offsets, place, tile


@triton.jit(do_not_specialize=["H", "W", "rows"])
def dilated_forward(
    x, weights, outs, H, W, rows,
    DILATIONS: tl.constexpr, C: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """outs[f] = dilated dw3x3 of x with weights[f]. One program: `rows` rows, TW columns, BC channels.

    Registers: an accumulator [TW, BC] and a filter of a branch. Moves: x in, the branches' results out.
    """
    image, row0, end, strip, _, c0 = place(H, tl.cdiv(W, TW), rows, C, BC)
    w, c = strip * TW + tl.arange(0, TW), c0 + tl.arange(0, BC)
    base = image.to(tl.int64) * H * W * C
    keep = (w < W)[:, None] & (c < C)[None, :]
    for row in range(row0, end):
        middle = tile(x + base, row, w, c, H, W, C)
        for f in tl.static_range(len(weights)):
            k = nine(weights[f], c, C)
            total = middle * k[4][None, :]
            for tap in tl.static_range(9):
                if tap != 4:
                    part = tile(
                        x + base, row + (tap // 3 - 1) * DILATIONS[f], w + (tap % 3 - 1) * DILATIONS[f], c, H, W, C
                    )
                    total += part * k[tap][None, :]
            at = outs[f] + base + offsets(row, w, c, W, C)
            tl.store(at, total.to(outs[f].dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def dilated_dx(
    grads, weights, dx, H, W, rows,
    DILATIONS: tl.constexpr, C: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = the sum over the branches. One program: `rows` rows, TW columns, BC channels.

    Registers: an accumulator [TW, BC] and a filter of a branch. Moves: the branches' gradients in, dx out.
    """
    image, row0, end, strip, _, c0 = place(H, tl.cdiv(W, TW), rows, C, BC)
    w, c = strip * TW + tl.arange(0, TW), c0 + tl.arange(0, BC)
    base = image.to(tl.int64) * H * W * C
    keep = (w < W)[:, None] & (c < C)[None, :]
    for row in range(row0, end):
        total = tl.zeros([TW, BC], tl.float32)
        for f in tl.static_range(len(weights)):
            k = nine(weights[f], c, C)
            for tap in tl.static_range(9):
                part = tile(
                    grads[f] + base, row + (1 - tap // 3) * DILATIONS[f], w + (1 - tap % 3) * DILATIONS[f], c, H, W, C
                )
                total += part * k[tap][None, :]
        tl.store(dx + base + offsets(row, w, c, W, C), total.to(dx.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def dilated_dw(
    grads, x, partials, H, W, rows,
    DILATIONS: tl.constexpr, C: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partials [programs of the same channels, 9 branches, C]: gradients of the filters' elements.

    One program: `rows` rows, TW columns, BC channels, branch after branch. Registers: nine accumulators [TW, BC].
    Moves: x and the branches' gradients in; x for the second branch and the third from cache.
    """
    image, row0, end, strip, here, c0 = place(H, tl.cdiv(W, TW), rows, C, BC)
    w, c = strip * TW + tl.arange(0, TW), c0 + tl.arange(0, BC)
    base = image.to(tl.int64) * H * W * C
    zero = tl.zeros([TW, BC], tl.float32)
    for f in tl.static_range(len(grads)):
        dk0, dk1, dk2, dk3, dk4, dk5, dk6, dk7, dk8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for row in range(row0, end):
            dy = tile(grads[f] + base, row, w, c, H, W, C)
            dk0 += dy * tile(x + base, row - DILATIONS[f], w - DILATIONS[f], c, H, W, C)
            dk1 += dy * tile(x + base, row - DILATIONS[f], w, c, H, W, C)
            dk2 += dy * tile(x + base, row - DILATIONS[f], w + DILATIONS[f], c, H, W, C)
            dk3 += dy * tile(x + base, row, w - DILATIONS[f], c, H, W, C)
            dk4 += dy * tile(x + base, row, w, c, H, W, C)
            dk5 += dy * tile(x + base, row, w + DILATIONS[f], c, H, W, C)
            dk6 += dy * tile(x + base, row + DILATIONS[f], w - DILATIONS[f], c, H, W, C)
            dk7 += dy * tile(x + base, row + DILATIONS[f], w, c, H, W, C)
            dk8 += dy * tile(x + base, row + DILATIONS[f], w + DILATIONS[f], c, H, W, C)
        at = partials + (here.to(tl.int64) * len(grads) + f) * 9 * C + c
        tl.store(at, tl.sum(dk0, 0), mask=c < C)
        tl.store(at + C, tl.sum(dk1, 0), mask=c < C)
        tl.store(at + 2 * C, tl.sum(dk2, 0), mask=c < C)
        tl.store(at + 3 * C, tl.sum(dk3, 0), mask=c < C)
        tl.store(at + 4 * C, tl.sum(dk4, 0), mask=c < C)
        tl.store(at + 5 * C, tl.sum(dk5, 0), mask=c < C)
        tl.store(at + 6 * C, tl.sum(dk6, 0), mask=c < C)
        tl.store(at + 7 * C, tl.sum(dk7, 0), mask=c < C)
        tl.store(at + 8 * C, tl.sum(dk8, 0), mask=c < C)
