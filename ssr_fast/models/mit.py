"""MiT, the Mix Transformer backbone of SegFormer (arXiv 2105.15203), written from its description.

The state dict has the names of the original weight files (`block1.0.attn.q.weight`), so that those load as they are.
Tokens stay channels-last, [B, h, w, C], through the whole network: an NCHW feature map is a permuted view of them.
B batch, C channels, H W pixels, h w feature pixels, N query tokens, M key tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssr_fast.errors import UserError
from ssr_fast.models.noise import Noise, StochasticDepth
from ssr_kernels.dwconv import dwconv_gelu

# Two values, as in the original: weights were trained with them, and a constant map shows the difference.
NORM_EPS = 1e-6  # the norms of the blocks and at the end of a stage
EMBED_NORM_EPS = 1e-5  # the norms after a convolution: patch embedding and spatial reduction

STAGES = (1, 2, 3, 4)
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class MiTShape:
    """The numbers that make one Mix Transformer; each tuple has one entry a stage."""

    dims: tuple[int, int, int, int]
    """Channels C."""
    depths: tuple[int, int, int, int]
    """Blocks."""
    heads: tuple[int, int, int, int]
    """Attention heads; divides dims."""
    sr_ratios: tuple[int, int, int, int]
    """Spatial reduction of keys and values: the side of the patch that becomes one key."""
    mlp_ratio: int = 4
    """Hidden channels of the Mix-FFN, as a multiple of C."""

    @property
    def smallest_side(self) -> int:
        """The least image height and width, in pixels, for which every reduction has one whole patch."""
        return max(stride * (ratio - 1) + 1 for stride, ratio in zip(STRIDES, self.sr_ratios, strict=True))


def _standard(dims: tuple[int, int, int, int], depths: tuple[int, int, int, int]) -> MiTShape:
    return MiTShape(dims=dims, depths=depths, heads=(1, 2, 5, 8), sr_ratios=(8, 4, 2, 1))


MIT = {
    "mit_tiny": MiTShape(dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), sr_ratios=(4, 2, 2, 1)),
    "mit_b0": _standard((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": _standard((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": _standard((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": _standard((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": _standard((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": _standard((64, 128, 320, 512), (3, 6, 40, 3)),
}


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=EMBED_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, ceil(H / stride), ceil(W / stride), C]."""
        tokens: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))  # [B, h, w, C]
        return tokens


class Attention(nn.Module):
    """Multi-head attention whose keys and values come from patches of sr x sr tokens."""

    def __init__(self, dim: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # rows [0:C] make k, rows [C:2C] make v
        self.proj = nn.Linear(dim, dim)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Instead of PyTorch's: q [B, N, heads, size], k and v [B, M, heads, size] -> [B, N, heads, size]."""
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=EMBED_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        batch, height, width, dim = x.shape
        size = dim // self.heads
        q = self.q(x).view(batch, -1, self.heads, size)  # [B, N, heads, size]
        if self.sr_ratio > 1:
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B, h // sr, w // sr, C]
        kv = self.kv(x).view(batch, -1, 2, self.heads, size)  # [B, M, 2, heads, size]
        if self.attend is not None:
            mixed = self.attend(q, *kv.unbind(2))  # [B, N, heads, size]
        else:
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, M, size]
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        out: Tensor = self.proj(mixed.reshape(batch, height, width, dim))  # [B, h, w, C]
        return out


class DepthwiseConv(nn.Module):
    """Holds the depthwise kernel under the original's name, `dwconv.dwconv`; computes it together with the GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> gelu(conv(x)) [B, h, w, C]."""
        assert self.dwconv.bias is not None
        return dwconv_gelu(x, self.dwconv.weight, self.dwconv.bias)


class MixFFN(nn.Module):
    """Linear, depthwise 3x3 (the only thing that tells a token where it is), exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        out: Tensor = self.fc2(self.dwconv(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: MiTShape, stage: int) -> None:
        super().__init__()
        dim = shape.dims[stage]
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, shape.heads[stage], shape.sr_ratios[stage])
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MixFFN(dim, shape.mlp_ratio * dim)

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]; factors [2, B, 1, 1, 1] of the two branches, None for 1."""
        if factors is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = torch.addcmul(x, self.attn(self.norm1(x)), factors[0])
        return torch.addcmul(x, self.mlp(self.norm2(x)), factors[1])


class MixTransformer(nn.Module):
    """The backbone: four stages of patch embedding, blocks and LayerNorm, at strides 4, 8, 16 and 32.

    Args:
        shape: its dimensions, see MIT.
        drop_path: the last block's probability of dropping a branch, in [0, 1); it rises linearly from 0.
        noise: the network's noise; the blocks' branches use its streams 0 .. 2 * sum(depths) - 1.
    """

    def __init__(self, shape: MiTShape, drop_path: float, noise: Noise) -> None:
        super().__init__()
        self.shape = shape
        total = sum(shape.depths)
        channels = 3
        for index, stage in enumerate(STAGES):
            dim = shape.dims[index]
            kernel, stride = (7, 4) if index == 0 else (3, 2)
            self.add_module(f"patch_embed{stage}", PatchEmbed(channels, dim, kernel, stride))
            blocks = nn.ModuleList()
            for _ in range(shape.depths[index]):
                blocks.append(Block(shape, index))
            self.add_module(f"block{stage}", blocks)
            self.add_module(f"norm{stage}", nn.LayerNorm(dim, eps=NORM_EPS))
            channels = dim
        rates = [drop_path * number / max(total - 1, 1) for number in range(total) for _ in ("attn", "mlp")]
        self.stochastic_depth = StochasticDepth(rates, noise)
        self.recompute_blocks = False
        """Keep a block's input alone for the backward pass, which runs the block again: less memory, more arithmetic.
        The noise is a function of its key, so the second run equals the first."""
        self.apply(_initialise)

    def blocks(self) -> Iterator[Block]:
        """All blocks in order: what compilation and sharding wrap one by one."""
        for stage in STAGES:
            yield from getattr(self, f"block{stage}")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of the four stages.

        Args:
            images: [B, 3, H, W], normalised RGB; H and W need not be multiples of 32.

        Returns:
            four [B, C, h, w] with h = ceil(H / stride), as permuted views of channels-last tokens.

        Raises:
            UserError: an image side is below `shape.smallest_side`.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.shape.smallest_side:
            raise UserError(
                f"an image of {width}x{height} pixels is too small for this backbone: "
                f"make both sides at least {self.shape.smallest_side} pixels"
            )
        x = images.contiguous(memory_format=torch.channels_last)  # 3 channels: cheap, and every map after it follows
        factors = self._factors(x)
        features = []
        for stage in STAGES:
            tokens = getattr(self, f"patch_embed{stage}")(x)  # [B, h, w, C]
            for block in getattr(self, f"block{stage}"):
                tokens = self._run(block, tokens, next(factors))
            x = getattr(self, f"norm{stage}")(tokens).permute(0, 3, 1, 2)  # [B, C, h, w]
            features.append(x)
        return features

    def _run(self, block: Block, x: Tensor, factors: Tensor | None) -> Tensor:
        """A block, its activations kept or computed again."""
        if self.recompute_blocks and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, factors, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(x, factors)
        return out

    def _factors(self, x: Tensor) -> Iterator[Tensor | None]:
        """Each block's factors of its two branches [2, B, 1, 1, 1], or None, in the blocks' order."""
        drawn = self.stochastic_depth(x.shape[0], x.dtype)  # [2 blocks, B]
        if drawn is None:
            return itertools.repeat(None)
        return iter(drawn.view(-1, 2, x.shape[0], 1, 1, 1))


def _initialise(module: nn.Module) -> None:
    """MiT's initialisation: truncated normal for linear layers, fan-out normal for convolutions, zero biases."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # no values to set, and torch's truncated normal takes seconds to find that out
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
