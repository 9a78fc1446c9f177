"""Presets: functions that return a configuration. Copy one and edit it.

Sizes and schedules are DAFormer's; the methods are an option (`--method.name`). The data roots have no default.
"""

from collections.abc import Callable

from ssr_fast.config import TrainConfig
from ssr_fast.data.index import DomainConfig
from ssr_fast.data.loader import DataConfig
from ssr_fast.data.plan import SamplingConfig
from ssr_fast.data.scenes import ScenesConfig
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.methods.method import MethodConfig
from ssr_fast.methods.self_training import SelfTrainingConfig
from ssr_fast.methods.source_free import SourceFreeConfig
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.sam import SamConfig
from ssr_fast.models.segmentor import ModelConfig

COMPARE = ("supervised", "self_training", "ssr")
SOURCE_FREE = ("supervised", "source_free")


def demo() -> TrainConfig:
    """Procedural scenes, three methods from the same start, minutes on a CPU: shows the mechanism at work."""
    return TrainConfig(
        run=RunConfig(steps=130, stages=COMPARE, log_every=10, evaluate_every=65, save_every=65, samples=6),
        data=DataConfig(
            scenes=ScenesConfig(evaluation_count=64),
            crop=(96, 192),
            batch_size=4,
            workers=0,
            cache=True,
            sampling=SamplingConfig(rare_class=False, max_class_share=1.0),
        ),
        model=ModelConfig(backbone="mit_tiny", head="segformer", channels=64, drop_path=0.0, dropout=0.1),
        method=MethodConfig(name="ssr", class_weight="inverse_sqrt"),
        self_training=SelfTrainingConfig(
            start_step=75, momentum=0.95, threshold=0.9, ignore_top=0.0, ignore_bottom=0.0, feature_distance=0.0
        ),
        ssr=SsrConfig(points=("fused",), weight=6.0),
        sam=SamConfig(encoder="small", standardise=True, features="cached_views"),
        optim=OptimConfig(lr=7e-3, head_lr_factor=1.0, warmup_steps=10, clip_norm=1.0),
    )


def camvid_day_dusk() -> TrainConfig:
    """CamVid, day to dusk: small real data (give --data.source.root, the others follow it), runs on a CPU."""
    return TrainConfig(
        run=RunConfig(steps=200, stages=COMPARE, log_every=20, evaluate_every=100, save_every=100),
        data=DataConfig(
            source=DomainConfig(layout="camvid", split="train", condition="day", resize=(320, 240)),
            target=DomainConfig(layout="camvid", split="train", condition="dusk", resize=(320, 240)),
            evaluation=DomainConfig(layout="camvid", split="test", condition="dusk", resize=(320, 240)),
            crop=(144, 192),
            batch_size=2,
            workers=0,
            cache=True,
            sampling=SamplingConfig(temperature=0.1),
        ),
        model=ModelConfig(backbone="mit_b0", head="segformer", channels=128),
        method=MethodConfig(name="ssr", class_weight="inverse_sqrt"),
        self_training=SelfTrainingConfig(
            start_step=100, momentum=0.95, threshold=0.9, ignore_top=0.0, ignore_bottom=0.0, feature_distance=0.0
        ),
        ssr=SsrConfig(points=("fused",)),
        sam=SamConfig(encoder="small", standardise=True),
        optim=OptimConfig(lr=1e-3, head_lr_factor=2.0, warmup_steps=20, clip_norm=1.0),
    )


def demo_source_free() -> TrainConfig:
    """The demo's scenes: a model trained on the source, then adapted to the target without the source."""
    config = demo()
    config.run.stages, config.method.name = SOURCE_FREE, "source_free"
    config.source_free = SourceFreeConfig(
        momentum=0.995,
        threshold=0.9,
        ignore_top=0.0,
        ignore_bottom=0.0,
        lr_factor=0.6,
        contrast=0.3,
        projection=64,
        segments=48,
        pixels=8,
        majority=0.51,
    )
    return config


def camvid_day_dusk_source_free() -> TrainConfig:
    """CamVid, day to dusk, the dusk without the day: needs segment maps of --data.target.root (prepare masks)."""
    config = camvid_day_dusk()
    config.run.stages, config.method.name = SOURCE_FREE, "source_free"
    config.source_free = SourceFreeConfig(
        momentum=0.99,
        threshold=0.9,
        ignore_top=0.0,
        ignore_bottom=0.0,
        lr_factor=0.1,
        contrast=0.1,
        projection=128,
        pixels=8,
    )
    return config


def gta5_cityscapes_source_free() -> TrainConfig:
    """A model trained on GTA5 (--source_free.model) to Cityscapes, without GTA5."""
    config = _to_cityscapes("gta5", (1280, 720))
    config.data.source, config.method.name = DomainConfig(), "source_free"
    return config


def gta5_cityscapes() -> TrainConfig:
    """GTA5 to Cityscapes: DAFormer's protocol at 512 x 512 with MiT-B5."""
    return _to_cityscapes("gta5", (1280, 720))


def synthia_cityscapes() -> TrainConfig:
    """SYNTHIA to Cityscapes."""
    return _to_cityscapes("synthia", (1280, 760))


def cityscapes_acdc() -> TrainConfig:
    """Cityscapes to ACDC (fog, night, rain, snow)."""
    config = _to_cityscapes("cityscapes", (1024, 512))
    config.data.target = DomainConfig(layout="acdc", split="train", resize=(960, 540))
    config.data.evaluation = DomainConfig(layout="acdc", split="val", resize=(960, 540))
    return config


def cityscapes_darkzurich() -> TrainConfig:
    """Cityscapes to Dark Zurich (night)."""
    config = _to_cityscapes("cityscapes", (1024, 512))
    config.data.target = DomainConfig(layout="darkzurich", split="train", condition="night", resize=(960, 540))
    config.data.evaluation = DomainConfig(layout="darkzurich", split="val", condition="night", resize=(960, 540))
    return config


def folder() -> TrainConfig:
    """Your own images: folders with images/, labels/ and a classes file, any number of classes."""
    return TrainConfig(
        data=DataConfig(
            source=DomainConfig(layout="folder"),
            target=DomainConfig(layout="folder"),
            evaluation=DomainConfig(layout="folder", split="val"),
        ),
        self_training=SelfTrainingConfig(ignore_top=0.0, ignore_bottom=0.0, feature_distance=0.0),
    )


def _to_cityscapes(source: str, box: tuple[int, int]) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            source=DomainConfig(layout=source, split="train", resize=box),
            target=DomainConfig(layout="cityscapes", split="train", resize=(1024, 512)),
            evaluation=DomainConfig(layout="cityscapes", split="val", resize=(1024, 512)),
        ),
        method=MethodConfig(name="ssr"),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-source-free": demo_source_free,
    "camvid-day-dusk": camvid_day_dusk,
    "camvid-day-dusk-source-free": camvid_day_dusk_source_free,
    "gta5-cityscapes": gta5_cityscapes,
    "gta5-cityscapes-source-free": gta5_cityscapes_source_free,
    "synthia-cityscapes": synthia_cityscapes,
    "cityscapes-acdc": cityscapes_acdc,
    "cityscapes-darkzurich": cityscapes_darkzurich,
    "folder": folder,
}
ABOUT = {
    "demo": "Procedural street scenes: a clean rendering with labels as the source, a camera-like target whose labels "
    "only the evaluation sees. It shows the mechanism in a setting built for it: the small encoder was trained, "
    "without classes, on scenes of the same layout generator. It is no evidence for GTA5 to Cityscapes.",
    "demo-source-free": "Procedural street scenes: a model trained on the clean rendering adapts to the camera-like "
    "target without the source, by pseudo-labels and by contrasting pixels of superpixels. It shows the mechanism in a "
    "setting built for it, and is no evidence for GTA5 to Cityscapes.",
    "camvid-day-dusk": "CamVid's day sequences as the source and its dusk sequence as the target. Without pretrained "
    "weights and at a few hundred steps this shows that the pipeline works on real images, not what the methods reach.",
    "camvid-day-dusk-source-free": "A model trained on CamVid's day sequences adapts to its dusk sequence without "
    "them. Without pretrained weights and at a few hundred steps this shows that the pipeline works on real images.",
}
