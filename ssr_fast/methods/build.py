"""One function that builds any method from its options."""

import copy
from collections.abc import Sequence

import torch

from ssr_fast.data.labels import ClassSet
from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method, MethodConfig, class_weights
from ssr_fast.methods.self_training import SelfTraining, SelfTrainingConfig
from ssr_fast.methods.source_free import SourceFree, SourceFreeConfig
from ssr_fast.methods.ssr import Ssr, SsrConfig, StoredFeatures
from ssr_fast.models.feature_cache import ViewCache
from ssr_fast.models.sam import SamConfig, build_sam
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor
from ssr_fast.models.weights import load_backbone, load_model


def build_method(
    name: str,
    *,
    method: MethodConfig,
    model: ModelConfig,
    self_training: SelfTrainingConfig,
    ssr: SsrConfig,
    source_free: SourceFreeConfig,
    sam: SamConfig,
    classes: ClassSet,
    counts: Sequence[int],
    seed: int,
    device: torch.device,
    stored: StoredFeatures | None = None,
) -> Method:
    """Build the nets of a method on a device, in training mode; equal options give bit-equal weights.

    Args:
        name: one of METHODS (`method.name` may list a preset's other stages).
        counts: source pixels of each class, for the class weights.
        stored: what batches bring features of; None if they bring none.

    Raises:
        UserError: weights that cannot be read, or are of another model or of other classes.
    """
    if name == "source_free":
        source_model = _source_model(source_free.model, classes)
        built: Method = SourceFree(source_model, torch.ones(256), seed, source_free, classes.count)
        return built.to(device).train()
    student = build_segmentor(model, classes.count, seed)
    if model.weights:
        load_backbone(student, model.weights)
    weights = class_weights(method.class_weight, counts)
    if name == "supervised":
        return Method(student, weights, seed).to(device).train()
    if self_training.feature_distance > 0 and not classes.things:
        raise UserError(
            f"--self_training.feature_distance {self_training.feature_distance} works on thing classes and the classes "
            f"of this data set ({classes.name}) name none: give --self_training.feature_distance 0"
        )
    reference = copy.deepcopy(student.backbone) if self_training.feature_distance > 0 else None
    if name == "self_training":
        built = SelfTraining(student, weights, seed, self_training, classes.count, classes.things, reference)
    else:
        encoder = build_sam(sam) if sam.encodes(ssr.domains) else None
        built = Ssr(
            student,
            weights,
            seed,
            self_training,
            classes.count,
            ssr,
            encoder,
            ViewCache(encoder) if encoder is not None and sam.features == "cached_views" else None,
            classes.things,
            reference,
            stored=stored,
        )
    return built.to(device).train()


def _source_model(path: str, classes: ClassSet) -> Segmentor:
    """The network that source-free adaptation starts from."""
    student = load_model(path).segmentor
    if student.class_count != classes.count:
        raise UserError(
            f"--source_free.model {path} tells {student.class_count} classes apart and the target's evaluation data "
            f"has {classes.count}: give a model that was trained for these classes"
        )
    return student
