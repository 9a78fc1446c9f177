"""The grouped call with the Gram form's passes over the fine rows in CUDA C++, everything else in Triton."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import native
from .forms import Stage
from .triton import Triton
from .triton_call import Call


class Cuda(Triton):
    """Triton, but for gram_rows, gram_dx and gram_adjoint: one launch of the library ssr_cuda each."""

    def gram_rows(
        self, call: Call, tokens: tuple[Tensor, ...], grams: tuple[Tensor, ...], rows: Tensor, partials: Tensor
    ) -> None:
        """See Triton."""
        native.gram_rows(_native(call, call.gram, tokens, grams), call.hs, call.ws, rows, partials)

    def gram_dx(
        self,
        call: Call,
        stages: Sequence[Stage],
        tokens: tuple[Tensor, ...],
        grams: tuple[Tensor, ...],
        dxs: tuple[Tensor, ...],
        saved: dict[str, Any],
    ) -> None:
        """See Triton."""
        described = _native(call, stages, tokens, grams, dxs=dxs)
        native.gram_dx(described, call.hs, call.ws, saved["grad"], saved["scale"], saved["rows"])

    def gram_adjoint(self, call: Call, stages: Sequence[Stage], ys: tuple[Tensor, ...], saved: dict[str, Any]) -> None:
        """See Triton."""
        described = _native(call, stages, ys=ys)
        native.gram_adjoint(described, call.hs, call.ws, saved["grad"], saved["scale"], saved["rows"])


def _native(
    call: Call,
    stages: Sequence[Stage],
    tokens: Sequence[Tensor] = (),
    grams: Sequence[Tensor] = (),
    dxs: Sequence[Tensor] = (),
    ys: Sequence[Tensor] = (),
) -> list[native.Stage]:
    tile0s, masks = call.tile0s(stages), call.of(stages)["masks"]
    return [
        native.Stage(
            stage.x, masks[i] if masks else None, tokens[i] if tokens else None, grams[i] if grams else None,
            stage.row0, tile0s[i], stage.index, dxs[i] if dxs else None, ys[i] if ys else None,
        )
        for i, stage in enumerate(stages)
    ]  # fmt: skip
