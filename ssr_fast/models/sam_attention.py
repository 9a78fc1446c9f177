"""A block of segment-anything's image encoder, without attention maps and with the least padding.

Windows are filled up after the projections and not before: a padded token is zero after the norm, so its key and value
are the projection's bias, and its query is never read. Projections see the tokens of the map only (4096 of 4900 at
1024, 1024 of 1764 at 512), and q, k and v go to their windows in a copy that attention needs anyway.

B images, H W tokens of a map, N = H * W, C channels, d channels of a head, R S see sam_forms.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.models.sam_forms import (
    Layout,
    Tables,
    make_layout,
    make_tables,
    pick_form,
    relative_divisor,
    with_relative,
)


class SamBlock(nn.Module):
    """A block of the encoder.

    Args:
        norm1, norm2, mlp: as segment-anything names them.
        attn: `Projections`, or segment-anything's Attention with relative positions, of which only parameters are used.
        window: side of its windows; 0: attention over the whole map.
        form: one of sam_forms.FORMS.
    """

    attn: Any

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module, window: int, form: str
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.window, self.form = window, form
        self.attend = pick_form(form)

    def prepare(self, height: int, width: int, layout: Layout | None = None) -> tuple[Layout, Tables]:
        """What `forward` needs to know of a map of height x width tokens; a layout of the same kind may be shared."""
        weight, heads, rel_pos = self.attn.qkv.weight, self.attn.num_heads, (self.attn.rel_pos_h, self.attn.rel_pos_w)
        head = weight.shape[1] // heads
        if layout is None:
            layout = make_layout(height, width, self.window, head, weight.dtype, weight.device)
        divisor = relative_divisor(self.form, head)
        return layout, make_tables(rel_pos, (height, width), layout, heads, divisor)

    def forward(self, x: Tensor, prepared: tuple[Layout, Tables] | None = None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; what is not prepared is computed."""
        layout, tables = prepared or self.prepare(*x.shape[1:3])
        x = x + self._attention(self.norm1(x), layout, tables)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _attention(self, x: Tensor, layout: Layout, tables: Tables) -> Tensor:
        b, h, w, c = x.shape
        heads, qkv = self.attn.num_heads, self.attn.qkv
        # by itself, q is dense, and its products with the tables need no copy of it
        q = F.linear(x, qkv.weight[:c], qkv.bias[:c]).view(b, h, w, heads, -1)
        kv = F.linear(x, qkv.weight[c:], qkv.bias[c:]).view(b, h * w, 2 * c)
        query = with_relative(q, tables).flatten(1, 2)  # [B, N, heads, d + R + S]
        if layout.keys is not None and layout.queries is not None:
            query = query.index_select(1, layout.queries)
            if layout.keys.shape[0] > h * w:
                kv = torch.cat([kv, qkv.bias[c:].expand(b, 1, -1)], dim=1)  # token N: the padding
            kv = kv.index_select(1, layout.keys)
        tokens = layout.window[0] * layout.window[1]
        query = query.view(b * layout.windows, tokens, heads, -1)
        k, v = kv.view(b * layout.windows, tokens, 2, heads, -1).unbind(2)
        out = self.attend(query, k, v, layout).reshape(b, layout.windows * tokens, c)
        if layout.places is not None:
            out = out.index_select(1, layout.places)
        projected: Tensor = self.attn.proj(out)
        return projected.view(b, h, w, c)


def use_low_rank_attention(encoder: nn.Module) -> None:
    """Replace every block of segment-anything's own encoder by ours; weights and state dict stay."""
    blocks = encoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    for number in range(len(blocks)):
        block: Any = blocks[number]
        parts = block.norm1, block.attn, block.norm2, block.mlp
        blocks[number] = SamBlock(*parts, block.window_size, "low_rank")
