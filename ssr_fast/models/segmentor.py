"""The network that is trained and shipped: a MiT backbone and a decode head.

B batch, C channels, K classes, H W pixels, h w feature pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssr_fast.models.heads import HEADS, SplitBatchNorm2d
from ssr_fast.models.mit import MIT, MixTransformer
from ssr_fast.models.noise import Noise


@dataclass(kw_only=True)
class ModelConfig:
    """Which network, and where its weights come from."""

    backbone: str = "mit_b5"
    """mit_b0 .. mit_b5, or mit_tiny (the demo's)."""
    head: str = "daformer"
    """daformer or segformer."""
    channels: int = 256
    """Width of the head. SegFormer's published heads have 256 for B0 and B1, 768 for B2 to B5."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it rises linearly from 0."""
    dropout: float = 0.1
    """Probability of dropping a channel in front of the classifier."""
    weights: str = ""
    """Checkpoint that the backbone starts from, in any format that load_backbone reads; empty: from scratch."""

    def problems(self, where: str) -> list[str]:
        """Every illegal value as one sentence; `where` is the option's prefix, such as "model"."""
        found = []
        for name, value, known in (("backbone", self.backbone, MIT), ("head", self.head, HEADS)):
            if value not in known:
                found.append(f"--{where}.{name} must be one of {', '.join(known)} (it is {value!r})")
        if self.channels < 1:
            found.append(f"--{where}.channels must be at least 1 (it is {self.channels})")
        for name, share in (("drop_path", self.drop_path), ("dropout", self.dropout)):
            if not 0.0 <= share < 1.0:
                found.append(f"--{where}.{name} must be at least 0 and below 1 (it is {share})")
        if self.weights and not Path(self.weights).exists():
            found.append(f"--{where}.weights names a file that does not exist ({self.weights})")
        return found


@dataclass(frozen=True)
class SegmentorOutput:
    """What one forward pass leaves to the losses."""

    features: list[Tensor]
    """Four [B, C, h, w], strides 4, 8, 16, 32."""
    fused: Tensor
    """[B, channels, h, w] at stride 4: what the classifier reads, before its dropout."""
    logits: Tensor
    """[B, K, h, w] at stride 4."""


class Segmentor(nn.Module):
    """Backbone, decode head, and the noise that their stochastic layers share.

    Args:
        config: as of ModelConfig, legal.
        class_count: K.
    """

    def __init__(self, config: ModelConfig, class_count: int) -> None:
        super().__init__()
        shape = MIT[config.backbone]
        self.config, self.class_count = config, class_count
        self.noise = Noise()
        self.backbone = MixTransformer(shape, config.drop_path, self.noise)
        head = HEADS[config.head]
        self.decode_head = head(shape.dims, class_count, config.channels, config.dropout, noise=self.noise)

    def features(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], normalised RGB -> four [B, C, h, w]."""
        out: list[Tensor] = self.backbone(images)
        return out

    def decode(self, features: Sequence[Tensor], domains: int = 1) -> tuple[Tensor, Tensor]:
        """The head alone.

        Args:
            features: four [B, C, h, w].
            domains: in training, how many equal parts of the batch get BatchNorm statistics of their own.

        Returns:
            (fused [B, channels, h, w], logits [B, K, h, w]), stride 4.
        """
        for module in self.decode_head.modules():
            if isinstance(module, SplitBatchNorm2d):
                module.splits = domains
        out: tuple[Tensor, Tensor] = self.decode_head(features)
        return out

    def forward(self, images: Tensor, domains: int = 1) -> SegmentorOutput:
        """images [B, 3, H, W], normalised RGB; domains as in decode."""
        features = self.features(images)
        fused, logits = self.decode(features, domains)
        return SegmentorOutput(features, fused, logits)


def build_segmentor(config: ModelConfig, class_count: int, seed: int = 0) -> Segmentor:
    """A network with fresh weights; `config.weights` is left to load_backbone.

    Args:
        config: a legal ModelConfig.
        class_count: K >= 1.
        seed: equal seeds give bit-equal weights; no global random state is touched.

    Returns:
        a Segmentor in training mode, fp32, on the CPU.
    """
    if class_count < 1:
        raise ValueError(f"class_count must be at least 1 (it is {class_count})")
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would reseed the accelerators too, which nothing here draws from
        torch.default_generator.manual_seed(seed)
        return Segmentor(config, class_count)
