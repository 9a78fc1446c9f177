"""Self-training as DAFormer does it (recipe: Hoyer et al., CVPR 2022), with one summed backward.

A teacher labels the clean target image; ClassMix pastes half of the source's classes onto it; the student learns from
the strongly augmented mixture. B batch, H W pixels, h w feature pixels, K classes, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_fast.data.augment import normalise_batch, strong_augment
from ssr_fast.data.batch import Batch
from ssr_fast.methods.method import Method, rows
from ssr_fast.methods.mixing import class_masks, paste
from ssr_fast.methods.teacher import Teacher
from ssr_fast.models.segmentor import Segmentor, SegmentorOutput
from ssr_kernels import counter
from ssr_kernels.segloss import pseudo_label


@dataclass(kw_only=True)
class TeacherConfig:
    """Teacher, pseudo-labels and augmentation: what every method with a teacher can be told."""

    momentum: float = 0.999
    """Final rate of the teacher's moving average."""
    threshold: float = 0.968
    """A pseudo-label counts as confident from this probability on."""
    ignore_top: float = 15 / 512
    """Share of a crop's rows at the top whose pseudo-labels weigh nothing."""
    ignore_bottom: float = 120 / 512
    """Share of a crop's rows at the bottom whose pseudo-labels weigh nothing (the car's bonnet in Cityscapes)."""
    jitter: float = 0.2
    """Strength of the colour jitter on the student's image."""
    jitter_probability: float = 0.8
    """Probability of the colour jitter."""
    blur_probability: float = 0.5
    """Probability of the Gaussian blur."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        for name in ("momentum", "threshold", "ignore_top", "ignore_bottom", "jitter_probability", "blur_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                found.append(f"--{where}.{name} must lie in [0, 1] (it is {getattr(self, name)})")
        if not 0.0 <= self.jitter <= 0.5:
            found.append(f"--{where}.jitter must lie in [0, 0.5] (it is {self.jitter})")
        return found


@dataclass(kw_only=True)
class SelfTrainingConfig(TeacherConfig):
    """Self-training on source and target; the options `--self_training.*`. The share of confident pixels weighs the
    target's part of the mixed image."""

    start_step: int = 0
    """Step from which pseudo-labels are used; before it the student learns from the source alone."""
    feature_distance: float = 0.005
    """Weight of the distance of stage-4 features to the frozen initial backbone on thing classes; 0 switches it off.
    It needs pretrained `--model.weights`."""

    def supervised_steps(self) -> int:
        """Number of first steps in which self-training is the supervised method, bit for bit."""
        return self.start_step if self.feature_distance == 0 else 0

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = super().problems(where)
        if self.start_step < 0:
            found.append(f"--{where}.start_step must not be negative (it is {self.start_step})")
        if self.feature_distance < 0:
            found.append(f"--{where}.feature_distance must not be negative (it is {self.feature_distance})")
        return found


def row_mask(config: TeacherConfig, height: int, device: torch.device) -> Tensor:
    """bool [1, H, 1]: rows whose pseudo-labels count."""
    row = torch.arange(height, device=device).view(1, height, 1)
    top, bottom = round(config.ignore_top * height), round(config.ignore_bottom * height)
    return (row >= top) & (row < height - bottom)


@dataclass(frozen=True)
class Mixed:
    """The second half of a student batch.

    Attributes:
        image: float32 [B, 3, H, W], normalised, strongly augmented.
        label: uint8 [B, H, W], source labels and pseudo-labels.
        weight: float32 [B, H, W].
        confident: scalar, share of confident pixels.
        mask: bool [B, H, W], where the source is pasted; None where nothing is.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    confident: Tensor
    mask: Tensor | None


class SelfTraining(Method):
    """Teacher-student self-training on [source; mixed].

    Args:
        student, weights, seed: see Method.
        config: the options.
        class_count: K.
        things: classes of the feature distance.
        reference: frozen pretrained backbone of the feature distance; None where its weight is 0.
    """

    stage_name = "self_training"
    own_metrics = ("loss/mixed", "confident")
    things: Tensor

    def __init__(
        self,
        student: Segmentor,
        weights: Tensor,
        seed: int,
        config: SelfTrainingConfig,
        class_count: int,
        things: tuple[int, ...] = (),
        reference: nn.Module | None = None,
    ) -> None:
        super().__init__(student, weights, seed)
        self.config, self.class_count = config, class_count
        self.register_buffer("things", torch.tensor(things, dtype=torch.uint8).view(1, -1, 1, 1), persistent=False)
        self.teacher = Teacher(student, config.momentum)
        self.reference = reference.eval().requires_grad_(False) if reference is not None else None

    def average(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.net

    def compute_in(self, dtype: torch.dtype, copies: bool = True) -> None:
        """The teacher and the frozen reference too."""
        super().compute_in(dtype, copies)
        self.teacher.compute_in(dtype, copies)
        if self.reference is not None:
            self.reference.to(dtype)

    def train(self, mode: bool = True) -> "SelfTraining":
        """The frozen reference stays in eval mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def saved(self) -> dict[str, nn.Module]:
        """The teacher is part of a checkpoint: its parameters and its BatchNorm buffers."""
        return {**super().saved(), "teacher": self.teacher.net}

    def begun(self, step: int) -> bool:
        """Whether pseudo-labels are used."""
        return step >= self.config.start_step

    def begin(self, step: int) -> None:
        """The average too: its rate changes from step to step."""
        super().begin(step)
        self.teacher.follow(self.student, step)

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """Source and, once begun, mixed cross-entropy, feature distance and whatever a subclass adds."""
        source = normalise_batch(batch.source_image)
        mixed = self.mix(batch, source, counter.fold(self.key, 2), begun) if begun or self.wants_target() else None
        if mixed is None:
            output = self.running("student")(source.to(self.dtype))
        else:
            output = self.running("student")(torch.cat([source, mixed.image]).to(self.dtype), domains=2)
        logits = output.logits.chunk(1 if mixed is None else 2)
        terms = {"loss/source": self.cross_entropy(logits[0], batch.source_label)}
        if mixed is not None and begun:
            terms["loss/mixed"] = self.cross_entropy(logits[1], mixed.label, mixed.weight)
        if self.reference is not None:
            terms["loss/feature_distance"] = self.feature_distance(output, source, batch.source_label)
        terms |= self.regularise(batch, source, mixed, output, begun)
        loss = torch.stack(list(terms.values())).sum()
        logged = {name: terms[name].detach() if name in terms else loss.detach() * 0.0 for name in self.term_names()}
        confident = mixed.confident if mixed is not None else loss.detach() * 0.0
        return {"loss": loss, **logged, "confident": confident}

    def term_names(self) -> list[str]:
        """Names of the loss terms in the log; the same in every step."""
        return ["loss/source", "loss/mixed"] + (["loss/feature_distance"] if self.reference is not None else [])

    def wants_target(self) -> bool:
        """Whether the student sees the (unmixed) target before pseudo-labels are used."""
        return False

    def regularise(
        self, batch: Batch, source: Tensor, mixed: Mixed | None, output: SegmentorOutput, begun: bool
    ) -> dict[str, Tensor]:
        """Further weighted loss terms by name."""
        return {}

    @torch.no_grad()
    def mix(self, batch: Batch, source: Tensor, key: Tensor, begun: bool) -> Mixed:
        """Pseudo-label the target, paste source classes onto it and augment the result.

        Before it has begun nothing is pasted and nothing labelled: the image is the augmented target.
        """
        target = normalise_batch(batch.target_image)
        height, width = batch.source_label.shape[-2:]
        if begun:
            label, _, count = pseudo_label(rows(self.teacher(target)), (height, width), self.config.threshold)
            confident = count.to(torch.float32) / label.numel()
            valid = batch.target_valid & row_mask(self.config, height, target.device)
            mask = class_masks(batch.source_label, self.class_count, counter.fold(key, 1))
            weight = torch.where(mask, 1.0, confident * valid)
            label = paste(mask, batch.source_label, label)
            target = paste(mask, source, target)
        else:
            label, weight = torch.full_like(batch.source_label, 255), torch.zeros_like(source[:, 0])
            confident, mask = torch.zeros((), device=target.device), None
        config = self.config
        image = strong_augment(
            target, counter.fold(key, 2), config.jitter, config.jitter_probability, config.blur_probability
        )
        return Mixed(image, label, weight, confident, mask)

    def feature_distance(self, output: SegmentorOutput, source: Tensor, label: Tensor) -> Tensor:
        """Weighted mean L2 distance of the student's stage-4 features to the frozen backbone's on thing regions.

        A feature pixel counts where one thing class covers at least 0.75 of it; without any the term is 0.
        """
        assert self.reference is not None
        with torch.no_grad():
            anchor = self.reference(source.to(self.dtype))[-1].to(torch.float32)  # [B, C, h, w]
        feature = output.features[-1][: source.shape[0]]
        share = F.adaptive_avg_pool2d(
            (label[:, None] == self.things).to(torch.float32), (feature.shape[2], feature.shape[3])
        )
        mask = (share.amax(1) >= 0.75).to(torch.float32)  # [B, h, w]
        distance = torch.linalg.vector_norm(feature.to(torch.float32) - anchor, dim=1)
        return self.config.feature_distance * (distance * mask).sum() / mask.sum().clamp(min=1.0)
