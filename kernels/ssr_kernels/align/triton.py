"""Align on a GPU in Triton: four launches forward and eight backward, whatever the number of stages.

Forward: gram_tables, direct_rows, gram_rows, loss_sums. Backward: gram_tables, direct_dx, gram_dx, direct_dw,
gram_adjoint, token_sums, moments, weight_gradients; those without a stage to serve are left out.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor

from . import triton_direct, triton_gram, triton_sums
from .forms import PAD, Stage
from .triton_call import TILE, Call, channels, float32, indices


class Triton:
    """The grouped call in Triton; a subclass may run the Gram form's three passes over the rows in another way."""

    def forward(
        self, stages: Sequence[Stage], target: Tensor, shares: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, rows and scale: see forms.forward."""
        call = Call(stages, target)
        rows = float32(target, 3, sum(stage.count for stage in stages))
        partials = float32(target, call.tile_ends[-1], 2)
        loss, scale = float32(target), float32(target, len(stages))
        if direct := call.direct:
            call.launch(
                triton_direct.direct_rows, [call.tiles[stage.index] for stage in direct], **call.of(direct),
                **call.linear(direct), tile0s=call.tile0s(direct), target=call.target, rows=rows, total=rows.shape[1],
                partials=partials, D=call.width, BH=TILE, BW=TILE, PRECISION=call.precision,
            )  # fmt: skip
        if call.gram:
            tokens, grams = call.tables(call.gram, products=True)
            self.gram_rows(call, tokens, grams, rows, partials)
        call.launch(
            triton_sums.loss_sums, None, partials=partials, tile_ends=call.tile_ends, shares=tuple(shares), loss=loss,
            scale=scale, STAGES=len(stages),
        )  # fmt: skip
        return loss, rows, scale

    def backward(
        self,
        grad: Tensor,
        stages: Sequence[Stage],
        target: Tensor,
        rows: Tensor,
        scale: Tensor,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients that are wanted: see forms.backward."""
        call = Call(stages, target)
        saved = {"rows": rows, "total": rows.shape[1], "grad": grad, "scale": scale}
        dxs = self._feature_gradients(call, [stage for stage in stages if wanted[3 * stage.index]], saved)
        dws, dbs = self._weight_gradients(
            call, [stage for stage in stages if any(wanted[3 * stage.index + 1 : 3 * stage.index + 3])], saved
        )
        results = [part.get(stage.index) for stage in stages for part in (dxs, dws, dbs)]
        return [result for result, flag in zip(results, wanted, strict=True) if flag and result is not None]

    def gram_rows(
        self, call: Call, tokens: tuple[Tensor, ...], grams: tuple[Tensor, ...], rows: Tensor, partials: Tensor
    ) -> None:
        """Fill the Gram stages' part of rows and partials."""
        stages = call.gram
        call.launch(
            triton_gram.gram_rows, [call.tiles[stage.index] for stage in stages], **call.of(stages), tokens=tokens,
            grams=grams, tile0s=call.tile0s(stages), rows=rows, total=rows.shape[1], partials=partials, BH=TILE,
            BW=TILE, PRECISION="tf32x3",
        )  # fmt: skip

    def gram_dx(
        self,
        call: Call,
        stages: Sequence[Stage],
        tokens: tuple[Tensor, ...],
        grams: tuple[Tensor, ...],
        dxs: tuple[Tensor, ...],
        saved: dict[str, Any],
    ) -> None:
        """Fill the gradients of the features of these Gram stages."""
        call.launch(
            triton_gram.gram_dx, [call.tiles[stage.index] for stage in stages], **call.of(stages), tokens=tokens,
            grams=grams, indices=indices(stages), gradients=dxs, **saved, BH=TILE, BW=TILE, PRECISION="tf32x3",
        )  # fmt: skip

    def gram_adjoint(self, call: Call, stages: Sequence[Stage], ys: tuple[Tensor, ...], saved: dict[str, Any]) -> None:
        """Fill the tables y of these Gram stages."""
        rows, columns = call.block("gram_adjoint", "BM"), call.block("gram_adjoint", "BC")
        tokens = ceil(call.batch * call.hs * call.ws / rows)
        call.launch(
            triton_gram.gram_adjoint, [tokens * ceil(c / columns) for c in channels(stages)], **call.of(stages),
            indices=indices(stages), ys=ys, batch=call.batch, **saved,
        )  # fmt: skip

    def _feature_gradients(self, call: Call, stages: Sequence[Stage], saved: dict[str, Any]) -> dict[int, Tensor]:
        dxs = {stage.index: torch.empty_like(stage.x) for stage in stages}
        if direct := [stage for stage in stages if stage in call.direct]:
            columns = call.block("direct_dx", "BC")
            call.launch(
                triton_direct.direct_dx,
                [call.tiles[stage.index] * ceil(stage.x.shape[3] / columns) for stage in direct], **call.of(direct),
                **call.linear(direct), indices=indices(direct), gradients=tuple(dxs[stage.index] for stage in direct),
                target=call.target, **saved, D=call.width, BH=TILE, BW=TILE, PRECISION=call.precision,
            )  # fmt: skip
        if gram := [stage for stage in stages if stage in call.gram]:
            tokens, grams = call.tables(gram, products=False)
            self.gram_dx(call, gram, tokens, grams, tuple(dxs[stage.index] for stage in gram), saved)
        return dxs

    def _weight_gradients(
        self, call: Call, stages: Sequence[Stage], saved: dict[str, Any]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """dW and db of these stages, by index; no db where no stage of the call has a bias."""
        if not stages:
            return {}, {}
        partials = Partials.of(call, stages, [(call.splits(stage), call.width) for stage in stages])
        moments = Partials.of(call, stages, [(call.moment_splits(stage), stage.x.shape[3] + 1) for stage in stages])
        if direct := [stage for stage in stages if stage in call.direct]:
            self._direct_sums(call, direct, partials, saved)
        if gram := [stage for stage in stages if stage in call.gram]:
            self._gram_sums(call, gram, partials, moments, saved)
        dws = {stage.index: torch.empty_like(stage.weight) for stage in stages}
        linear = call.linear(stages)
        dbs = {} if linear["biases"] is None else {stage.index: stage.weight.new_empty(call.width) for stage in stages}
        rows, columns = call.block("weight_gradients", "BN"), call.block("weight_gradients", "BC")
        call.launch(
            triton_sums.weight_gradients, [ceil(call.width / rows) * ceil(c / columns) for c in channels(stages)],
            **linear, channels=channels(stages), splits=partials.splits(stages), partial0s=partials.starts(stages),
            moment_splits=moments.splits(stages), moment0s=moments.starts(stages), indices=indices(stages),
            dws=tuple(dws.values()), dbs=tuple(dbs.values()) or None, partials=partials.buffer,
            moment_partials=moments.buffer, grad=saved["grad"], scale=saved["scale"], D=call.width, PRECISION="tf32x3",
        )  # fmt: skip
        return dws, dbs

    def _direct_sums(self, call: Call, stages: Sequence[Stage], partials: "Partials", saved: dict[str, Any]) -> None:
        rows, columns = call.block("direct_dw", "BN"), call.block("direct_dw", "BC")
        splits = partials.splits(stages)
        blocks = [ceil(call.width / rows) * ceil(c / columns) for c in channels(stages)]
        call.launch(
            triton_direct.direct_dw, [block * split for block, split in zip(blocks, splits, strict=True)],
            **call.of(stages), **call.linear(stages), tiles=tuple(call.tiles[stage.index] for stage in stages),
            splits=splits, partial0s=partials.starts(stages), target=call.target, rows=saved["rows"],
            total=saved["total"], partials=partials.buffer, D=call.width, BH=TILE, BW=TILE, PRECISION=call.precision,
        )  # fmt: skip

    def _gram_sums(
        self, call: Call, stages: Sequence[Stage], partials: "Partials", moments: "Partials", saved: dict[str, Any]
    ) -> None:
        tokens = call.batch * call.hs * call.ws
        ys = tuple(float32(call.target, tokens, c + PAD) for c in channels(stages))
        self.gram_adjoint(call, stages, ys, saved)
        rows, columns = call.block("token_sums", "BN"), call.block("token_sums", "BC")
        programs = [
            split * ceil(call.width / rows) * ceil(c / columns)
            for split, c in zip(partials.splits(stages), channels(stages), strict=True)
        ]
        call.launch(
            triton_sums.token_sums, programs, ys=ys, channels=channels(stages), splits=partials.splits(stages),
            partial0s=partials.starts(stages), target=call.target, count=tokens, partials=partials.buffer,
            D=call.width, PRECISION=call.precision,
        )  # fmt: skip
        side = call.block("moments", "BC")
        programs = [
            split * ceil(c / side) ** 2 for split, c in zip(moments.splits(stages), channels(stages), strict=True)
        ]
        of = call.of(stages)
        call.launch(
            triton_sums.moments, programs, features=of["features"], masks=of["masks"], channels=of["channels"],
            counts=tuple(stage.count for stage in stages), row0s=of["row0s"], splits=moments.splits(stages),
            partial0s=moments.starts(stages), rows=saved["rows"], total=saved["total"], partials=moments.buffer,
            PRECISION=call.precision,
        )  # fmt: skip


class Partials:
    """A buffer of partial sums: for each stage [splits, height, C + PAD], one after another."""

    def __init__(self, buffer: Tensor, splits: dict[int, int], starts: dict[int, int]) -> None:
        self.buffer = buffer
        self._splits, self._starts = splits, starts

    @classmethod
    def of(cls, call: Call, stages: Sequence[Stage], sizes: Sequence[tuple[int, int]]) -> "Partials":
        """Allocate; `sizes` are splits and height of each stage."""
        lengths = [
            splits * height * (stage.x.shape[3] + PAD) for stage, (splits, height) in zip(stages, sizes, strict=True)
        ]
        starts = dict(zip(indices(stages), accumulate(lengths, initial=0), strict=False))
        splits = dict(zip(indices(stages), (size[0] for size in sizes), strict=True))
        return cls(float32(call.target, sum(lengths)), splits, starts)

    def splits(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Number of partial sums of each of these stages."""
        return tuple(self._splits[stage.index] for stage in stages)

    def starts(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Where in the buffer the partial sums of each of these stages start, in elements."""
        return tuple(self._starts[stage.index] for stage in stages)
