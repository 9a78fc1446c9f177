"""The depthwise convolutions on a GPU in Triton: one launch forward, two backward (dilated: three).

How a map is shared among programs depends on its shape alone, so results do not depend on the GPU's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .. import tables
from . import triton_common, triton_dilated, triton_gelu

WARPS = 132 * 16
"""Warps that keep a large GPU busy: 16 on each of 132 multiprocessors."""

ROWS = (64, 32, 16, 8)
"""Rows of a program that slides down a map: the most that leave enough programs."""


def configs(device: torch.device) -> dict[str, Any]:
    """Block sizes, num_warps and num_stages of the kernels, from configs.json: a list where the map's width chooses."""
    return tables.table("dwconv", tables.architecture(device))["maps"]


@dataclass(frozen=True)
class Layout:
    """How a map is shared among programs.

    Attributes:
        strips: parts of the columns.
        rows: rows of a program.
        here: programs of the same channels, over images, segments of rows and strips.
        programs: in all.
        blocks: TW, BC, num_warps and num_stages.
    """

    strips: int
    rows: int
    here: int
    programs: int
    blocks: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, kernel: str, halo: int = 0) -> "Layout":
        """Layout of a map x [B, H, W, C]: the columns' blocks that waste least, `halo` columns on either side each."""
        batch, height, width, channels = x.shape

        def strips(blocks: dict[str, int]) -> int:
            return 1 if width <= blocks["TW"] else ceil(width / (blocks["TW"] - 2 * halo))

        blocks = min(configs(x.device)[kernel], key=lambda blocks: strips(blocks) * blocks["TW"])
        columns = strips(blocks) * batch * ceil(channels / blocks["BC"])
        enough = WARPS // blocks["num_warps"]
        rows = next((rows for rows in ROWS if columns * ceil(height / rows) >= enough), ROWS[-1])
        here = batch * ceil(height / rows) * strips(blocks)
        return cls(strips(blocks), rows, here, here * ceil(channels / blocks["BC"]), blocks)

    @property
    def halo(self) -> int:
        """Columns on either side that a program works on without owning them."""
        return 0 if self.strips == 1 else 1


def gelu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(dw3x3(x) + bias): see op.dwconv_gelu."""
    out = torch.empty_like(x)
    over_map(triton_gelu.gelu_forward, x, Layout.of(x, "gelu_forward"), x=x, weight=weight, bias=bias, out=out)
    return out


def gelu_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of x, weight and bias: see forms.gelu_backward."""
    layout = Layout.of(x, "gelu_backward", halo=1)
    dx = torch.empty_like(x) if wanted[0] else None
    partials = float32(x, layout.here, 10, x.shape[3]) if any(wanted[1:]) else None
    over_map(
        triton_gelu.gelu_backward, x, layout, grad=grad, x=x, weight=weight, bias=bias, dx=dx, partials=partials,
        strips=layout.strips, HALO=layout.halo,
    )  # fmt: skip
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    if partials is not None:
        sum_taps(partials, (dw,), db)
    found = (dx, dw, db)
    return [gradient for gradient, flag in zip(found, wanted, strict=True) if flag and gradient is not None]


def dilated_forward(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """A map for each branch: see op.dwconv_dilated."""
    outs = [torch.empty_like(x) for _ in weights]
    over_map(
        triton_dilated.dilated_forward, x, Layout.of(x, "dilated_forward"), x=x, weights=tuple(weights),
        outs=tuple(outs), DILATIONS=tuple(dilations),
    )  # fmt: skip
    return outs


def dilated_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x and of the weights: see forms.dilated_backward."""
    common = {"grads": tuple(grads), "DILATIONS": tuple(dilations)}
    found = []
    if wanted[0]:
        found.append(torch.empty_like(x))
        layout = Layout.of(x, "dilated_dx")
        over_map(triton_dilated.dilated_dx, x, layout, weights=tuple(weights), dx=found[0], **common)
    if any(wanted[1:]):
        layout = Layout.of(x, "dilated_dw")
        partials = float32(x, layout.here, 9 * len(weights), x.shape[3])
        over_map(triton_dilated.dilated_dw, x, layout, x=x, partials=partials, **common)
        dws = [torch.empty_like(weight) for weight in weights]
        sum_taps(partials, tuple(dws), None)
        found += [dw for dw, flag in zip(dws, wanted[1:], strict=True) if flag]
    return found


def over_map(kernel: Any, like: Tensor, layout: Layout, **arguments: Any) -> None:
    """Launch a kernel over maps of the shape of `like` [B, H, W, C], shared as `layout` says."""
    _, height, width, channels = like.shape
    if like.numel():
        launch(
            kernel, layout.programs, H=height, W=width, rows=layout.rows, C=channels, **arguments, **layout.blocks
        )  # fmt: skip


def sum_taps(partials: Tensor, filters: tuple[Tensor, ...], bias: Tensor | None) -> None:
    """Add partials [splits, taps, C] into the filters' gradients and the bias's."""
    splits, taps, channels = partials.shape
    blocks = configs(partials.device)["tap_sums"]
    launch(
        triton_common.tap_sums, taps * ceil(channels / blocks["BC"]), partials=partials, filters=filters, bias=bias,
        splits=splits, TAPS=taps, C=channels, **blocks,
    )  # fmt: skip


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel."""
    if programs:
        kernel[(programs,)](**arguments)


def float32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 buffer on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)
