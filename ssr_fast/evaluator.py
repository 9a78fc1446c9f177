"""The judgement of a run: scores on labelled target images, if there are any, and the pictures of its report.

H W pixels of an image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ssr_fast.data.index import Index, Sample
from ssr_fast.data.labels import ClassSet
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.eval.protocols import Scores, score
from ssr_fast.eval.run import evaluate_samples, evaluating, fit_picture, logits_only, predict_pictures
from ssr_fast.report.pictures import comparison


class Evaluator:
    """Evaluates a network on the labelled target images, and shows some of them, or of the unlabelled ones.

    Args:
        labelled: the evaluation data; None if there is none.
        pictures: what the report's images are taken from; `labelled` where that is given.
        shown: how many of them the report shows.
        classes: what the networks tell apart.
        inference: how images are seen.
        resize: (width, height) of the box that images are resized into, or None.
        protocol: a published protocol's name, or generic.
        device: where the networks are.
        share: (rank, world): of the labelled images this process judges every world-th one.
        total: replaces a tensor by its sum over the processes.
    """

    def __init__(
        self,
        labelled: Index | None,
        pictures: Index,
        shown: int,
        classes: ClassSet,
        inference: InferenceConfig,
        resize: tuple[int, int] | None,
        protocol: str,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        total: Callable[[Tensor], None] = lambda counts: None,
    ) -> None:
        self.share, self.total = share, total
        self.labelled, self.classes = labelled, classes
        samples = pictures.samples
        self.shown = samples[:: max(1, len(samples) // max(1, shown))][:shown]
        self.read_image = pictures.layout.read_image
        self.inference, self.resize, self.protocol, self.device = inference, resize, protocol, device

    def scores(self, student: nn.Module, after_image: Callable[[], None] = lambda: None) -> Scores:
        """The scores on all labelled images.

        Args:
            after_image: called after each image, equally often on every process.
        """
        if self.labelled is None:
            raise ValueError("there are no labelled images to score")
        rank, world = self.share
        mine = self.labelled.samples[rank::world]
        matrix = evaluate_samples(
            student,
            mine,
            self.labelled.layout,
            self.inference,
            self.resize,
            self.device,
            self.classes.count,
            progress=lambda done, count: after_image(),
        )
        for _ in range(-(-len(self.labelled.samples) // world) - len(mine)):
            after_image()
        self.total(matrix.counts)
        return score(matrix.counts, self.classes.names, self.protocol)

    def predict_shown(self, student: nn.Module, folder: Path) -> None:
        """Predictions of the shown images as train-id PNGs <nn>.png in `folder`.

        Raises:
            UserError: a file is bad, or the GPU's memory is too small.
        """
        folder.mkdir(parents=True, exist_ok=True)
        network = logits_only(student)
        with evaluating(student), torch.no_grad():
            for number, sample in enumerate(self.shown):
                image = self.read_image(sample.image)
                pixels = np.stack([fit_picture(image, self.resize)])
                label = predict_pictures(network, pixels, self.inference, image.shape[:2], self.device)[0]
                Image.fromarray(label.to(torch.uint8).cpu().numpy()).save(folder / f"{number:02d}.png")

    def write_comparisons(self, folder: Path, stages: Sequence[str]) -> None:
        """folder/<nn>.png: image, truth if it is known, and each stage's prediction from folder/<stage>/<nn>.png.

        Raises:
            UserError: a file is bad.
        """
        for number, sample in enumerate(self.shown):
            predictions = []
            for stage in stages:
                with Image.open(folder / stage / f"{number:02d}.png") as prediction:
                    predictions.append((stage.replace("_", " "), np.asarray(prediction)))
            picture = comparison(self.read_image(sample.image), self._truth(sample), predictions, self.classes)
            Image.fromarray(picture).save(folder / f"{number:02d}.png")

    def _truth(self, sample: Sample) -> NDArray[np.uint8] | None:
        if self.labelled is None or sample.label is None:
            return None
        return self.labelled.layout.read_label(Path(sample.label))
