"""segment-anything's image encoder for a frozen pass: its state dict and its numbers, without its traffic.

What differs from segment_anything.modeling.ImageEncoderViT, each exact but for rounding:

- no attention map and no position bias is stored (sam_forms.py);
- what depends on the size of the map only (one-hot keys, tables of relative positions, which token stands in which
  window) is computed at the first image and kept, in the type of the weights;
- windows are filled up after the projections and not before (sam_attention.py);
- the neck's LayerNorm2d, which computes its variance in the type of its input, is PyTorch's layer_norm, with float32
  inside, and channels stay last.

B images, S pixels a side, H W tokens of a map, C channels of a token, D of a feature, h w feature pixels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.models.sam_attention import SamBlock
from ssr_fast.models.sam_forms import Layout, Tables

if TYPE_CHECKING:
    from ssr_fast.models.sam import SamShape

EPS = 1e-6


class PatchEmbed(nn.Module):
    """Images [B, 3, S, S] -> [B, H, W, C]: one product over patches, so that channels come out last."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels beyond the last whole patch are left out, as a convolution does."""
        side = self.proj.kernel_size[0]
        b, channels, height, width = images.shape
        h, w = height // side, width // side
        patches = images[..., : h * side, : w * side].reshape(b, channels, h, side, w, side).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(b, h, w, -1), self.proj.weight.flatten(1), self.proj.bias)


class Projections(nn.Module):
    """The parameters of segment-anything's Attention under its names."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(2 * side - 1, width // heads)) for _ in range(2))


class Mlp(nn.Module):
    """segment-anything's MLPBlock."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return out


class ChannelNorm(nn.Module):
    """segment-anything's LayerNorm2d, on channels that come last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] -> the same, whose channels lie side by side in memory."""
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS).permute(0, 3, 1, 2)


class SamEncoder(nn.Module):
    """segment-anything's ImageEncoderViT.

    Args:
        shape: its constructor values.
        form: of attention, one of sam_forms.FORMS.
    """

    def __init__(self, shape: "SamShape", form: str = "low_rank") -> None:
        super().__init__()
        side, width = shape.size // shape.patch, shape.width
        self.patch_embed = PatchEmbed(shape.patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width)) if shape.absolute_positions else None
        windows = [0 if number in shape.global_blocks else shape.window for number in range(shape.depth)]
        self.blocks = nn.ModuleList(
            SamBlock(
                nn.LayerNorm(width, EPS),
                Projections(width, shape.heads, window or side),
                nn.LayerNorm(width, EPS),
                Mlp(width, int(width * shape.mlp_ratio)),
                window,
                form,
            )
            for window in windows
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, shape.out, 1, bias=False),
            ChannelNorm(shape.out),
            nn.Conv2d(shape.out, shape.out, 3, padding=1, bias=False),
            ChannelNorm(shape.out),
        )
        self._prepared: dict[tuple[Any, ...], list[tuple[Layout, Tables]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> features [B, D, h, w], whose channels lie side by side in memory.

        Raises:
            ValueError: images of another size than the absolute positions are for.
        """
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            if x.shape[1:3] != self.pos_embed.shape[1:3]:
                side = self.pos_embed.shape[1] * self.patch_embed.proj.kernel_size[0]
                raise ValueError(f"this encoder takes images of {side} x {side} (it got {tuple(images.shape[-2:])})")
            x = x + self.pos_embed
        for block, prepared in zip(self._blocks(), self.prepare(*x.shape[1:3]), strict=True):
            x = block(x, prepared)
        features: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return features

    def prepare(self, height: int, width: int) -> list[tuple[Layout, Tables]]:
        """What each block needs for a map of height x width tokens: kept, unless weights are being trained.

        A size, once met, is kept until the module moves or changes its type: a CUDA graph may hold on to it.
        """
        tables = [table for block in self._blocks() for table in (block.attn.rel_pos_h, block.attn.rel_pos_w)]
        if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
            return self._prepare(height, width)
        key = (height, width, *(table._version for table in tables))
        if key not in self._prepared:
            self._prepared[key] = self._prepare(height, width)
        return self._prepared[key]

    def _prepare(self, height: int, width: int) -> list[tuple[Layout, Tables]]:
        layouts: dict[int, Layout] = {}
        found = []
        for block in self._blocks():
            layout, tables = block.prepare(height, width, layouts.get(block.window))
            layouts[block.window] = layout
            found.append((layout, tables))
        return found

    def _blocks(self) -> list[SamBlock]:
        return cast(list[SamBlock], list(self.blocks))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SamEncoder":
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def resize(self, size: int) -> None:
        """Take images of size x size from now on: the absolute positions are interpolated.

        Bicubic without antialiasing at pixel centres, as in the fine-tuning of vision transformers at another size
        (DeiT, DINOv2; segment-anything has no code for it). The tables of relative positions stay as they are and are
        interpolated linearly where they are used, which is segment-anything's own rule.
        """
        if self.pos_embed is None:
            return
        side = size // self.patch_embed.proj.kernel_size[0]
        positions = self.pos_embed.detach().permute(0, 3, 1, 2)
        resized = F.interpolate(positions, (side, side), mode="bicubic", align_corners=False)
        self.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1).contiguous(), self.pos_embed.requires_grad)
