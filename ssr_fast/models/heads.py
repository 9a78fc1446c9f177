"""The two decode heads: DAFormer's (arXiv 2111.14887) and SegFormer's (arXiv 2105.15203).

State-dict names are those of the checkpoints that exist (DAFormer/MIC/SSR; NVIDIA's SegFormer).
B batch, C channels, E embedding channels, K classes, h w feature pixels at stride 4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.models.noise import ChannelDropout, Noise
from ssr_fast.models.norm_relu import norm_relu
from ssr_fast.models.sync_norm import OverRanks, sync_norm
from ssr_kernels.dwconv import dwconv_dilated

DILATIONS = (6, 12, 18)
DROPOUT_STREAM = 1 << 16  # far above the drop-path streams, of which a backbone has two a block


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that treats a batch of several domains as that many passes.

    In training the batch is split into `splits` equal parts; each is normalised with its own statistics and moves the
    running ones, in order. One pass over [source; mixed] with splits = 2 equals a pass over each. In evaluation it is
    BatchNorm2d.
    """

    splits: int = 1
    over_ranks: OverRanks | None = None
    """Set: in training the statistics are those of all ranks' images."""

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, h, w] -> [B, C, h, w].

        Raises:
            ValueError: B is not a multiple of splits.
        """
        if self.training and self.over_ranks is not None:
            return sync_norm(input, self.weight, self.bias, *self._count(input), self.splits, self.over_ranks)
        if self.splits == 1 or not self.training:
            return super().forward(input)
        self._check(input)
        forward = super().forward
        return torch.cat([forward(part) for part in input.chunk(self.splits)])

    def followed_by_relu(self, x: Tensor, mixer: Tensor | None) -> Tensor:
        """In training: relu(self(x)), or the 1x1 convolution of that with weight `mixer`; keeps x alone for backward.

        Raises:
            ValueError: B is not a multiple of splits.
        """
        if self.over_ranks is not None:
            out = F.relu(self(x), inplace=True)
            return out if mixer is None else F.conv2d(out, mixer)
        return norm_relu(x, self.weight, self.bias, *self._count(x), self.splits, mixer)

    def _count(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], float, float]:
        """Counts a pass over x: (running statistics, momentum, eps)."""
        self._check(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(self.splits)
        return (self.running_mean, self.running_var), self.momentum, self.eps

    def _check(self, x: Tensor) -> None:
        if x.shape[0] % self.splits:
            raise ValueError(f"a batch of {x.shape[0]} images cannot be split into {self.splits} equal domains")


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, groups=groups, bias=False)
        self.bn = SplitBatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def finish(self, x: Tensor, mixer: Tensor | None = None) -> Tensor:
        """BatchNorm and ReLU of a convolution's result, and a pointwise convolution of them if its weight is given.

        Args:
            x: [B, C, h, w].
            mixer: [E, C, 1, 1].

        Returns:
            [B, C, h, w], or [B, E, h, w].
        """
        if self.training and not torch.compiler.is_compiling():  # the compiler finds out by itself what to keep
            return self.bn.followed_by_relu(x, mixer)
        out = F.relu(self.bn(x), inplace=True)
        return out if mixer is None else F.conv2d(out, mixer)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, h, w] -> [B, C_out, h, w]."""
        return self.finish(self.conv(x))


class SeparableConv(nn.Module):
    """A dilated depthwise 3x3 and a pointwise convolution, each a ConvNorm.

    The depthwise convolution itself runs outside, together with those of its sister branches (one read of the input).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvNorm(in_channels, in_channels, 3, groups=in_channels)
        self.pointwise_conv = ConvNorm(in_channels, out_channels, 1)

    def forward(self, depthwise: Tensor) -> Tensor:
        """depthwise [B, C_in, h, w], the depthwise convolution's result -> [B, C_out, h, w]."""
        mixed = self.depthwise_conv.finish(depthwise, self.pointwise_conv.conv.weight)
        return self.pointwise_conv.finish(mixed)


class SeparableASPP(nn.Module):
    """Atrous spatial pyramid without image pooling: a 1x1 branch, three dilated separable ones, a 3x3 bottleneck."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        branches: list[nn.Module] = [ConvNorm(in_channels, channels, 1)]
        branches += [SeparableConv(in_channels, channels) for _ in DILATIONS]
        self.aspp_modules = nn.ModuleList(branches)
        self.bottleneck = ConvNorm(len(branches) * channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, h, w] -> [B, C, h, w]."""
        separable = [branch for branch in self.aspp_modules if isinstance(branch, SeparableConv)]
        weights = [branch.depthwise_conv.conv.weight for branch in separable]
        maps = dwconv_dilated(x.permute(0, 2, 3, 1), weights, DILATIONS)  # three [B, h, w, C_in]
        outs = [self.aspp_modules[0](x)]
        outs += [branch(rows.permute(0, 3, 1, 2)) for branch, rows in zip(separable, maps, strict=True)]
        out: Tensor = self.bottleneck(torch.cat(outs, dim=1))  # [B, 4C, h, w] -> [B, C, h, w]
        return out


class Projection(nn.Module):
    """Linear embedding of one stage, under the name that the checkpoints have: `proj`."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, channels)

    def forward(self, feature: Tensor) -> Tensor:
        """feature [B, h, w, C] -> [B, h, w, E]."""
        out: Tensor = self.proj(feature)
        return out


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize, align_corners False: x [B, h, w, C] -> [B, *size, C].

    Equals F.interpolate up to rounding, as two matrix products: their backward pass is deterministic on a GPU, which
    F.interpolate's is not.
    """
    b, h, w, c = x.shape
    height, width = size
    if width != w:
        x = _interpolation(w, width, x) @ x  # [B, h, W, C]
    if height != h:
        x = (_interpolation(h, height, x) @ x.reshape(b, h, width * c)).view(b, height, width, c)
    return x


def _interpolation(count: int, wanted: int, like: Tensor) -> Tensor:
    """[wanted, count]: the weights with which `count` samples give `wanted`, in `like`'s type."""
    exact = like.dtype if like.dtype == torch.float64 else torch.float32
    basis = torch.eye(count, dtype=exact, device=like.device)[None]  # the interpolation of each unit vector
    return F.interpolate(basis, size=wanted, mode="linear", align_corners=False)[0].T.to(like.dtype)


class DAFormerHead(nn.Module):
    """Embeds the four stages, fuses them with the separable pyramid, classifies.

    Args:
        dims: channels of the four stages.
        class_count: K.
        channels: E, the width of every layer.
        dropout: probability of dropping a channel in front of the classifier, in [0, 1).
        noise: the network's noise.
    """

    def __init__(
        self, dims: Sequence[int], class_count: int, channels: int = 256, dropout: float = 0.1, *, noise: Noise
    ) -> None:
        super().__init__()
        self.embed_layers = nn.ModuleList(Projection(dim, channels) for dim in dims)
        self.fuse_layer = SeparableASPP(len(dims) * channels, channels)
        self.dropout = ChannelDropout(dropout, noise, DROPOUT_STREAM)
        self.conv_seg = nn.Conv2d(channels, class_count, 1)
        _initialise_classifier(self.conv_seg)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """features: four [B, C, h, w] -> (fused [B, E, h1, w1] as before dropout, logits [B, K, h1, w1])."""
        size = features[0].shape[2:]
        stages = zip(features, self.embed_layers, strict=True)
        embedded = [resize(layer(feature.permute(0, 2, 3, 1)), size) for feature, layer in stages]
        fused = self.fuse_layer(torch.cat(embedded, dim=3).permute(0, 3, 1, 2))
        return fused, self.conv_seg(self.dropout(fused))


class SegFormerHead(nn.Module):
    """SegFormer's all-MLP head. Arguments and results as DAFormerHead's.

    The 1x1 convolution over the concatenated embeddings is a sum of one linear map a stage, and a linear map commutes
    with resizing: so each stage is embedded and mixed in one product at its own size, and the four sums are resized.
    It is the same function without the [B, 4E, h1, w1] concatenation and most of the arithmetic.
    """

    def __init__(
        self, dims: Sequence[int], class_count: int, channels: int = 256, dropout: float = 0.1, *, noise: Noise
    ) -> None:
        super().__init__()
        for stage, dim in enumerate(dims, start=1):
            self.add_module(f"linear_c{stage}", Projection(dim, channels))
        self.linear_fuse = ConvNorm(len(dims) * channels, channels, 1)
        self.dropout = ChannelDropout(dropout, noise, DROPOUT_STREAM)
        self.linear_pred = nn.Conv2d(channels, class_count, 1)
        _initialise_classifier(self.linear_pred)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """features: four [B, C, h, w] -> (fused [B, E, h1, w1] as before dropout, logits [B, K, h1, w1])."""
        size = features[0].shape[2:]
        projections = [getattr(self, f"linear_c{stage}").proj for stage in range(1, len(features) + 1)]
        mixers = self.linear_fuse.conv.weight.flatten(1).chunk(len(features), dim=1)  # four [E, E]
        parts = []
        for feature, linear, mixer in zip(features, projections, mixers[::-1], strict=True):  # the deepest stage first
            x = F.linear(feature.permute(0, 2, 3, 1), mixer @ linear.weight, mixer @ linear.bias)  # [B, h, w, E]
            parts.append(resize(x, size))
        fused = self.linear_fuse.finish(sum(parts[1:], start=parts[0]).permute(0, 3, 1, 2))
        return fused, self.linear_pred(self.dropout(fused))


HEADS: dict[str, type[DAFormerHead] | type[SegFormerHead]] = {"daformer": DAFormerHead, "segformer": SegFormerHead}


def _initialise_classifier(conv: nn.Conv2d) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
