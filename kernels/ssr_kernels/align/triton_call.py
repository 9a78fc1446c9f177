"""A grouped call as the Triton kernels of align read it: tuples over stages, block sizes, numbers of programs.

Block sizes depend on the operands' dtype and the GPU's architecture, the number of partial sums on the shapes, so that
results do not depend on the GPU's size.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .. import tables
from . import native, triton_gram
from .forms import PAD, Stage, takes_gram

TILE = native.PATCH
"""Height and width in pixels of a tile of rows; that of the CUDA kernels, which fill the same partial sums."""

SPLITS = 32
"""The most partial sums of a stage."""

TILES_A_SPLIT, ROWS_A_SPLIT, TOKENS_A_SPLIT = 8, 512, 256
"""The least work of one partial sum."""


def configs(dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, int]]:
    """Each kernel's block sizes, num_warps and num_stages for operands of this dtype, from configs.json."""
    return tables.table("align", tables.architecture(device))["float32" if dtype == torch.float32 else "half"]


class Call:
    """A grouped call: its stages by form, their tiles, and the target, masks and biases as the kernels read them."""

    def __init__(self, stages: Sequence[Stage], target: Tensor) -> None:
        dtype = stages[0].x.dtype
        self.target = target if target.dtype == dtype else target.to(dtype)
        self.batch, self.hs, self.ws, self.width = target.shape
        self.gram = [stage for stage in stages if takes_gram(stage.x.shape, target.shape)]
        self.direct = [stage for stage in stages if stage not in self.gram]
        grids = [stage.x.shape[1:3] for stage in stages]
        self.tiles = [self.batch * ceil(h / TILE) * ceil(w / TILE) for h, w in grids]
        self.tile_ends = tuple(accumulate(self.tiles))
        self.config = configs(dtype, target.device)
        self.precision = "tf32x3" if dtype == torch.float32 else "tf32"
        zeros = None if all(stage.bias is None for stage in stages) else target.new_zeros(self.width, dtype=dtype)
        self._biases = [stage.bias if stage.bias is not None else zeros for stage in stages]
        self._masks = _masks(stages)

    def of(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """The arguments that every kernel over these stages' rows has, by name."""
        return {
            "features": tuple(stage.x for stage in stages),
            "masks": None if self._masks is None else tuple(self._masks[stage.index] for stage in stages),
            "heights": tuple(stage.x.shape[1] for stage in stages),
            "widths": tuple(stage.x.shape[2] for stage in stages),
            "channels": channels(stages),
            "row0s": tuple(stage.row0 for stage in stages),
            "hs": self.hs,
            "ws": self.ws,
        }

    def linear(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """Weights and biases of these stages."""
        biases = tuple(self._biases[stage.index] for stage in stages)
        return {"weights": tuple(stage.weight for stage in stages), "biases": None if biases[0] is None else biases}

    def tile0s(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Number of each stage's first tile among those of all."""
        return tuple(self.tile_ends[stage.index] - self.tiles[stage.index] for stage in stages)

    def launch(self, kernel: Any, programs: Sequence[int] | None, **arguments: Any) -> None:
        """Launch a kernel with its configuration; `programs` are those of each stage (None: one program in all)."""
        if programs is not None:
            arguments["ends"] = tuple(accumulate(programs))
        grid = arguments["ends"][-1] if programs is not None else 1
        if grid:
            kernel[(grid,)](**arguments, **self.config[kernel.fn.__name__])

    def block(self, kernel: str, name: str) -> int:
        """A block size of a kernel's configuration."""
        return self.config[kernel][name]

    def tables(self, stages: Sequence[Stage], products: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The tables tokens [B hs ws, P] and gram [C + 1, P] of each of these stages: see forms."""
        count = self.batch * self.hs * self.ws
        tokens = tuple(float32(self.target, count, stage.x.shape[3] + PAD) for stage in stages)
        grams = tuple(float32(self.target, stage.x.shape[3] + 1, stage.x.shape[3] + PAD) for stage in stages)
        rows, columns = self.block("gram_tables", "BM"), self.block("gram_tables", "BC")
        programs = [(ceil(count / rows) + ceil((c + 1) / rows)) * ceil(c / columns) for c in channels(stages)]
        self.launch(
            triton_gram.gram_tables, programs, **self.linear(stages), channels=channels(stages), tokens=tokens,
            grams=grams, target=self.target, hs=self.hs, ws=self.ws, batch=self.batch, D=self.width, PRODUCTS=products,
            PRECISION="tf32x3" if self.precision == "tf32x3" else "ieee",
        )  # fmt: skip
        return tokens, grams

    def splits(self, stage: Stage) -> int:
        """Number of partial sums of the gradient of a stage's weight."""
        if stage in self.direct:
            return _splits(self.tiles[stage.index], TILES_A_SPLIT)
        return _splits(self.batch * self.hs * self.ws, TOKENS_A_SPLIT)

    def moment_splits(self, stage: Stage) -> int:
        """Number of partial sums of a stage's moments; 0: the direct form has none."""
        return 0 if stage in self.direct else _splits(stage.count, ROWS_A_SPLIT)


def channels(stages: Sequence[Stage]) -> tuple[int, ...]:
    """C of each stage."""
    return tuple(stage.x.shape[3] for stage in stages)


def indices(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Place of each stage in the grouped call."""
    return tuple(stage.index for stage in stages)


def float32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 buffer on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


def _splits(work: int, least: int) -> int:
    return max(1, min(SPLITS, ceil(work / least)))


def _masks(stages: Sequence[Stage]) -> list[Tensor] | None:
    """The stages' masks in one dtype that kernels read: uint8 where all are bool or uint8, else float32."""
    masks = [stage.valid for stage in stages if stage.valid is not None]
    if not masks:
        return None
    if all(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
        return [mask.view(torch.uint8) for mask in masks]
    return [mask.to(torch.float32) for mask in masks]
