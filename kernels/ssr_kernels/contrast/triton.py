"""The contrastive loss on a GPU in Triton: three launches forward, two backward.

Forward: inverse_norms, row_sums, loss_sum. Backward: row_gradients, gradient_sums. Few rows make few blocks of them, so
the columns are split among programs until a large GPU is full. The number of splits depends on n and the block sizes
alone: results do not depend on the GPU's size.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
from torch import Tensor

from .. import tables
from . import triton_kernels

PROGRAMS = 264
"""Programs that fill a large GPU: two on each of 132 multiprocessors."""

PARTIAL_ROWS = 65536
"""The most rows of partial sums, over all splits: 64 MiB of partial gradients 256 wide."""

WASTE = 1.25
"""More splits than these bring less than this: time over that of a full GPU."""


def configs(dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, int]]:
    """Each kernel's block sizes, num_warps and num_stages for an embedding of this dtype, from configs.json."""
    return tables.table("contrast", tables.architecture(device))[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Layout:
    """How a kernel's programs share the pairs: blocks of rows times splits of the columns, `span` columns each."""

    blocks: int
    splits: int
    span: int

    @classmethod
    def of(cls, n: int, rows: int, columns: int) -> "Layout":
        """Layout of n rows in blocks of `rows` x `columns` pairs: the fewest splits that keep a large GPU busy."""
        blocks, steps = ceil(n / rows), ceil(n / columns)
        most = max(1, min(steps, PARTIAL_ROWS // n))

        def time(splits: int) -> float:
            return ceil(blocks * splits / PROGRAMS) / splits

        enough = (splits for splits in range(1, most + 1) if time(splits) <= WASTE * blocks / PROGRAMS)
        wanted = next(enough, None) or min(range(1, most + 1), key=time)
        steps_a_split = ceil(steps / wanted)
        return cls(blocks, ceil(steps / steps_a_split), steps_a_split * columns)


class Call:
    """One call: the arguments that its kernels share, and their launches."""

    def __init__(self, embedding: Tensor, group: Tensor, klass: Tensor, temperature: float) -> None:
        self.embedding, self.temperature = embedding, temperature
        self.n, self.width = embedding.shape
        self.ids = {"group": group, "klass": klass}
        self.config = configs(embedding.dtype, embedding.device)
        self.sizes = {"n": self.n, "D": self.width, "DP": max(16, triton.next_power_of_2(self.width))}
        self.precision = "tf32x3" if embedding.dtype == torch.float32 else "tf32"

    def layout(self, kernel: str) -> Layout:
        """How this kernel's programs share the pairs."""
        return Layout.of(self.n, self.config[kernel]["BM"], self.config[kernel]["BN"])

    def over_rows(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over blocks of rows."""
        blocks = ceil(self.n / self.config[kernel.fn.__name__]["BM"])
        self.launch(kernel, blocks, x=self.embedding, **self.sizes, **arguments)

    def over_pairs(self, kernel: Any, layout: Layout, **arguments: Any) -> None:
        """Launch a kernel over blocks of rows times splits of the columns."""
        self.launch(
            kernel, layout.blocks * layout.splits, x=self.embedding, span=layout.span, temperature=self.temperature,
            PRECISION=self.precision, **self.ids, **self.sizes, **arguments,
        )  # fmt: skip

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Launch a kernel with its configuration."""
        kernel[(programs,)](**arguments, **self.config[kernel.fn.__name__])


def forward(embedding: Tensor, group: Tensor, klass: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, rows and scale: see forms.forward."""
    call = Call(embedding, group, klass, temperature)
    rows, loss, scale = float32(embedding, 3, call.n), float32(embedding), float32(embedding)
    if call.n == 0:
        return loss.zero_(), rows, scale.fill_(1)
    layout = call.layout("row_sums")
    partials = float32(embedding, 5, layout.splits, call.n)
    call.over_rows(triton_kernels.inverse_norms, rows=rows)
    call.over_pairs(triton_kernels.row_sums, layout, rows=rows, partials=partials)
    call.launch(
        triton_kernels.loss_sum, 1, partials=partials, rows=rows, loss=loss, scale=scale, n=call.n,
        splits=layout.splits,
    )  # fmt: skip
    return loss, rows, scale


def backward(
    grad: Tensor, embedding: Tensor, group: Tensor, klass: Tensor, rows: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """Gradient of the embedding: see forms.backward."""
    call = Call(embedding, group, klass, temperature)
    result = torch.empty_like(embedding)
    if embedding.numel() == 0:
        return result
    layout = call.layout("row_gradients")
    partials = float32(embedding, layout.splits, call.n, call.width)
    call.over_pairs(triton_kernels.row_gradients, layout, rows=rows, partials=partials)
    call.over_rows(
        triton_kernels.gradient_sums, rows=rows, grad=grad, scale=scale, partials=partials, out=result,
        splits=layout.splits, temperature=temperature,
    )  # fmt: skip
    return result


def float32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 buffer on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)
