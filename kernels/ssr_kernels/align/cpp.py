"""The Gram form's passes over the fine rows in C++, on the CPU: the core that the CUDA kernels share."""

import torch
from torch import Tensor

from . import native
from .forms import PAD, Stage


class CppSteps:
    """forms.GramSteps by the library ssr_cpu, in float32 or float64."""

    def rows(self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor) -> None:
        """See GramSteps."""
        b, h, w, _ = stage.x.shape
        partial = rows.new_empty((native.tiles(b, h, w), 2))
        native.gram_rows([_native(stage, tokens, gram)], target.shape[1], target.shape[2], rows, partial)

    def dx(
        self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor, grad: Tensor, scale: Tensor
    ) -> Tensor:
        """See GramSteps."""
        dx = torch.empty_like(stage.x)
        native.gram_dx(
            [_native(stage, tokens, gram, dx=dx)], target.shape[1], target.shape[2], grad.to(rows.dtype), scale, rows
        )
        return dx

    def adjoint(self, stage: Stage, target: Tensor, rows: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """See GramSteps."""
        b, hs, ws, _ = target.shape
        y = rows.new_empty((b * hs * ws, stage.x.shape[3] + PAD))
        native.gram_adjoint([_native(stage, None, None, y=y)], hs, ws, grad.to(rows.dtype), scale, rows)
        return y


def _native(
    stage: Stage, tokens: Tensor | None, gram: Tensor | None, dx: Tensor | None = None, y: Tensor | None = None
) -> native.Stage:
    valid = stage.valid
    if valid is not None:
        valid = valid.view(torch.uint8) if valid.dtype == torch.bool else valid
        valid = valid if valid.dtype == torch.uint8 else valid.to(stage.x.dtype)
    return native.Stage(stage.x, valid, tokens, gram, stage.row0, 0, stage.index, dx, y)
