"""SSR: self-training regularised by a frozen SAM (arXiv 2401.14686). Nothing of SAM remains in the student.

B batch, H W pixels, h w feature pixels, D encoder channels.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssr_fast.data.batch import Batch
from ssr_fast.methods.mixing import compose
from ssr_fast.methods.regularisers import POINTS, CosineAlignment, Injection, seeded
from ssr_fast.methods.self_training import Mixed, SelfTraining, SelfTrainingConfig
from ssr_fast.models.feature_cache import ViewCache
from ssr_fast.models.resident_features import ResidentFeatures
from ssr_fast.models.sam import FrozenEncoder, alignment_target, resize_frozen
from ssr_fast.models.segmentor import Segmentor, SegmentorOutput


@dataclass(kw_only=True)
class SsrConfig:
    """The regulariser; the options `--ssr.*`."""

    regulariser: str = "cosine"
    """cosine (projection + cosine alignment) or injection (the authors' released code: the encoder's tokens are
    attended to and the head decodes a second time)."""
    points: tuple[str, ...] | None = None
    """Where: any of stage1, stage2, stage3, stage4, fused (what the classifier reads; cosine only); null: all."""
    weight: float = 1.0
    """Weight of the regulariser's loss."""
    domains: str = "both"
    """Which half of the student's batch is regularised: source, mixed or both."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.regulariser not in ("cosine", "injection"):
            found.append(f"--{where}.regulariser must be cosine or injection (it is {self.regulariser})")
        allowed = POINTS[:4] if self.regulariser == "injection" else POINTS
        points = self.chosen_points()
        for point in points:
            if point not in allowed:
                found.append(
                    f"--{where}.points holds {point}: --{where}.regulariser {self.regulariser} knows "
                    f"{', '.join(allowed)}"
                )
        if not points or len(set(points)) != len(points):
            found.append(f"--{where}.points must name each point once, at least one (it is {list(points)})")
        if self.weight <= 0:
            found.append(
                f"--{where}.weight must be > 0 (it is {self.weight}); for none choose --method.name self_training"
            )
        if self.domains not in ("source", "mixed", "both"):
            found.append(f"--{where}.domains must be source, mixed or both (it is {self.domains})")
        return found

    def chosen_points(self) -> tuple[str, ...]:
        """The points, or all that the regulariser knows."""
        if self.points is not None:
            return tuple(self.points)
        return POINTS[:4] if self.regulariser == "injection" else POINTS


@dataclass(frozen=True)
class StoredFeatures:
    """What is known of features that batches bring.

    Attributes:
        channels: D.
        standardise: give each channel zero mean and unit variance over the batch.
        resident: what cuts views out of features on the device, by domain; batches then bring places.
    """

    channels: int
    standardise: bool
    resident: Mapping[str, ResidentFeatures] = field(default_factory=dict)


class Ssr(SelfTraining):
    """Self-training with the regulariser on top.

    Args:
        student, weights, seed, config, class_count, things, reference: see SelfTraining.
        ssr: the regulariser's options.
        encoder: the frozen encoder; None where every batch brings all features that are aligned to.
        views: keeps its features of the source images; None encodes them in every step.
        stored: what batches bring features of; None if they bring none.
    """

    stage_name = "ssr"

    def __init__(
        self,
        student: Segmentor,
        weights: Tensor,
        seed: int,
        config: SelfTrainingConfig,
        class_count: int,
        ssr: SsrConfig,
        encoder: FrozenEncoder | None,
        views: ViewCache | None = None,
        things: tuple[int, ...] = (),
        reference: nn.Module | None = None,
        stored: StoredFeatures | None = None,
    ) -> None:
        super().__init__(student, weights, seed, config, class_count, things, reference)
        self.ssr, self.encoder, self.views = ssr, encoder, views
        if stored is None:
            assert encoder is not None, "features come from the encoder or with the batches"
            stored = StoredFeatures(encoder.channels(), encoder.standardise)
        self.standardise, self.resident = stored.standardise, nn.ModuleDict(stored.resident)
        points = ssr.chosen_points()
        dims, heads = student.backbone.shape.dims, student.backbone.shape.heads
        if ssr.regulariser == "cosine":
            sizes = dict(zip(POINTS, (*dims, student.config.channels), strict=True))
            channels = [sizes[point] for point in points]
            self.regulariser = seeded(CosineAlignment, seed, points, channels, stored.channels)
        else:
            self.regulariser = seeded(Injection, seed, points, dims, heads, stored.channels)

    def computed(self) -> dict[str, nn.Module]:
        """The regulariser runs with the student."""
        return {**super().computed(), "regulariser": self.regulariser}

    def compute_in(self, dtype: torch.dtype, copies: bool = True) -> None:
        """The frozen encoder too."""
        super().compute_in(dtype, copies)
        if self.encoder is not None:
            self.encoder.to(dtype)

    def trainable(self) -> dict[str, nn.Module]:
        """The regulariser trains with the backbone's learning rate."""
        return {**super().trainable(), "extra": self.regulariser}

    def saved(self) -> dict[str, nn.Module]:
        """The regulariser's projections are part of a checkpoint; the frozen encoder is not."""
        return {**super().saved(), "regulariser": self.regulariser}

    def wants_target(self) -> bool:
        """The regulariser needs no labels, so it sees the target from the first step."""
        return self.ssr.domains != "source"

    def term_names(self) -> list[str]:
        """Names of the loss terms in the log."""
        return [*super().term_names(), f"loss/{self.ssr.regulariser}"]

    def prepare(self, batch: Batch) -> Batch:
        """Adds the kept features of the source images, where features are kept."""
        if self.views is None:
            return batch
        return dataclasses.replace(batch, source_features=self.views(batch.source_image))

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """Features that are on the device are cut first."""
        places = {"source": batch.source_places, "target": batch.target_places}
        found = {f"{name}_features": self.resident[name](at) for name, at in places.items() if at is not None}
        return super().compute(dataclasses.replace(batch, **found), begun)

    def regularise(
        self, batch: Batch, source: Tensor, mixed: Mixed | None, output: SegmentorOutput, begun: bool
    ) -> dict[str, Tensor]:
        """The weighted regulariser on the chosen half of the batch."""
        count = source.shape[0]
        keep = {"source": slice(0, count), "mixed": slice(count, None), "both": slice(None)}[self.ssr.domains]
        target = self._target(batch, source, mixed, keep)  # [B, hs, ws, D]
        if isinstance(self.regulariser, CosineAlignment):
            loss = self.running("regulariser")(output, keep, target)
        else:
            loss = self._injected(batch, mixed, output, keep, target, begun)
        return {f"loss/{self.ssr.regulariser}": self.ssr.weight * loss}

    def _target(self, batch: Batch, source: Tensor, mixed: Mixed | None, keep: slice) -> Tensor:
        """The encoder's features [B, hs, ws, D] of the chosen half or halves."""
        if batch.source_features is None:
            assert self.encoder is not None, "the batch brings no features"
            features: Tensor = self.encoder((source if mixed is None else torch.cat([source, mixed.image]))[keep])
            return features
        parts = {} if self.ssr.domains == "mixed" else {"source": batch.source_features}
        if mixed is not None and self.ssr.domains != "source":
            parts["mixed"] = self._of_mixed(batch, mixed)
            if "source" in parts:
                parts["source"] = _at_grid_of(parts["mixed"], parts["source"])
        return alignment_target(torch.cat([part.to(self.dtype) for part in parts.values()]), self.standardise)

    def _of_mixed(self, batch: Batch, mixed: Mixed) -> Tensor:
        """The features [B, D, h, w] of the mixed images: composed of stored ones where batches bring both, else new."""
        if batch.source_features is not None and batch.target_features is not None:
            return compose(mixed.mask, batch.source_features, batch.target_features)
        assert self.encoder is not None, "the batch brings no features of the target"
        return self.encoder.encode(mixed.image)

    def _injected(
        self, batch: Batch, mixed: Mixed | None, output: SegmentorOutput, keep: slice, target: Tensor, begun: bool
    ) -> Tensor:
        """Cross-entropy of the second decoding, on the same labels and weights as the first."""
        features = self.running("regulariser")([feature[keep] for feature in output.features], target)
        both = mixed is not None and self.ssr.domains == "both"
        _, logits = self.running("student").decode(features, domains=2 if both else 1)
        if mixed is None or self.ssr.domains == "source":
            return self.cross_entropy(logits, batch.source_label)
        mixed_label, mixed_weight = mixed.label, mixed.weight
        if self.ssr.domains == "mixed":
            return self.cross_entropy(logits, mixed_label, mixed_weight)
        parts = logits.chunk(2)
        loss = self.cross_entropy(parts[0], batch.source_label)
        return loss + self.cross_entropy(parts[1], mixed_label, mixed_weight) if begun else loss


def _at_grid_of(other: Tensor, features: Tensor) -> Tensor:
    """Features [B, D, h, w] on the grid of others: an encoder that resizes its input sees a crop in more tokens."""
    if features.shape[-2:] == other.shape[-2:]:
        return features
    return resize_frozen(features, (other.shape[-2], other.shape[-1]))
