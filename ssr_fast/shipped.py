"""A model from disk as evaluation and prediction use it: on its device, with classes and the settings it came with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ssr_fast.data.labels import CITYSCAPES, ClassSet, distinct_colors
from ssr_fast.errors import UserError
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.weights import LoadedModel, load_model

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ShippedModel:
    """What `open_model` gives.

    Attributes:
        segmentor: in eval mode on `device`.
        device: where it runs.
        classes: its class set; a file that names none gets Cityscapes' if it has 19 classes, else numbered ones.
        inference, resize: how the images were seen when the model was evaluated after its training.
    """

    segmentor: Segmentor
    device: torch.device
    classes: ClassSet
    inference: InferenceConfig
    resize: tuple[int, int] | None


def open_model(path: str, device: str, tell: Tell) -> ShippedModel:
    """Load a model.

    Args:
        path: a run directory, model.safetensors, or a checkpoint of another format that models/weights.py reads.
        device: auto (the GPU if there is one), cpu, cuda or cuda:<n>.
        tell: takes one-line messages.

    Raises:
        UserError: the checkpoint cannot be read, or there is no such device.
    """
    where = _device(device)
    loaded = load_model(path, report=tell)
    return ShippedModel(
        segmentor=loaded.segmentor.to(where),
        device=where,
        classes=_classes(loaded, tell),
        inference=_inference(loaded.meta.get("inference")),
        resize=_resize(loaded.meta.get("resize")),
    )


def given(argv: Sequence[str], option: str) -> bool:
    """Whether the user gave an option or, of a group of options, one of its members."""
    names = [word.partition("=")[0] for word in argv]
    return any(name == f"--{option}" or name.startswith(f"--{option}.") for name in names)


def _device(name: str) -> torch.device:
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UserError(f"--device {name} is unknown: give auto, cpu, cuda or cuda:<number>")
    if kind == "cuda" and int(number or 0) >= gpus:
        raise UserError(f"--device {name} is not there, PyTorch finds {gpus} GPUs: give auto or cpu")
    return torch.device(name)


def _classes(loaded: LoadedModel, tell: Tell) -> ClassSet:
    count = loaded.segmentor.class_count
    if loaded.classes is not None:
        colors = tuple((red, green, blue) for red, green, blue in loaded.classes["colors"])
        return ClassSet("the model's", tuple(loaded.classes["names"]), colors)
    names = loaded.meta.get("names")
    if isinstance(names, list) and len(names) == count and not all(name.startswith("LABEL_") for name in names):
        tell("the checkpoint names its classes without colours: they get generated ones")
        return ClassSet("the model's", tuple(names), distinct_colors(count))
    if count == CITYSCAPES.count:
        tell("the checkpoint does not name its classes: with 19 of them they are taken for Cityscapes'")
        return CITYSCAPES
    tell(f"the checkpoint does not name its {count} classes: they are called class 0 to class {count - 1}")
    return ClassSet("the model's", tuple(f"class {index}" for index in range(count)), distinct_colors(count))


def _inference(value: Any) -> InferenceConfig:
    """The settings in the model's config.json; other programs' files have none."""
    if not isinstance(value, dict):
        return InferenceConfig()
    known = {field.name for field in fields(InferenceConfig)}
    pairs = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items() if name in known}
    config = InferenceConfig(**pairs)
    if problems := config.problems("inference"):
        raise UserError(f"the model's config.json has an illegal inference section: {'; '.join(problems)}")
    return config


def _resize(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    return None
