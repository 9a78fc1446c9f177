"""Protocols: which classes' IoU make up the mean that papers print.

Every protocol reads the same full confusion matrix. SYNTHIA's 16 and 13 classes are means over a part of the classes,
while predictions on and of the other classes still count as errors, as DAFormer, HRDA and MIC evaluate
(their mIoU16 is mIoU19 * 19 / 16 for a network that never predicts the three absent classes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.errors import UserError
from ssr_fast.eval.confusion import class_iou

_SYNTHIA_ABSENT = (9, 14, 16)  # terrain, truck, train
_SYNTHIA13_DROPPED = (*_SYNTHIA_ABSENT, 3, 4, 5)  # wall, fence, pole


def _without(dropped: Sequence[int]) -> tuple[int, ...]:
    return tuple(index for index in range(CITYSCAPES.count) if index not in dropped)


# Protocol name -> the class numbers that it averages; None means all classes of any data set.
PROTOCOLS: Mapping[str, tuple[int, ...] | None] = MappingProxyType(
    {
        "cityscapes19": _without(()),
        "synthia16": _without(_SYNTHIA_ABSENT),
        "synthia13": _without(_SYNTHIA13_DROPPED),
        "generic": None,
    }
)


@dataclass(frozen=True)
class Scores:
    """What one protocol says. All numbers are percent; nan where no pixel decides.

    Attributes:
        protocol: its name.
        miou: mean of the protocol's classes that have a union.
        per_class: IoU of each of the protocol's classes by name, nan for a class without a union.
        accuracy: share of the labelled pixels of the protocol's classes that are predicted right.
    """

    protocol: str
    miou: float
    per_class: dict[str, float]
    accuracy: float


def fitting_protocols(names: Sequence[str]) -> list[str]:
    """The protocols that apply to a class set, the usual one first."""
    return ["cityscapes19", "synthia16", "synthia13"] if _is_cityscapes(names) else ["generic"]


def protocol_classes(protocol: str, names: Sequence[str]) -> tuple[int, ...]:
    """The class numbers that a protocol averages over, for a class set with these names.

    Raises:
        UserError: the protocol is unknown or needs Cityscapes' 19 classes and these are others.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol} is unknown: choose one of {', '.join(PROTOCOLS)}, all")
    classes = PROTOCOLS[protocol]
    if classes is None:
        return tuple(range(len(names)))
    if not _is_cityscapes(names):
        raise UserError(
            f"--protocol {protocol} needs Cityscapes' 19 classes, and the data has {len(names)} "
            f"({', '.join(names[:3])}, ...): use --protocol generic"
        )
    return classes


def score(counts: Tensor, names: Sequence[str], protocol: str = "generic") -> Scores:
    """Scores of a confusion matrix.

    Args:
        counts: int64 [K, K], rows = truth.
        names: the K classes' names.
        protocol: a key of PROTOCOLS.

    Raises:
        UserError: as protocol_classes.
        ValueError: counts and names differ in size, or two classes share a name.
    """
    classes = protocol_classes(protocol, names)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"counts {tuple(counts.shape)} do not fit {len(names)} class names")
    if len(set(names)) != len(names):
        raise ValueError(f"class names repeat: {', '.join(names)}")
    counts = counts.detach().cpu()
    iou = class_iou(counts)
    per_class = {names[index]: 100.0 * float(iou[index]) for index in classes}
    valid = [value for value in per_class.values() if not math.isnan(value)]
    labelled = int(counts[list(classes)].sum())
    right = int(counts.diagonal()[list(classes)].sum())
    return Scores(
        protocol=protocol,
        miou=sum(valid) / len(valid) if valid else math.nan,
        per_class=per_class,
        accuracy=100.0 * right / labelled if labelled else math.nan,
    )


def _is_cityscapes(names: Sequence[str]) -> bool:
    return [_plain(name) for name in names] == [_plain(name) for name in CITYSCAPES.names]


def _plain(name: str) -> str:
    """A class name without case, spaces, hyphens and underscores: data sets write "traffic light" in many ways."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
