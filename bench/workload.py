"""What the steps that are compared work on: networks, options and batches, equal for every row.

B images a domain, H W pixels, K classes.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from bench.ledger.recipes import MODEL, CountedStep
from ssr_fast.data.batch import Batch
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.data.scenes import NAMES, ScenesConfig, draw_scene
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.methods.method import class_weights
from ssr_fast.methods.self_training import SelfTraining, SelfTrainingConfig
from ssr_fast.models.segmentor import Segmentor, build_segmentor
from ssr_fast.presets import demo

STEPS = 40000
"""Of the run to which the steps belong: the learning rate's schedule."""
SCENES = 16
"""Different scenes a domain in the demo's batches."""
DEMO_THINGS = (2, 7)
"""Buildings and cars: of the demo's classes those that fill a feature pixel."""
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

    @property
    def images(self) -> int:
        """Images that the student sees in a step: B of the source and B mixed ones."""
        return 2 * len(self.batches[0].source_image)

    def method(self, device: torch.device) -> SelfTraining:
        """The method on a device, the same at every call."""
        student, reference = copy.deepcopy(self.student), copy.deepcopy(self.reference)
        classes = self.student.class_count
        method = SelfTraining(student, self.weights, self.seed, self.config, classes, self.things, reference)
        return method.to(device).train()

    def flops(self, device: torch.device) -> int:
        """Floating point operations of our step, counted by the ledger while the step runs once in float32."""
        method = self.method(device)
        step = CountedStep(method, self.optim, STEPS)
        with step.counted_by(*method.children()) as ledger:
            step(self.batches[0].to(device), 0)
        return ledger.counts.flops


def demo_workload(images: int = 4, height: int = 96, width: int = 192) -> Workload:
    """The demo's network, options and scenes; every pseudo-label counts (tests/bench/test_levers.py says why).

    Args:
        images: B.
        height, width: of the scenes.
    """
    preset = demo()
    student = build_segmentor(replace(preset.model, drop_path=DROP_PATH), len(NAMES), 3)
    scenes = ScenesConfig(height=height, width=width)
    batches = tuple(_batch(scenes, first, images) for first in range(0, SCENES, images))
    labels = torch.cat([batch.source_label.flatten() for batch in batches])
    return Workload(
        f"demo, {images}+{images}@{height}x{width}",
        student,
        copy.deepcopy(student.backbone),
        class_weights(preset.method.class_weight, torch.bincount(labels.long(), minlength=len(NAMES)).tolist()),
        DEMO_THINGS,
        replace(preset.self_training, start_step=0, threshold=0.0, feature_distance=0.005),
        replace(preset.optim, lr=preset.optim.lr / 10, clip_norm=0.0, decay_steps=STEPS),  # tamer: losses are compared
        batches,
    )


def full_workload(images: int, crop: int) -> Workload:
    """MiT-B5 with the DAFormer head and DAFormer's options, from random weights, on scenes of a crop's size.

    Args:
        images: B.
        crop: H = W.
    """
    student = build_segmentor(MODEL, CITYSCAPES.count, 3)
    return Workload(
        f"MiT-B5, {images}+{images}@{crop}",
        student,
        copy.deepcopy(student.backbone),
        torch.ones(256),
        CITYSCAPES.things,
        SelfTrainingConfig(threshold=0.0),
        OptimConfig(decay_steps=STEPS),
        (_batch(ScenesConfig(height=crop, width=crop), 0, images),),
    )


def _batch(scenes: ScenesConfig, first: int, count: int) -> Batch:
    """Scenes number first .. first + count - 1 of both domains."""
    drawn = [draw_scene(scenes, "source", number) for number in range(first, first + count)]
    target = [draw_scene(scenes, "target", number)[0] for number in range(first, first + count)]
    label = torch.from_numpy(np.stack([layout.label for _, layout in drawn]))
    image = torch.from_numpy(np.stack([picture for picture, _ in drawn]))
    return Batch(image, label, torch.from_numpy(np.stack(target)), torch.ones(label.shape, dtype=torch.bool))
