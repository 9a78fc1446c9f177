"""The official evaluator: cityscapesscripts on written PNGs, to check a score against the original code."""

import contextlib
import io
import types
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.index import Sample
from ssr_fast.data.labels import CITYSCAPES, CITYSCAPES_IDS, IGNORE, id_table
from ssr_fast.errors import UserError

_UNLABELED = 0  # Cityscapes' label id for pixels that no class counts
_GROUND_TRUTH_ENDING = "_gtFine_labelIds.png"


class OfficialEvaluation:
    """Collects predictions as label-id PNGs in a folder, then scores them with cityscapesscripts.

    Ground truth comes from Cityscapes' own *_gtFine_labelIds.png where the data set has it, else it is written from the
    train ids.

    Args:
        folder: an existing empty folder for the PNGs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: list[tuple[str, str]] = []
        self._to_label_id = _label_id_table()

    def add(self, sample: Sample, prediction: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
        """Write one picture; evaluate_samples' `visit`.

        Args:
            sample: whose prediction it is.
            prediction: uint8 [H, W] train ids 0..18.
            label: uint8 [H, W] train ids, 255 ignored; of the same size.
        """
        number = len(self._pairs)
        predicted = self._write(f"{number:06d}_prediction.png", prediction)
        true = sample.label
        if true is None or not true.endswith(_GROUND_TRUTH_ENDING) or not Path(true).is_file():  # of a prepared store
            true = self._write(f"{number:06d}_truth.png", label)
        self._pairs.append((predicted, true))

    def miou(self) -> tuple[float, dict[str, float]]:
        """(mean IoU, IoU of each of the 19 classes by name), in percent, as cityscapesscripts computes them.

        Raises:
            UserError: cityscapesscripts is not installed or refuses a file; the sentence is its own.
        """
        scores = _run(self._pairs)
        per_class = {name: 100.0 * scores["classScores"][name] for name in CITYSCAPES.names}
        return 100.0 * scores["averageScoreClasses"], per_class

    def _write(self, name: str, train_ids: NDArray[np.uint8]) -> str:
        path = self.folder / name
        Image.fromarray(self._to_label_id[train_ids]).save(path, compress_level=1)
        return str(path)


def _label_id_table() -> NDArray[np.uint8]:
    """uint8 [256]: train id -> label id; ignored pixels are unlabeled."""
    return id_table({train: label for label, train in CITYSCAPES_IDS.items()} | {IGNORE: _UNLABELED})


def _run(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
    except ImportError as error:
        raise UserError("--official needs cityscapesscripts: pip install cityscapesscripts") from error
    # A copy: the module keeps its settings in a global. Instance scores need *_instanceIds.png, which a plain
    # segmentation data set has not.
    arguments = types.SimpleNamespace(**vars(official.args))
    arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            scores: dict[str, Any] = official.evaluateImgLists([p for p, _ in pairs], [t for _, t in pairs], arguments)
    except SystemExit as error:  # its way to report a problem, after printing it
        said = " ".join(printed.getvalue().removeprefix("ERROR:").split())
        raise UserError(f"the official evaluator stopped: {said or error}") from error
    return scores
