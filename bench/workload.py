"""What the steps that are compared work on: networks, options and batches, equal for every row.

B images a domain, H W pixels, K classes.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from bench.ledger.counting import Ledger
from bench.ledger.recipes import MODEL, CountedStep
from ssr_fast.data.batch import Batch
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.data.scenes import NAMES, ScenesConfig, draw_scene
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.methods.method import class_weights
from ssr_fast.methods.self_training import SelfTraining, SelfTrainingConfig
from ssr_fast.methods.ssr import Ssr, SsrConfig, StoredFeatures
from ssr_fast.models.sam import SHAPES, FrozenEncoder
from ssr_fast.models.sam_encoder import SamEncoder
from ssr_fast.models.segmentor import Segmentor, build_segmentor
from ssr_fast.presets import demo

STEPS = 40000
"""Of the run to which the steps belong: the learning rate's schedule."""
SCENES = 16
"""Different scenes a domain in the demo's batches."""
DEMO_THINGS = (2, 7)
"""Buildings and cars: of the demo's classes those that fill a feature pixel."""
DECIDED = 10.0
"""By how much `decided` widens a fresh network's logits."""
DROP_PATH = 0.1
"""Stochastic depth of the demo's network, which has none of its own: DAFormer's."""


@dataclass(frozen=True)
class Workload:
    """One size.

    Attributes:
        name: for tables.
        student: the network that every row starts from; it is copied.
        reference: the frozen backbone of the feature distance; it is copied.
        weights: float32 [256], of the classes.
        things: classes of the feature distance.
        config: of the method.
        optim: of the optimiser.
        batches: taken in turn, on the host.
        seed: of the steps' random numbers.
        sam: one of models.sam.SHAPES, which regularises online; empty: self-training alone.
        encoder: that one, with random weights; it is copied.
    """

    name: str
    student: Segmentor
    reference: nn.Module
    weights: Tensor
    things: tuple[int, ...]
    config: SelfTrainingConfig
    optim: OptimConfig
    batches: tuple[Batch, ...]
    seed: int = 3
    sam: str = ""
    encoder: SamEncoder | None = None

    @property
    def images(self) -> int:
        """Images that the student sees in a step: B of the source and B mixed ones."""
        return 2 * len(self.batches[0].source_image)

    def method(self, device: torch.device) -> SelfTraining:
        """The method on a device, the same at every call; SSR's with the cosine regulariser at every point."""
        return self._method(copy.deepcopy(self.encoder)).to(device).train()

    def _method(self, encoder: SamEncoder | None) -> SelfTraining:
        student, reference = copy.deepcopy(self.student), copy.deepcopy(self.reference)
        common = (student, self.weights, self.seed, self.config, self.student.class_count)
        if encoder is None:
            return SelfTraining(*common, self.things, reference)
        frozen = FrozenEncoder(encoder, _side(self.sam), standardise=False)
        return Ssr(*common, SsrConfig(), frozen, things=self.things, reference=reference, stored=self._stored())

    def _stored(self) -> StoredFeatures:
        """What a run finds out by encoding a blank image, which takes seconds on a CPU."""
        return StoredFeatures(SHAPES[self.sam].out, standardise=False)

    def flops(self, device: torch.device) -> int:
        """Floating point operations of our step, counted by the ledger while the step runs once in float32.

        The encoder's are counted on one image, with attention as wide as its heads (form "mask"): what another form
        computes besides does not count. The products inside align are left out, as in the ledger.
        """
        method = self._method(None).to(device).train()
        step = CountedStep(method, self.optim, STEPS)
        with step.counted_by(*method.children()) as ledger:
            step(self.batches[0].to(device), 0)
        return ledger.counts.flops + (self.images * self._encoder_flops(device) if self.sam else 0)

    @torch.no_grad()
    def _encoder_flops(self, device: torch.device) -> int:
        encoder = SamEncoder(SHAPES[self.sam], "mask").eval().to(device)
        height, width = self.batches[0].source_image.shape[1:3]
        side = _side(self.sam)
        image = torch.zeros(1, 3, side or height, side or width, device=device)
        encoder(image)  # its tables are made once, at the first image
        with Ledger(encoder) as ledger:
            encoder(image)
        return ledger.counts.flops


def _side(sam: str) -> int | None:
    """The side of the squares that an encoder takes; None: images as they are."""
    return SHAPES[sam].size if SHAPES[sam].absolute_positions else None


def _encoder(sam: str) -> SamEncoder | None:
    """Random weights, and random positions too, which segment-anything initialises with zeros."""
    if not sam:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = SamEncoder(SHAPES[sam]).requires_grad_(False)
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                nn.init.normal_(parameter, std=0.5)
    return encoder


def demo_workload(images: int = 4, height: int = 96, width: int = 192, sam: str = "") -> Workload:
    """The demo's network, options and scenes; every pseudo-label counts (tests/bench/test_levers.py says why).

    Args:
        images: B.
        height, width: of the scenes.
        sam: see Workload.
    """
    preset = demo()
    student = build_segmentor(replace(preset.model, drop_path=DROP_PATH), len(NAMES), 3)
    scenes = ScenesConfig(height=height, width=width)
    batches = tuple(_batch(scenes, first, images) for first in range(0, SCENES, images))
    labels = torch.cat([batch.source_label.flatten() for batch in batches])
    return Workload(
        f"demo, {images}+{images}@{height}x{width}" + _with(sam),
        student,
        copy.deepcopy(student.backbone),
        class_weights(preset.method.class_weight, torch.bincount(labels.long(), minlength=len(NAMES)).tolist()),
        DEMO_THINGS,
        replace(preset.self_training, start_step=0, threshold=0.0, feature_distance=0.005),
        replace(preset.optim, lr=preset.optim.lr / 10, clip_norm=0.0, decay_steps=STEPS),  # tamer: losses are compared
        batches,
        sam=sam,
        encoder=_encoder(sam),
    )


def full_workload(images: int, crop: int, sam: str = "") -> Workload:
    """MiT-B5 with the DAFormer head and DAFormer's options, from random weights, on scenes of a crop's size.

    Args:
        images: B.
        crop: H = W.
        sam: see Workload.
    """
    student = decided(build_segmentor(MODEL, CITYSCAPES.count, 3))
    return Workload(
        f"MiT-B5, {images}+{images}@{crop}" + _with(sam),
        student,
        copy.deepcopy(student.backbone),
        torch.ones(256),
        CITYSCAPES.things,
        SelfTrainingConfig(threshold=0.0),
        OptimConfig(decay_steps=STEPS),
        (_batch(ScenesConfig(height=crop, width=crop), 0, images),),
        sam=sam,
        encoder=_encoder(sam),
    )


def decided(student: Segmentor) -> Segmentor:
    """The network, in place, with logits as wide as a trained one's.

    A fresh classifier's are nearly 0, so that the losses are the logarithm of the number of classes whatever the
    backbone does: measured with MiT-B5 on crops of 128, a bfloat16 row without any MLP would be off by 4e-3 then, by
    4e-2 so; the right one is off by 2e-4 and 1e-3.
    """
    classifier = [one for one in student.decode_head.modules() if isinstance(one, nn.Conv2d)][-1]
    assert classifier.out_channels == student.class_count
    with torch.no_grad():
        classifier.weight.mul_(DECIDED)
    return student


def _with(sam: str) -> str:
    return f", SAM {sam} online" if sam else ""


def _batch(scenes: ScenesConfig, first: int, count: int) -> Batch:
    """Scenes number first .. first + count - 1 of both domains."""
    drawn = [draw_scene(scenes, "source", number) for number in range(first, first + count)]
    target = [draw_scene(scenes, "target", number)[0] for number in range(first, first + count)]
    label = torch.from_numpy(np.stack([layout.label for _, layout in drawn]))
    image = torch.from_numpy(np.stack([picture for picture, _ in drawn]))
    return Batch(image, label, torch.from_numpy(np.stack(target)), torch.ones(label.shape, dtype=torch.bool))
