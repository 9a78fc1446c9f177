"""A step of SSR as its authors would write it on top of the released loop: what the rows with SAM are measured against.

segment-anything's own encoder runs on the source and on the mixed images in each step; each alignment point has a
projection, a resized feature and a cosine, in eager PyTorch. B images, C channels, D encoder channels, h w feature
pixels, N = h * w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.released import ReleasedStep
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.methods.regularisers import CosineAlignment, point_feature
from ssr_fast.methods.ssr import Ssr
from ssr_fast.models.sam import FrozenEncoder, SamShape, build_vit
from ssr_fast.models.segmentor import SegmentorOutput


class ReleasedSsrStep(ReleasedStep):
    """The released loop with SAM online.

    Args:
        method: whose nets, options and seed are taken.
        shape: of its encoder.
        optim, steps: see ReleasedStep.
        one_by_one: encode image by image: the same features in a fraction of the memory, for losses alone.

    Raises:
        ValueError: options that it does not have.
    """

    def __init__(self, method: Ssr, shape: SamShape, optim: OptimConfig, steps: int, one_by_one: bool = False) -> None:
        frozen, regulariser = method.encoder, method.regulariser
        if not isinstance(regulariser, CosineAlignment) or method.ssr.domains != "both" or method.standardise:
            raise ValueError("this loop knows the cosine regulariser on both domains, without standardised features")
        assert frozen is not None, "its features come from the encoder"
        super().__init__(method, optim, steps)
        self.weight, self.size, self.one_by_one = method.ssr.weight, frozen.size, one_by_one
        self.regulariser, self.encoder = regulariser, stock_encoder(frozen, shape)
        method.encoder = None  # it would stand in memory beside the other one

    def nets(self) -> tuple[nn.Module, ...]:
        """The encoder too."""
        return (*super().nets(), self.encoder)

    def _regularised(self, loss: Tensor, output: SegmentorOutput, images: Tensor, terms: dict[str, float]) -> Tensor:
        """Adds 1 - cos of the projected features, half of the mean over both domains."""
        features = self._encode(images)
        distances = []
        for point, projection in zip(self.regulariser.points, self.regulariser.projections, strict=True):
            maps = point_feature(output, point)  # [B, C, h, w]
            target = F.interpolate(features, size=maps.shape[2:], mode="bilinear", align_corners=False)  # [B, D, h, w]
            projected = projection(maps.flatten(2).transpose(1, 2))  # [B, N, D]
            distances.append(1 - F.cosine_similarity(projected, target.flatten(2).transpose(1, 2), dim=2).mean())
        align = self.weight * torch.stack(distances).sum() / 2
        terms["loss/cosine"] = terms.get("loss/cosine", 0.0) + self._log(align)
        return loss + align

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], normalised -> [B, D, hs, ws]."""
        if self.size is not None:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        if self.one_by_one:
            return torch.cat([self.encoder(image) for image in images.split(1)])
        features: Tensor = self.encoder(images)
        return features


def stock_encoder(frozen: FrozenEncoder, shape: SamShape) -> nn.Module:
    """segment-anything's encoder with the parameters of ours, which has the same names; none is copied."""
    with torch.device("meta"):
        stock = build_vit(shape).eval().requires_grad_(False)
    stock.load_state_dict(frozen.encoder.state_dict(), assign=True)
    return stock
