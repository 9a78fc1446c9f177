"""SAM's attention without attention maps, in several forms that compute the same.

segment-anything adds rel_h[row of the key] + rel_w[column of the key] to the score of a query, where rel_h and rel_w
are the query's products with tables of relative positions, and stores the map of all scores several times. Here:

- low_rank: q' = [q, rel_h, rel_w] and k' = [k, one-hot row, one-hot column]: q'.k' is the biased score, exactly, so any
  fused kernel computes it and the bias is never stored. A score costs as many channels more as a map has rows and
  columns.
- flex: FlexAttention adds rel_h and rel_w to each score inside the kernel that it generates. No further channels; two
  loads a score. Must be compiled.
- mask: PyTorch's fused attention with the bias as a stored mask, N x N numbers a head: 403 MB in bfloat16 in a global
  block of ViT-B at 1024. Runs everywhere; a yardstick.
- xformers: its CUTLASS kernel with the same stored bias; needs a GPU and the package.

What the kernels of PyTorch 2.11 take (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) decides the widths.
FlashAttention: q, k and v of one width, a multiple of 8 (else PyTorch copies all three), at most 256. cuDNN's, which
PyTorch prefers on an H100: v of a width of its own, each a multiple of 8, at most 256 there and 128 elsewhere. CUTLASS:
likewise, any width. The CPU's: one width. So tables are padded to multiples of 8 and v is widened only where it must.

G windows (or images, in a global block), n tokens of one, H W tokens of an image's map, N = H * W, d channels a head,
R S the (padded) numbers of rows and columns of a window, C channels.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("low_rank", "flex", "mask", "xformers")


class Layout(NamedTuple):
    """Where the tokens of a map stand in attention: the same for every image and every block of a kind."""

    window: tuple[int, int]
    """Rows and columns of a window; of the whole map in a global block."""
    windows: int
    """In an image."""
    keys: Tensor | None
    """[N', or N where nothing is padded]: the token in each place of the windows, N for padding; None: global."""
    queries: Tensor | None
    """The same with some token of the map in place of padding."""
    places: Tensor | None
    """[N]: the place of each token in the windows."""
    one_hot: Tensor
    """[n, R + S]: row and column of each key."""
    wide_value: bool
    """Whether the fused kernel wants v as wide as q'."""


class Tables(NamedTuple):
    """What one block knows of relative positions, laid out for a product with every query of a map."""

    rows: Tensor
    """[H, d, R]."""
    columns: Tensor
    """[W * heads, d, S]."""


def make_layout(height: int, width: int, window: int, head: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of a map of height x width tokens.

    Args:
        window: side of the square windows; 0: one window, the map.
        head: d.
        dtype, device: of the activations.
    """
    rows, columns = (window, window) if window else (height, width)
    one_hot = torch.cat(
        [
            torch.eye(rows, _padded(rows), device=device).repeat_interleave(columns, 0, output_size=rows * columns),
            torch.eye(columns, _padded(columns), device=device).repeat(rows, 1),
        ],
        dim=1,
    ).to(dtype)
    wide = not _takes_narrow_values(head + one_hot.shape[1], dtype, device)
    if not window:
        return Layout((rows, columns), 1, None, None, None, one_hot, wide)
    down, across = math.ceil(height / window), math.ceil(width / window)
    y = torch.arange(down * window, device=device).view(down, 1, window, 1)
    x = torch.arange(across * window, device=device).view(1, across, 1, window)
    keys = torch.where((y < height) & (x < width), y * width + x, height * width).flatten()
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    number = (y // window) * across + x // window
    places = (number * window**2 + (y % window) * window + x % window).flatten()
    queries = keys.clamp(max=height * width - 1)
    return Layout((rows, columns), down * across, keys, queries, places, one_hot, wide)


def _padded(count: int) -> int:
    return -(-count // 8) * 8


def _takes_narrow_values(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the fused kernel that PyTorch will choose takes v narrower than q and k, see above."""
    if device.type != "cuda":
        return False
    if dtype == torch.float32:
        return True  # CUTLASS
    return width <= {(9, 0): 256, (10, 0): 128}.get(torch.cuda.get_device_capability(device), 0)  # cuDNN


def make_tables(
    rel_pos: tuple[Tensor, Tensor], size: tuple[int, int], layout: Layout, heads: int, divisor: float
) -> Tables:
    """The tables of a block for a map of (H, W) tokens.

    Args:
        rel_pos: segment-anything's rel_pos_h and rel_pos_w, [2 L - 1, d] each.
        divisor: what the products are divided by, see `relative_divisor`.
    """
    (height, width), (rows, columns) = size, layout.window
    dtype = rel_pos[0].dtype
    offsets = [_relative(table, side) / divisor for table, side in zip(rel_pos, layout.window, strict=True)]
    of_rows, of_columns = (F.pad(one, (0, _padded(one.shape[2]) - one.shape[2])).to(dtype) for one in offsets)
    repeats = math.ceil(height / rows), math.ceil(width / columns)
    every_row = of_rows.repeat(repeats[0], 1, 1)[:height]
    every_column = of_columns.repeat(repeats[1], 1, 1)[:width]
    return Tables(every_row, every_column.repeat_interleave(heads, 0, output_size=width * heads))


def _relative(table: Tensor, side: int) -> Tensor:
    """[2 L - 1, d] -> float32 or wider [side, d, side]: the table's vector from each place to each other one.

    A table of another size is interpolated linearly, as segment-anything does (get_rel_pos).
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    if table.shape[0] != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1].transpose(1, 2)


def relative_divisor(form: str, head: int) -> float:
    """low_rank's kernel multiplies rel_h and rel_w by the scale of q.k, which the tables take back beforehand."""
    return head**-0.5 if form == "low_rank" else 1.0


def with_relative(q: Tensor, tables: Tables) -> Tensor:
    """q [B, H, W, heads, d], dense -> [B, H, W, heads, d + R + S]: q, and its products with both tables."""
    b, h, w, heads, d = q.shape
    # dense q is [B, H, (W heads), d]: both products read it where it lies
    rows = torch.matmul(q.view(b, h, w * heads, d), tables.rows)
    columns = torch.bmm(q.view(b * h, w * heads, d).transpose(0, 1), tables.columns)
    parts = (q, rows.view(b, h, w, heads, -1), columns.view(w, heads, b, h, -1).permute(2, 3, 0, 1, 4))
    return torch.cat(parts, dim=-1)


Form = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
"""(with_relative's queries [G, n, heads, d + R + S], k, v [G, n, heads, d], layout) -> [G, n, heads, d]."""


def low_rank(query: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """See the head of the file."""
    d, one_hot = k.shape[-1], layout.one_hot[:, None].expand(*k.shape[:-1], -1)
    key = torch.cat([k, one_hot], dim=-1)
    value = F.pad(v, (0, one_hot.shape[-1])) if layout.wide_value else v
    tokens = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return F.scaled_dot_product_attention(*tokens, scale=d**-0.5)[..., :d].transpose(1, 2)


def flex(query: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """See the head of the file."""
    q, rows, columns = (part.transpose(1, 2) for part in _split(query, k.shape[-1], layout))
    width = layout.window[1]

    def biased(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + rows[b, head, i, j // width] + columns[b, head, i, j % width]

    out: Tensor = _flex()(q, k.transpose(1, 2), v.transpose(1, 2), score_mod=biased)
    return out.transpose(1, 2)


def _flex() -> Any:
    """FlexAttention, compiled unless what calls it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def mask(query: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """See the head of the file."""
    q, rows, columns = (part.transpose(1, 2) for part in _split(query, k.shape[-1], layout))
    bias = _bias(rows, columns)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2)


def xformers(query: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """See the head of the file."""
    q, rows, columns = _split(query, k.shape[-1], layout)
    bias = _bias(rows.transpose(1, 2), columns.transpose(1, 2))
    spare = -bias.shape[-1] % 8  # the kernel wants aligned rows, and takes a part of wider ones
    aligned = F.pad(bias, (0, spare))[..., : bias.shape[-1]] if spare else bias
    out: Tensor = importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=aligned)
    return out


def _split(query: Tensor, d: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """q [.., d], rel_h [.., rows of a window], rel_w [.., columns of a window], views."""
    rows, columns = layout.window
    start = d + _padded(rows)
    return query[..., :d], query[..., d : d + rows], query[..., start : start + columns]


def _bias(rows: Tensor, columns: Tensor) -> Tensor:
    """[G, heads, n, rows], [G, heads, n, columns] -> [G, heads, n, rows * columns]."""
    return (rows[..., :, None] + columns[..., None, :]).flatten(3)


def pick_form(name: str) -> Form:
    """The form of a name in FORMS."""
    found: dict[str, Form] = {"low_rank": low_rank, "flex": flex, "mask": mask, "xformers": xformers}
    return found[name]
