"""Source-free adaptation: a trained model, unlabelled target images and their segments; no source image is read.

A design of this project in the spirit of "SAM-guided contrast based self-training for source-free cross-domain
semantic segmentation" (Multimedia Systems 2024, DOI 10.1007/s00530-024-01426-5). Known of the paper is its abstract:
class-agnostic SAM masks say which pixels are positive and negative pairs, a contrastive loss shapes the feature space,
a teacher-student with online pseudo-labels the label space, in one training. Its sampler, its temperature, its
thresholds and its numbers are not known to us; those here are our own.

B images, H W pixels, h w feature pixels, S segments an image, A pixels a segment, K classes, D projected channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssr_fast.data.augment import normalise_batch, strong_augment
from ssr_fast.data.batch import Batch
from ssr_fast.methods.method import Method, rows
from ssr_fast.methods.regularisers import seeded
from ssr_fast.methods.segments import Vote, at_stride, gather_rows, groups, vote
from ssr_fast.methods.self_training import TeacherConfig, row_mask
from ssr_fast.methods.teacher import Teacher
from ssr_fast.models.segmentor import Segmentor
from ssr_kernels import counter
from ssr_kernels.contrast import Samples, contrast_loss, sample_pairs
from ssr_kernels.segloss import pseudo_label


@dataclass(kw_only=True)
class SourceFreeConfig(TeacherConfig):
    """Source-free adaptation; the options `--source_free.*`."""

    model: str = ""
    """The source model: a run directory, model.safetensors, or a checkpoint of another format; unset: what the
    supervised stage of the same run has trained."""
    lr_factor: float = 1.0
    """Factor of --optim.lr for this stage: a trained model wants smaller steps than one from scratch."""
    confidence_momentum: float = 0.99
    """Rate of the running mean of the teacher's probability for each class; a class whose mean is lower has a lower
    threshold in proportion."""
    contrast: float = 0.1
    """Weight of the contrastive loss; 0 leaves self-training alone."""
    contrast_start: int = 0
    """Step from which the features are contrasted."""
    temperature: float = 0.1
    """Temperature of the contrastive loss."""
    projection: int = 256
    """Channels of the projection that is contrasted; it is dropped after training."""
    segments: int = 64
    """Segments of an image that take part, the largest ones."""
    pixels: int = 32
    """Pixels drawn of each segment in a step."""
    majority: float = 0.6
    """A segment has a class if this share of its pixels has confident pseudo-labels of it."""
    vote: bool = False
    """Whether a segment's class replaces the pseudo-labels inside it."""

    def uses_segments(self) -> bool:
        """Whether segment maps are read at all."""
        return self.contrast > 0 or self.vote

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = super().problems(where)
        if not 0.0 <= self.confidence_momentum < 1.0:
            found.append(f"--{where}.confidence_momentum must lie in [0, 1) (it is {self.confidence_momentum})")
        if self.lr_factor <= 0:
            found.append(f"--{where}.lr_factor must be > 0 (it is {self.lr_factor})")
        for name in ("contrast", "contrast_start"):
            if getattr(self, name) < 0:
                found.append(f"--{where}.{name} must not be negative (it is {getattr(self, name)})")
        if not 0.01 <= self.temperature <= 10.0:
            found.append(f"--{where}.temperature must lie in [0.01, 10] (it is {self.temperature})")
        if not 0.5 < self.majority <= 1.0:
            found.append(f"--{where}.majority must lie in (0.5, 1] (it is {self.majority})")
        for name, most in (("projection", 256), ("segments", 1023), ("pixels", 1024)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"--{where}.{name} must be 1 to {most} (it is {getattr(self, name)})")
        return found


class Projection(nn.Module):
    """Two linear layers on rows of features, contrasted instead of the features themselves.

    Args:
        channels: C of the student's fused feature.
        width: D.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, width))

    def forward(self, features: Tensor) -> Tensor:
        """[n, C] -> [n, D]."""
        out: Tensor = self.layers(features)
        return out


class ClassConfidence(nn.Module):
    """How sure the teacher is of each class: a running mean, from which each class gets its own threshold.

    Args:
        class_count: K.
        momentum: rate of the running mean.
    """

    mean: Tensor

    def __init__(self, class_count: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.ones(class_count))

    @torch.no_grad()
    def update(self, labels: Tensor, confidence: Tensor) -> None:
        """Move the means of the classes that occur.

        Args:
            labels: int64 [B, h, w].
            confidence: float [B, h, w].
        """
        members = (labels.flatten()[:, None] == torch.arange(len(self.mean), device=labels.device)).to(torch.float32)
        count = members.sum(0)  # [K]
        now = (confidence.flatten() @ members) / count.clamp(min=1.0)
        self.mean.lerp_(torch.where(count > 0, now, self.mean), 1.0 - self.momentum)

    def thresholds(self, threshold: float) -> Tensor:
        """float32 [K]: `threshold` for the surest class, less for the others in proportion to their means."""
        return threshold * self.mean / self.mean.max().clamp(min=1e-6)


@dataclass(frozen=True)
class PseudoLabels:
    """What the teacher says of a batch of target images.

    Attributes:
        label: uint8 [B, H, W].
        weight: float32 [B, H, W], 1 where it is confident and counts.
        samples: pixels to contrast; None where segments are not used.
        vote: classes of the sampled segments; None as above.
    """

    label: Tensor
    weight: Tensor
    samples: Samples | None
    vote: Vote | None


class SourceFree(Method):
    """Teacher-student on the target alone, with contrasted pixels of segments.

    Args:
        student: the source model.
        weights, seed: see Method.
        config: the options.
        class_count: K.
    """

    stage_name = "source_free"
    own_metrics = ("loss/target", "loss/contrast", "confident", "segments_sure")

    def __init__(
        self, student: Segmentor, weights: Tensor, seed: int, config: SourceFreeConfig, class_count: int
    ) -> None:
        super().__init__(student, weights, seed)
        self.config, self.class_count = config, class_count
        self.teacher = Teacher(student, config.momentum, ramp=False)
        self.confidence = ClassConfidence(class_count, config.confidence_momentum)
        self.projection = seeded(Projection, seed, student.config.channels, config.projection)

    def computed(self) -> dict[str, nn.Module]:
        """The projection runs with the student."""
        return {**super().computed(), "projection": self.projection}

    def average(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.net

    def compute_in(self, dtype: torch.dtype, copies: bool = True) -> None:
        """The teacher too."""
        super().compute_in(dtype, copies)
        self.teacher.compute_in(dtype, copies)

    def trainable(self) -> dict[str, nn.Module]:
        """The projection trains with the backbone's learning rate; without contrast there is none."""
        return {**super().trainable(), **({"extra": self.projection} if self.config.contrast > 0 else {})}

    def saved(self) -> dict[str, nn.Module]:
        """All but the student are needed to resume; only the student is shipped."""
        kept = {"teacher": self.teacher.net, "confidence": self.confidence}
        return {**super().saved(), **kept, **({"projection": self.projection} if self.config.contrast > 0 else {})}

    def begun(self, step: int) -> bool:
        """Whether features are contrasted."""
        return self.config.contrast > 0 and step >= self.config.contrast_start

    def waits(self) -> bool:
        """The projection waits for the contrast."""
        return self.config.contrast > 0 and self.config.contrast_start > 0

    def begin(self, step: int) -> None:
        """The average too."""
        super().begin(step)
        self.teacher.follow(self.student, step)

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """Cross-entropy to the teacher's labels on the augmented target, and the contrast of its features."""
        config = self.config
        target = normalise_batch(batch.target_image)
        with torch.no_grad():
            pseudo = self.label(batch, target, counter.fold(self.key, 2))
            image = strong_augment(
                target, counter.fold(self.key, 3), config.jitter, config.jitter_probability, config.blur_probability
            )
        output = self.running("student")(image.to(self.dtype))
        terms = {"loss/target": self.cross_entropy(output.logits, pseudo.label, pseudo.weight)}
        if begun:
            terms["loss/contrast"] = config.contrast * self.contrast(output.fused, pseudo)
        loss = torch.stack(list(terms.values())).sum()
        nothing = loss.detach() * 0.0
        logged = {name: terms[name].detach() if name in terms else nothing for name in self.own_metrics[:2]}
        sure = (pseudo.vote.klass >= 0).to(torch.float32).mean() if pseudo.vote is not None else nothing
        return {"loss": loss, **logged, "confident": pseudo.weight.mean(), "segments_sure": sure}

    def label(self, batch: Batch, target: Tensor, key: Tensor) -> PseudoLabels:
        """The teacher's labels of target [B, 3, H, W], normalised and clean."""
        config, size = self.config, (target.shape[2], target.shape[3])
        logits = self.teacher(target)  # [B, K, h, w]
        surest, klass = logits.to(torch.float32).softmax(1).max(1)  # [B, h, w]
        self.confidence.update(klass, surest)
        thresholds = self.confidence.thresholds(config.threshold)
        label, confidence, _ = pseudo_label(rows(logits), size, config.threshold)
        counts = batch.target_valid & row_mask(config, size[0], target.device)
        weight = ((confidence >= thresholds[label.to(torch.int64)]) & counts).to(torch.float32)
        if not config.uses_segments():
            return PseudoLabels(label, weight, None, None)
        assert batch.target_segments is not None
        segments = at_stride(batch.target_segments, (logits.shape[2], logits.shape[3]))
        samples = sample_pairs(segments, key, config.segments, config.pixels)
        voted = vote(samples, segments, klass, surest >= thresholds[klass], self.class_count, config.majority)
        if config.vote:
            painted = voted.paint(batch.target_segments)
            label = torch.where(painted >= 0, painted, label).to(torch.uint8)
            weight = torch.where(painted >= 0, counts.to(torch.float32), weight)
        return PseudoLabels(label, weight, samples, voted)

    def contrast(self, fused: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Multi-positive InfoNCE of the projected features [B, C, h, w] at the sampled pixels."""
        assert pseudo.samples is not None and pseudo.vote is not None
        group = groups(pseudo.samples)  # [B, S, A]
        klass = pseudo.vote.klass[:, :, None].expand_as(group)
        embedding = self.running("projection")(gather_rows(fused, pseudo.samples.pixel))  # [B S A, D]
        return contrast_loss(embedding, group.flatten(), klass.flatten(), self.config.temperature)
