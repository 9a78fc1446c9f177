"""What every training method is: nets, a loss of one step, and what of it is trained, saved and shipped.

B batch, H W pixels, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.batch import Batch
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.working_copy import WorkingCopy
from ssr_kernels import counter
from ssr_kernels.segloss import segloss

METHODS = ("supervised", "self_training", "ssr", "source_free")


@dataclass(kw_only=True)
class MethodConfig:
    """The training method; the options `--method.*`."""

    name: str = "self_training"
    """supervised (source only), self_training (DAFormer's), ssr (self_training with SAM as the regulariser), or
    source_free (a trained model adapts to the target without source data)."""
    class_weight: str = "none"
    """Weight of a class in the cross-entropy: none, or inverse_sqrt of its share of the source pixels (mean 1)."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.name not in METHODS:
            found.append(f"--{where}.name must be one of {', '.join(METHODS)} (it is {self.name})")
        if self.class_weight not in ("none", "inverse_sqrt"):
            found.append(f"--{where}.class_weight must be none or inverse_sqrt (it is {self.class_weight})")
        return found


def class_weights(kind: str, counts: Sequence[int]) -> Tensor:
    """float32 [256] weight of each label value: 1, or share^-0.5 normalised to mean 1 over the source's pixels.

    Args:
        kind: "none" or "inverse_sqrt".
        counts: source pixels of each class.
    """
    weights = torch.ones(256)
    if kind == "inverse_sqrt":
        share = torch.tensor(counts, dtype=torch.float64)
        share = share / share.sum().clamp(min=1)
        raw = share.clamp(min=1e-5).rsqrt()
        weights[: len(counts)] = (raw / (raw * share).sum().clamp(min=1e-12)).float()
    return weights


def step_key(seed: int, step: int, rank: int) -> int:
    """The key of all random numbers that one rank draws in one step."""
    key = 0
    for value in (seed, step, rank):
        key = counter.fold(key, value)
    return key


def rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h, w, C]; no copy, as the networks keep channels last in memory."""
    return x.permute(0, 2, 3, 1)


class Method(nn.Module):
    """Base of the methods, and itself the supervised one (source only).

    Everything random in `losses` is a function of (seed, step, rank), nothing waits for the device and no shape
    depends on data, so that a step repeats bit for bit. It has parts: `begin` does what depends on the step's number,
    `draw` takes the key of a micro-batch from a tensor, `compute` reads it there, so that one graph of these two serves
    many steps.

    Args:
        student: the network that is trained, evaluated and shipped.
        weights: float32 [256] class weights of the cross-entropy.
        seed: the run's seed.
    """

    stage_name = "source_only"
    own_metrics: tuple[str, ...] = ()
    """Names in `losses` that the supervised method does not have."""
    class_weight: Tensor
    key: Tensor

    def __init__(self, student: Segmentor, weights: Tensor, seed: int) -> None:
        super().__init__()
        self.student, self.seed = student, seed
        self.copies, self.dtype = nn.ModuleDict(), torch.float32
        self.register_buffer("class_weight", weights, persistent=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def compute_in(self, dtype: torch.dtype, copies: bool = True) -> None:
        """Run forward and backward passes in a lower precision, on copies that follow the nets; those stay float32.

        Args:
            dtype: of the copies' parameters and of the activations.
            copies: make them; else the nets themselves compute in `dtype`, as sharded ones do.
        """
        if copies:
            self.copies = nn.ModuleDict({name: WorkingCopy(net, dtype) for name, net in self.computed().items()})
        self.dtype = dtype

    def average(self) -> nn.Module | None:
        """The net that follows the student, where there is one."""
        return None

    def computed(self) -> dict[str, nn.Module]:
        """The trained nets that the step runs, by the names that `running` takes."""
        return {"student": self.student}

    def running(self, name: str) -> Any:
        """A net of `computed` as the step runs it: its working copy, if there is one."""
        return self.copies[name].net if name in self.copies else self.computed()[name]

    def hand_over(self) -> None:
        """Gradients of the working copies to the nets that they follow; before the optimiser's step."""
        for working in self._trained_copies():
            working.hand_over()

    def refresh(self) -> None:
        """The nets' values to their working copies; after the optimiser's step, and after a checkpoint was loaded. A
        teacher's copy is not among them: every step's average, which comes before it is used, brings it up to date."""
        for working in self._trained_copies():
            working.refresh()

    def _trained_copies(self) -> Iterator[WorkingCopy]:
        return (module for module in self.copies.values() if isinstance(module, WorkingCopy))

    def trainable(self) -> dict[str, nn.Module]:
        """Modules by optimiser group: backbone, head and, where a method has them, extra."""
        return {"backbone": self.student.backbone, "head": self.student.decode_head}

    def saved(self) -> dict[str, nn.Module]:
        """Modules whose state a checkpoint must hold."""
        return {"student": self.student}

    def prepare(self, batch: Batch) -> Batch:
        """What a batch still needs before its step, on the host: may read it, unlike the step itself."""
        return batch

    def begun(self, step: int) -> bool:
        """Whether a method's own part (pseudo-labels, the contrast) runs in step; on it depends which operators do."""
        return True

    def waits(self) -> bool:
        """Whether a part that is trained gets no gradient before the method has begun."""
        return False

    def begin(self, step: int) -> None:
        """What is done once in step (counted from 0), on the device and without waiting for it."""

    def draw(self, key: Tensor) -> None:
        """Take the key (int64 scalar) of the random numbers of a micro-batch, for the stochastic layers too."""
        self.key.copy_(key)
        self.student.noise.key.copy_(counter.fold(key, 1))

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Loss terms of a step of a process alone, scalars; "loss" is what is differentiated, the others are for the
        log."""
        self.begin(step)
        self.draw(torch.full((), step_key(self.seed, step, 0), dtype=torch.int64, device=self.key.device))
        return self.compute(batch, self.begun(step))

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """The second half of `losses`, for the step that `begin` has prepared; `begun` as for that step."""
        output = self.running("student")(normalise_batch(batch.source_image).to(self.dtype))
        loss = self.cross_entropy(output.logits, batch.source_label)
        return {"loss": loss, "loss/source": loss.detach()}

    def cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Class-weighted cross-entropy of stride-4 logits [B, K, h, w] to labels uint8 [B, H, W], mean over ALL pixels.

        Args:
            weights: float32 [B, H, W] pixel weights, or None for 1.
        """
        pixel_weight = self.class_weight[labels.to(torch.int64)]  # [B, H, W]
        if weights is not None:
            pixel_weight = pixel_weight * weights
        return segloss(rows(logits), labels, pixel_weight)
