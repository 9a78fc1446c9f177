"""A model from disk as evaluation and prediction use it: on its device, with classes and the settings it came with."""

from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser

from ssr_fast.data.labels import CITYSCAPES, ClassSet, distinct_colors
from ssr_fast.errors import UserError
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.weights import LoadedModel, load_model

Tell = Callable[[str], None]

_SETTINGS = ("inference", "resize")


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
    inference, resize = _settings(loaded.meta)
    return ShippedModel(loaded.segmentor.to(where), where, _classes(loaded, tell), inference, resize)


def check_classes(model: ShippedModel, data: ClassSet, root: str, tell: Tell) -> None:
    """See that a model and labelled data tell the same number of classes apart; name differences are told.

    Raises:
        UserError: the numbers differ.
    """
    ours, theirs = model.classes.names, data.names
    if len(ours) != len(theirs):
        raise UserError(
            f"the model tells {len(ours)} classes apart ({', '.join(ours[:2])}, ...) and the data at {root} has "
            f"{len(theirs)} ({', '.join(theirs[:2])}, ...): give data with the model's classes"
        )
    differing = [(our, their) for our, their in zip(ours, theirs, strict=True) if our.lower() != their.lower()]
    if differing:
        our, their = differing[0]
        tell(
            f"{len(differing)} classes have other names in the data ({our!r} is {their!r}): they are matched by number"
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


def _settings(meta: Mapping[str, Any]) -> tuple[InferenceConfig, tuple[int, int] | None]:
    """The settings in the model's config.json; other programs' files have none."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InferenceConfig, "inference")
    parser.add_argument("--resize", type=tuple[int, int] | None, default=None)
    try:
        options = parser.instantiate(parser.parse_object({key: meta[key] for key in _SETTINGS if key in meta}))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the model's config.json has settings that this version does not know ({reason})") from error
    inference: InferenceConfig = options.inference
    if problems := inference.problems("inference"):
        raise UserError(f"the model's config.json has illegal settings: {'; '.join(problems)}")
    return inference, options.resize
