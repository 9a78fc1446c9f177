"""The confusion matrix: exact pixel counts on the tensors' own device."""

import torch
from torch import Tensor

from ssr_fast.data.labels import IGNORE


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels seen so far; ignored pixels (255) are not counted.

    Attributes:
        counts: int64 [K, K], rows are the true class, columns the predicted one. The sum of several matrices' counts
            is the matrix of all their pixels, so ranks combine by adding it.

    Args:
        class_count: K, from 1 to 255 (255 itself means "ignore").
        device: where the counts live; `update` takes tensors of any device and counts on the prediction's.
    """

    def __init__(self, class_count: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= class_count <= IGNORE:
            raise ValueError(f"class_count must be 1 to {IGNORE} (it is {class_count})")
        self.class_count = class_count
        self.counts = torch.zeros(class_count, class_count, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count one picture or a batch.

        Args:
            prediction: integer [...], predicted classes in [0, K).
            label: integer of the same shape, true classes in [0, K) or 255 for ignored pixels.

        Raises:
            ValueError: the shapes differ, a tensor is not integer, or a value is neither a class nor (in the label)
                255; the message names the value. Nothing is counted then.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
        if prediction.is_floating_point() or label.is_floating_point():
            raise ValueError(f"prediction and label must be integers (they are {prediction.dtype} and {label.dtype})")
        if prediction.numel() == 0:
            return
        k = self.class_count
        predicted = prediction.reshape(-1).to(torch.int64)  # [pixels]
        true = label.reshape(-1).to(predicted.device, torch.int64)  # [pixels]
        ignored = true == IGNORE
        self._check_range(predicted, true.masked_fill(ignored, 0))
        # Ignored pixels go to one cell behind the matrix: a fixed-length count, no boolean indexing.
        cell = (true * k + predicted).masked_fill(ignored, k * k)
        counts = torch.bincount(cell, minlength=k * k + 1)[: k * k].reshape(k, k)
        self.counts += counts.to(self.counts.device)

    def _check_range(self, predicted: Tensor, true: Tensor) -> None:
        """Raise ValueError if a value of either int64 [pixels] is no class."""
        limits = torch.stack([*predicted.aminmax(), *true.aminmax()]).tolist()
        for what, low, high in (("prediction", *limits[:2]), ("label", *limits[2:])):
            if low < 0 or high >= self.class_count:
                value = low if low < 0 else high
                also = f" nor {IGNORE} (ignore)" if what == "label" else ""
                raise ValueError(
                    f"{what} holds the value {value}, which is no class (0 to {self.class_count - 1}){also}"
                )

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [K] on the CPU in [0, 1].

        nan for a class that neither a label nor a prediction has, as cityscapesscripts' evaluator gives it.
        """
        return class_iou(self.counts)


def class_iou(counts: Tensor) -> Tensor:
    """IoU of each class from counts int64 [K, K] (rows = truth): float64 [K] on the CPU, nan for empty unions."""
    counts = counts.detach().cpu()  # float64 does not exist on every accelerator
    true_positive = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - true_positive
    return true_positive.to(torch.float64) / union.to(torch.float64)  # 0 / 0 is nan
