"""Our scores against cityscapesscripts, the reference implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_fast.data.index import Sample
from ssr_fast.data.labels import CITYSCAPES, CITYSCAPES_IDS
from ssr_fast.errors import UserError
from ssr_fast.eval.confusion import ConfusionMatrix
from ssr_fast.eval.official import OfficialEvaluation
from ssr_fast.eval.protocols import score


def sample(label: str) -> Sample:
    return Sample("name", "image.png", label, 1, 1, None)


def random_labels(rng: np.random.Generator, classes: list[int], shape: tuple[int, int]) -> np.ndarray:
    return rng.choice(classes, shape).astype(np.uint8)


@pytest.mark.parametrize("present", [list(range(19)), [0, 2, 5, 13, 18]])
def test_equal_to_the_official_evaluator(tmp_path: Path, present: list[int]) -> None:
    """Random pictures with ignored pixels; the second case has classes that nobody has, which both leave out."""
    rng = np.random.default_rng(len(present))
    official, ours = OfficialEvaluation(tmp_path), ConfusionMatrix(19)
    for shape in ((40, 60), (33, 17), (1, 5)):
        label = random_labels(rng, present, shape)
        prediction = np.where(rng.random(shape) < 0.5, label, random_labels(rng, present, shape)).astype(np.uint8)
        label[rng.random(shape) < 0.2] = 255
        official.add(sample("elsewhere/0001.png"), prediction, label)
        ours.update(torch.from_numpy(prediction), torch.from_numpy(label))
    miou, per_class = official.miou()
    scores = score(ours.counts, CITYSCAPES.names, "cityscapes19")
    assert scores.miou == pytest.approx(miou, abs=1e-9)
    assert scores.per_class == pytest.approx(per_class, abs=1e-9, nan_ok=True)
    assert sum(np.isnan(list(per_class.values()))) == 19 - len(present)


def test_original_ground_truth_is_read_where_it_exists(tmp_path: Path) -> None:
    """*_gtFine_labelIds.png is given to the evaluator as it is: ids without train id (here 4) are ignored."""
    ids = np.full((10, 10), 26, np.uint8)
    ids[:3] = 4
    truth = tmp_path / "aachen_000000_000019_gtFine_labelIds.png"
    Image.fromarray(ids).save(truth)
    label = np.where(ids == 26, CITYSCAPES_IDS[26], 255).astype(np.uint8)
    prediction = np.full((10, 10), CITYSCAPES_IDS[26], np.uint8)
    prediction[3, :5] = 0
    (tmp_path / "pngs").mkdir()
    official = OfficialEvaluation(tmp_path / "pngs")
    official.add(sample(str(truth)), prediction, label)
    miou, per_class = official.miou()
    assert not list((tmp_path / "pngs").glob("*truth*"))
    assert per_class["car"] == pytest.approx(100 * 65 / 70, abs=1e-9)
    assert miou == pytest.approx((100 * 65 / 70 + 0) / 2, abs=1e-9)


def test_the_evaluators_own_complaint_becomes_a_sentence(tmp_path: Path) -> None:
    official = OfficialEvaluation(tmp_path)
    official.add(sample("a.png"), np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8))
    with pytest.raises(UserError, match="official evaluator stopped: Image heights .* not equal"):
        official.miou()
