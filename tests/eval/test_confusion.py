"""The confusion matrix against a loop, its limits, and the protocols' means."""

import math

import numpy as np
import pytest
import torch

from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.errors import UserError
from ssr_fast.eval.confusion import ConfusionMatrix
from ssr_fast.eval.protocols import PROTOCOLS, fitting_protocols, score

NAMES = CITYSCAPES.names


def random_pair(seed: int, k: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, k, shape, generator=generator)
    label = torch.randint(0, k, shape, generator=generator)
    label[torch.rand(shape, generator=generator) < 0.3] = 255
    return prediction, label


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("k", [1, 2, 5, 19])
def test_counts_equal_a_loop_over_pixels(k: int, label_type: torch.dtype) -> None:
    prediction, label = random_pair(k, k, (2, 9, 7))
    matrix = ConfusionMatrix(k)
    matrix.update(prediction, label.to(label_type))
    expected = np.zeros((k, k), np.int64)
    for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    assert matrix.counts.dtype == torch.int64
    assert np.array_equal(matrix.counts.numpy(), expected)


def test_parts_add_up_in_any_order_and_layout() -> None:
    prediction, label = random_pair(3, 6, (4, 8, 10))
    whole, parts = ConfusionMatrix(6), ConfusionMatrix(6)
    whole.update(prediction, label)
    for b in (2, 0, 3, 1):
        parts.update(prediction[b].T, label[b].T)  # not contiguous
    assert torch.equal(whole.counts, parts.counts)


def test_an_ignored_or_empty_picture_counts_nothing() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(torch.zeros(3, 3, dtype=torch.int64), torch.full((3, 3), 255, dtype=torch.uint8))
    matrix.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8))
    assert int(matrix.counts.sum()) == 0
    assert bool(matrix.iou().isnan().all())


@pytest.mark.parametrize(
    ("what", "value"),
    [("prediction", 5), ("prediction", -1), ("prediction", 255), ("label", 5), ("label", -2), ("label", 254)],
)
def test_a_value_that_is_no_class_is_named_and_nothing_is_counted(what: str, value: int) -> None:
    matrix = ConfusionMatrix(5)
    pair = {"prediction": torch.ones(4, 4, dtype=torch.int64), "label": torch.ones(4, 4, dtype=torch.int64)}
    pair[what][2, 3] = value
    with pytest.raises(ValueError, match=rf"{what} holds the value {value}\b"):
        matrix.update(pair["prediction"], pair["label"])
    assert int(matrix.counts.sum()) == 0


def test_wrong_shapes_types_and_class_counts_are_refused() -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="differ in shape"):
        matrix.update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be integers"):
        matrix.update(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.uint8))
    for count in (0, 256):
        with pytest.raises(ValueError, match="class_count"):
            ConfusionMatrix(count)


def test_iou_by_hand() -> None:
    matrix = ConfusionMatrix(4)
    matrix.counts = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    matrix.counts[0, 3] = 5  # class 3: predicted, never true
    iou = matrix.iou().tolist()
    assert iou[0] == 3 / (3 + 1 + 5 + 2) and iou[1] == 4 / 7
    assert math.isnan(iou[2]), "a class that nobody has is no zero"
    assert iou[3] == 0.0, "a class that is only predicted is wrong everywhere"


def test_protocols_drop_the_right_classes() -> None:
    dropped16 = {NAMES[i] for i in range(19)} - {NAMES[i] for i in PROTOCOLS["synthia16"] or ()}
    dropped13 = {NAMES[i] for i in range(19)} - {NAMES[i] for i in PROTOCOLS["synthia13"] or ()}
    assert dropped16 == {"terrain", "truck", "train"}
    assert dropped13 == dropped16 | {"wall", "fence", "pole"}


def test_synthia16_is_the_papers_formula_when_absent_classes_are_never_predicted() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (19, 19), generator=generator)
    counts[:, [9, 14, 16]] = 0
    all19, only16 = score(counts, NAMES, "cityscapes19"), score(counts, NAMES, "synthia16")
    assert only16.miou == pytest.approx(all19.miou * 19 / 16, abs=1e-12)
    assert only16.per_class == {name: all19.per_class[name] for name in only16.per_class}
    assert len(score(counts, NAMES, "synthia13").per_class) == 13


def test_a_class_without_union_leaves_the_mean() -> None:
    counts = torch.zeros(3, 3, dtype=torch.int64)
    counts[0, 0], counts[1, 0], counts[1, 1] = 10, 5, 5
    scores = score(counts, ("a", "b", "c"))
    assert math.isnan(scores.per_class["c"])
    assert scores.miou == pytest.approx((100 * 10 / 15 + 50) / 2)
    assert scores.accuracy == pytest.approx(75.0)
    empty = score(torch.zeros(2, 2, dtype=torch.int64), ("a", "b"))
    assert math.isnan(empty.miou) and math.isnan(empty.accuracy)


def test_fitting_protocols_know_cityscapes_in_other_spellings() -> None:
    spelt = [name.title().replace(" ", "_") for name in NAMES]
    assert fitting_protocols(spelt) == ["cityscapes19", "synthia16", "synthia13"]
    assert fitting_protocols(NAMES[::-1]) == ["generic"], "other numbers, other classes"
    assert fitting_protocols(("road", "sky")) == ["generic"]


def test_protocols_refuse_what_they_do_not_fit() -> None:
    counts = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(UserError, match="needs Cityscapes' 19 classes"):
        score(counts, ("a", "b"), "synthia16")
    with pytest.raises(UserError, match="--protocol kitti is unknown"):
        score(counts, ("a", "b"), "kitti")
    with pytest.raises(ValueError, match="do not fit 3 class names"):
        score(counts, ("a", "b", "c"))
    with pytest.raises(ValueError, match="repeat"):
        score(counts, ("a", "a"))


@pytest.mark.gpu
def test_counts_on_a_gpu() -> None:
    prediction, label = random_pair(7, 19, (512, 1024))
    cpu, gpu = ConfusionMatrix(19), ConfusionMatrix(19, "cuda")
    cpu.update(prediction, label)
    gpu.update(prediction.cuda(), label.to(torch.uint8).cuda())
    assert torch.equal(cpu.counts, gpu.counts.cpu())
