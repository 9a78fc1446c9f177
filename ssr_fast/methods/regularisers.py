"""The two regularisers of SSR: cosine alignment to a frozen encoder's features, and injection of them.

B batch, C student channels, h w student feature pixels, D encoder channels, N encoder tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.methods.method import rows
from ssr_fast.models.segmentor import SegmentorOutput
from ssr_kernels.align import align_stages

POINTS = ("stage1", "stage2", "stage3", "stage4", "fused")


class CosineAlignment(nn.Module):
    """Per alignment point a linear projection to the encoder's channels; loss = sum of mean(1 - cos) over the points.

    Args:
        points: subset of POINTS; "fused" is what the head's classifier reads.
        channels: channels C of each point.
        target_channels: D.
    """

    def __init__(self, points: Sequence[str], channels: Sequence[int], target_channels: int) -> None:
        super().__init__()
        self.points = tuple(points)
        self.projections = nn.ModuleList(nn.Linear(c, target_channels) for c in channels)

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.projections if isinstance(layer, nn.Linear)]

    def forward(self, output: SegmentorOutput, keep: slice, target: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            output: the student's, over the whole batch.
            keep: the samples to align.
            target: encoder features of those samples, [B, hs, ws, D].
        """
        features = [rows(point_feature(output, point)[keep]) for point in self.points]
        weights = [linear.weight for linear in self._linears()]
        biases: list[Tensor | None] = [linear.bias for linear in self._linears()]
        return align_stages(features, weights, biases, target, None, [1.0] * len(features))


def point_feature(output: SegmentorOutput, point: str) -> Tensor:
    """The feature [B, C, h, w] of an alignment point."""
    if point == "fused":
        return output.fused
    feature: Tensor = output.features[int(point.removeprefix("stage")) - 1]
    return feature


class StageInjection(nn.Module):
    """Cross-attention from a student stage to the encoder's tokens: F' = F + proj(attention(q(F), kv(E))).

    Args:
        channels: C; divided into `heads` heads.
        heads: attention heads of the stage.
        target_channels: D.
    """

    def __init__(self, channels: int, heads: int, target_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(target_channels, channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        """feature [B, C, h, w], target [B, hs, ws, D] -> [B, C, h, w]."""
        b, c, h, w = feature.shape
        tokens = rows(feature).reshape(b, h * w, c)
        q = self.q(tokens).view(b, h * w, self.heads, c // self.heads).transpose(1, 2)  # [B, heads, h*w, c]
        kv = self.kv(self.embed(target.flatten(1, 2)))  # [B, N, 2C]
        k, v = kv.view(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # 2 x [B, heads, N, c]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return (tokens + self.proj(mixed)).view(b, h, w, c).permute(0, 3, 1, 2)


class Injection(nn.Module):
    """The released SSR code's regulariser: stages enriched by the encoder's tokens are decoded a second time.

    Args:
        points: the stages to enrich, subset of stage1..stage4.
        channels: channels of the four stages.
        heads: attention heads of the four stages.
        target_channels: D.
    """

    def __init__(
        self, points: Sequence[str], channels: Sequence[int], heads: Sequence[int], target_channels: int
    ) -> None:
        super().__init__()
        stages = {int(point.removeprefix("stage")) - 1 for point in points}
        self.stages = nn.ModuleDict(
            {str(i): StageInjection(channels[i], heads[i], target_channels) for i in sorted(stages)}
        )

    def forward(self, features: Sequence[Tensor], target: Tensor) -> list[Tensor]:
        """Four features [B, C, h, w] -> the same with the chosen stages enriched."""
        return [
            self.stages[str(i)](feature, target) if str(i) in self.stages else feature
            for i, feature in enumerate(features)
        ]


def seeded(build: type[nn.Module], seed: int, *args: object) -> nn.Module:
    """Build a module with weights that depend on `seed` only, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)
