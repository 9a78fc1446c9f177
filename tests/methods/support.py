"""A tiny network, batch and encoder for the tests of the methods."""

import dataclasses

import torch
from torch import nn

from ssr_fast.data.batch import Batch
from ssr_fast.data.labels import ClassSet
from ssr_fast.methods.build import build_method
from ssr_fast.methods.method import MethodConfig
from ssr_fast.methods.self_training import SelfTrainingConfig
from ssr_fast.methods.source_free import SourceFree, SourceFreeConfig
from ssr_fast.methods.ssr import SsrConfig, StoredFeatures
from ssr_fast.models.sam import SamConfig
from ssr_fast.models.segmentor import ModelConfig, build_segmentor

K = 5
CLASSES = ClassSet("five", tuple("abcde"), tuple((i, i, i) for i in range(K)), (3, 4))


class TinyEncoder(nn.Module):
    """[B, 3, H, W] -> [B, 6, H / 16, W / 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, 16)

    def forward(self, images):
        return self.conv(images)


def tiny_encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return TinyEncoder()


def make_batch(size=(64, 96), count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (2, count, *size, 3), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, K, (count, size[0] // 16, size[1] // 16), generator=generator, dtype=torch.uint8)
    label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)
    label[:, :3] = 255
    segments = torch.randint(0, 12, (count, size[0] // 8, size[1] // 8), generator=generator, dtype=torch.int32)
    segments = segments.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return Batch(image[0], label, image[1], torch.ones(count, *size, dtype=torch.bool), target_segments=segments)


def without_source(batch):
    """The batch that a method without source data gets."""
    return dataclasses.replace(batch, source_image=batch.source_image[:0], source_label=batch.source_label[:0])


def make_source_free(seed=0, **options):
    """The method on a source model of its own, with thresholds that a network without training can meet."""
    values = {"threshold": 0.1, "majority": 0.51, "projection": 16, "segments": 8, "pixels": 6, **options}
    student = build_segmentor(ModelConfig(backbone="mit_tiny", head="segformer", channels=16), K, seed)
    return SourceFree(student, torch.ones(256), seed, SourceFreeConfig(**values), K).train()


def with_features(batch, seed=0, grid=None, target=True):
    """The batch with stored features, as the loader lays them out."""
    generator = torch.Generator().manual_seed(seed)
    count, height, width = batch.source_label.shape
    shape = (2, count, *(grid or (height // 16, width // 16)), 6)
    source, other = torch.randn(shape, generator=generator).permute(0, 1, 4, 2, 3)
    return dataclasses.replace(batch, source_features=source, target_features=other if target else None)


def make_method(name, seed=0, *, ssr=None, weights="none", model=None, features="online", sam=None, **self_training):
    values = {"feature_distance": 0.0, "threshold": 0.0, **self_training}
    return build_method(
        name,
        method=MethodConfig(name=name, class_weight=weights),
        model=model or ModelConfig(backbone="mit_tiny", channels=16, drop_path=0.2),
        self_training=SelfTrainingConfig(**values),
        ssr=ssr or SsrConfig(),
        source_free=SourceFreeConfig(),
        sam=SamConfig(**{"encoder": "tests.methods.support:tiny_encoder", "features": features, **(sam or {})}),
        classes=CLASSES,
        counts=[100, 50, 25, 13, 12],
        seed=seed,
        device=torch.device("cpu"),
        stored=StoredFeatures(6, bool((sam or {}).get("standardise"))) if features == "cached_full" else None,
    )
