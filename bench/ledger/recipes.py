"""The recipes that the ledger counts: the released loop, and our step as it is."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import released
from bench.ledger.counting import Counts, Ledger
from ssr_fast.data.batch import Batch
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.precision import apply_precision, computed_dtype
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.self_training import SelfTraining, SelfTrainingConfig
from ssr_fast.methods.ssr import Ssr, SsrConfig
from ssr_fast.models.sam import SHAPES, FrozenEncoder
from ssr_fast.models.sam_encoder import SamEncoder
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor

MODEL = ModelConfig()
"""MiT-B5 with the DAFormer head."""


STEPS, STEP = 40000, 1000
"""Of DAFormer's run, and the one that is counted."""


@dataclass(frozen=True)
class Size:
    """Images a domain and the side of the crop."""

    batch: int
    crop: int

    def __str__(self) -> str:
        return f"{self.batch}+{self.batch}@{self.crop}"


SIZES = (Size(2, 512), Size(8, 512), Size(2, 1024))


def fake_batch(size: Size) -> Batch:
    """One step's samples; only their shapes are real."""
    image = torch.empty(size.batch, size.crop, size.crop, 3, dtype=torch.uint8)
    label = torch.empty(size.batch, size.crop, size.crop, dtype=torch.uint8)
    return Batch(image, label, image.clone(), torch.empty(label.shape, dtype=torch.bool))


def build() -> Segmentor:
    """MiT-B5 with the DAFormer head for Cityscapes' classes."""
    return build_segmentor(MODEL, CITYSCAPES.count, 0)


def released_loop(size: Size, autocast: bool, levers: Sequence[str] = ()) -> Counts:
    """One step of the released loop, with some levers pulled."""
    batch, step = fake_batch(size), released.ReleasedStep(_method(), OptimConfig(), STEPS, levers)
    with released.autocast() if autocast else contextlib.nullcontext(), Ledger(*step.nets()) as ledger:
        step.autograd = ledger
        step(batch, STEP)
    return ledger.counts


def ours(size: Size, sam: str = "", precision: str = "bf16", recompute_blocks: bool = False) -> Counts:
    """One step of ours, optimiser and average included; with a frozen SAM of that name (vit_b, vit_h)."""
    batch, method = fake_batch(size), _method(sam, computed_dtype(precision))
    method.student.backbone.recompute_blocks = recompute_blocks
    with patch.object(copy, "deepcopy", _copied):
        apply_precision(method, precision)
    step = CountedStep(method, OptimConfig(), STEPS)
    with step.counted_by(*method.children()) as ledger, ledger.saving():
        step(batch, STEP)
    return ledger.counts


class _Encoder(FrozenEncoder):
    """An encoder that is built in the type of the step: the type of fake parameters cannot be changed."""

    def to(self, *types: Any, **how: Any) -> "_Encoder":
        assert types == (self.dtype,)
        return self


def _method(sam: str = "", dtype: torch.dtype = torch.float32) -> SelfTraining:
    """Self-training as DAFormer's options have it, or SSR with a frozen SAM of that name, of a type."""
    common = (torch.ones(256), 0, SelfTrainingConfig(), CITYSCAPES.count)
    student, reference = build(), build().backbone
    with patch.object(copy, "deepcopy", _copied):
        if not sam:
            return SelfTraining(student, *common, CITYSCAPES.things, reference).train()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            frozen = _Encoder(SamEncoder(SHAPES[sam]), SHAPES[sam].size, False)
        finally:
            torch.set_default_dtype(before)
        method = Ssr(student, *common, SsrConfig(), frozen, things=CITYSCAPES.things, reference=reference)
        return method.train()


class CountedStep(TrainStep):
    """Lets a ledger see the backward pass."""

    ledger: Ledger

    def counted_by(self, *nets: nn.Module) -> Ledger:
        """A new ledger, to be entered around a step; nets: whose parameters are not activations."""
        self.ledger = Ledger(*nets)
        return self.ledger

    def backward(self, loss: Tensor) -> None:
        self.ledger.backward(loss)


def _copied(net: nn.Module, deepcopy: Callable[..., nn.Module] = copy.deepcopy) -> nn.Module:
    """A deep copy; fake tensors, which cannot be copied, are made anew."""
    made: dict[int, object] = {id(p): nn.Parameter(torch.empty_like(p), p.requires_grad) for p in net.parameters()}
    return deepcopy(net, made | {id(buffer): torch.empty_like(buffer) for buffer in net.buffers()})


Recipe = Callable[[Size], Counts]

FLOAT32, LEAN, RECOMPUTED = "one pass, no sync, one backward", "lean", "lean, blocks computed again"
DAFORMER: dict[str, Recipe] = {
    "daformer-autocast": partial(released_loop, autocast=True),
    "daformer-tf32": partial(released_loop, autocast=False),
    **{
        lever: partial(released_loop, autocast=False, levers=released.LEVERS[: number + 1])
        for number, lever in enumerate(released.LEVERS)
    },
    FLOAT32: partial(ours, precision="fp32"),
    LEAN: ours,
    RECOMPUTED: partial(ours, recompute_blocks=True),
}
"""The levers one after another, each with those before it, from the loop in float32; our step; it in bfloat16; and with
less memory for more operators."""

RECIPES: dict[str, dict[str, Recipe]] = {
    "daformer": DAFORMER,
    "ssr, SAM-B online": {LEAN: partial(ours, sam="vit_b")},
    "ssr, SAM-H online": {LEAN: partial(ours, sam="vit_h")},
}


def count(recipe: Recipe, size: Size) -> Counts:
    """A recipe's step at a size, on fake tensors."""
    with FakeTensorMode():
        return recipe(size)
