"""The table of layouts: folders and suffixes of each data set of the field, and the values that its labels hold."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ssr_fast.data.labels import (
    CAMVID,
    CAMVID_IDS,
    CITYSCAPES,
    CITYSCAPES_IDS,
    GTA5_IDS,
    IGNORE,
    MAPILLARY_IDS,
    SYNTHIA_IDS,
    ClassSet,
)

TRAIN_IDS = "labelTrainIds"
"""How the names of label files end that hold train ids already."""

CAMVID_DUSK = "0001TP_"
"""How the names of CamVid's dusk frames begin."""

_SPLITS = {"train": "train", "val": "val", "test": "test"}
_ONE_SPLIT = {"train": ""}
_CITYSCAPES_KNOWN = (*range(35), IGNORE)
_CITYSCAPES_TRAIN_IDS = {k: k for k in range(CITYSCAPES.count)}


@dataclass(frozen=True)
class Spec:
    """One layout; in paths `{split}` and `{condition}` stand for folders.

    Args:
        images: folder of the images, searched recursively.
        labels: folders of the labels, of which the first that exists counts.
        markers: a root has this layout if one of these folders lies in it.
        ids: value in a label file -> train id.
        known: the values that label files may hold besides.
        image_suffix: what image names carry in front of the extension.
        label_suffixes: what label names carry there, best first.
        splits: name of a split -> its folder.
        conditions: names that `condition` may take.
        classes: the class set of the train ids.
        box: (width, height) of the box that the field's recipe resizes training images into; None for their own size.
    """

    images: str
    labels: tuple[str, ...]
    markers: tuple[str, ...]
    ids: Mapping[int, int] = field(default_factory=dict)
    known: Iterable[int] = (IGNORE,)
    image_suffix: str = ""
    label_suffixes: tuple[str, ...] = ("",)
    splits: Mapping[str, str] = field(default_factory=lambda: _SPLITS)
    conditions: tuple[str, ...] = ()
    classes: ClassSet = CITYSCAPES
    box: tuple[int, int] | None = None


LAYOUTS: dict[str, Spec] = {
    "cityscapes": Spec(
        images="leftImg8bit/{split}",
        labels=("gtFine/{split}",),
        markers=("leftImg8bit",),
        ids=CITYSCAPES_IDS,
        known=_CITYSCAPES_KNOWN,
        image_suffix="_leftImg8bit",
        label_suffixes=("_gtFine_labelTrainIds", "_gtFine_labelIds"),
        box=(1024, 512),
    ),
    "acdc": Spec(
        images="rgb_anon/{condition}/{split}",
        labels=("gt/{condition}/{split}",),
        markers=("rgb_anon/fog", "rgb_anon/night", "rgb_anon/rain", "rgb_anon/snow"),
        ids=CITYSCAPES_IDS,
        known=_CITYSCAPES_KNOWN,
        image_suffix="_rgb_anon",
        label_suffixes=("_gt_labelTrainIds", "_gt_labelIds"),
        conditions=("fog", "night", "rain", "snow"),
        box=(960, 540),
    ),
    "darkzurich": Spec(
        images="rgb_anon/{split}/{condition}",
        labels=("gt/{split}/{condition}",),
        markers=("rgb_anon/train", "rgb_anon/val", "rgb_anon/test"),
        ids=CITYSCAPES_IDS,
        known=_CITYSCAPES_KNOWN,
        image_suffix="_rgb_anon",
        label_suffixes=("_gt_labelTrainIds", "_gt_labelIds"),
        conditions=("day", "twilight", "night"),
        box=(960, 540),
    ),
    "synthia": Spec(
        images="RGB",
        labels=("GT/LABELS",),
        markers=("RGB",),
        ids=SYNTHIA_IDS,
        known=(*range(23), IGNORE),
        label_suffixes=("_labelTrainIds", ""),
        splits=_ONE_SPLIT,
        box=(1280, 760),
    ),
    "mapillary": Spec(
        images="{split}/images",
        labels=("{split}/v1.2/labels", "{split}/labels"),
        markers=("training/images", "validation/images"),
        ids=MAPILLARY_IDS,
        known=(*range(66), IGNORE),
        splits={"train": "training", "val": "validation", "test": "testing"},
    ),
    "bdd100k": Spec(
        images="images/10k/{split}",
        labels=("labels/sem_seg/masks/{split}",),
        markers=("images/10k",),
        ids=_CITYSCAPES_TRAIN_IDS,
    ),
    "camvid": Spec(
        images="{split}",
        labels=("{split}annot",),
        markers=("trainannot", "valannot", "testannot"),
        ids=CAMVID_IDS,
        known=(11, IGNORE),
        conditions=("day", "dusk"),
        classes=CAMVID,
    ),
    "gta5": Spec(
        images="images",
        labels=("labels",),
        markers=("images",),
        ids=GTA5_IDS,
        known=_CITYSCAPES_KNOWN,
        label_suffixes=("_labelTrainIds", ""),
        splits=_ONE_SPLIT,
        box=(1280, 720),
    ),
    "folder": Spec(
        images="images/{split}",
        labels=("labels/{split}",),
        markers=("images",),
        image_suffix="_leftImg8bit",
        label_suffixes=("", "_gtFine_labelTrainIds", "_gt_labelTrainIds", "_labelTrainIds", "_mask", "_label"),
        classes=ClassSet("classes not given", (), ()),
    ),
}
"""All layouts, in the order in which a root is tried."""
