"""SAM's attention without attention maps: the decomposed relative-position bias as further query and key channels.

With q' = [q * scale, rel_h, rel_w] and k' = [k, onehot(row), onehot(column)] the product q'.k' is q.k * scale + bias,
exactly, so PyTorch's fused attention takes it as it is and no N x N map is stored.
B windows or images, H W tokens of one, N = H * W, h heads, d channels of a head.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn


class LowRankAttention(nn.Module):
    """segment-anything's `Attention` with relative positions, with its parameters under its names.

    Args:
        attention: takes over its parameters.

    Raises:
        ValueError: an attention without relative positions.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        if not attention.use_rel_pos:
            raise ValueError("this attention has no relative positions: use it as it is")
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        d = q.shape[-1]
        grid = q.reshape(b, self.num_heads, h, w, d)
        rows = torch.einsum("bnhwd,hkd->bnhwk", grid, get_rel_pos(h, h, self.rel_pos_h))
        columns = torch.einsum("bnhwd,wkd->bnhwk", grid, get_rel_pos(w, w, self.rel_pos_w))
        query = torch.cat([q * self.scale, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)
        key = torch.cat([k, _positions(h, w, k).expand(b, self.num_heads, -1, -1)], dim=-1)
        value = F.pad(v, (0, h + w))  # the fused kernels want one width for all three
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :d]
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, h, w, c))
        return out


def use_low_rank_attention(encoder: nn.Module) -> None:
    """Replace the attention of every block of segment-anything's image encoder; weights and state dict stay."""
    blocks = encoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        attention = block.attn
        if isinstance(attention, Attention) and attention.use_rel_pos:
            block.attn = LowRankAttention(attention)


def _positions(h: int, w: int, like: Tensor) -> Tensor:
    """[1, 1, N, H + W]: one-hot row and one-hot column of each token."""
    row = torch.eye(h, dtype=like.dtype, device=like.device).repeat_interleave(w, 0, output_size=h * w)
    column = torch.eye(w, dtype=like.dtype, device=like.device).repeat(h, 1)
    return torch.cat([row, column], dim=1)[None, None]
