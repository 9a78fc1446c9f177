"""The launches of contrast_loss at production sizes, recorded on the meta device: nothing is computed."""

from dataclasses import replace
from typing import Any

import torch
from pytest import MonkeyPatch

from ssr_kernels.contrast import triton
from tests.aot.triton_compile import Launch, describe

INTEGERS = ("group", "klass")
"""Arguments that are int32; describe sees float32 in their place."""


def record(dtype: torch.dtype, width: int = 256, n: int = 4096) -> list[Launch]:
    """Every launch of one forward and backward."""
    with MonkeyPatch.context() as patch:
        launches: list[Launch] = []

        def launch(call: triton.Call, kernel: Any, programs: int, **arguments: Any) -> None:
            found = describe(kernel, {**arguments, **call.config[kernel.fn.__name__]})
            integers = {name: "*i32" for name in INTEGERS if name in found.signature}
            launches.append(replace(found, signature=found.signature | integers))

        patch.setattr(triton.Call, "launch", launch)
        embedding = torch.empty(n, width, dtype=dtype, device="meta")
        operands = (embedding, *(torch.empty(n, device="meta") for _ in INTEGERS))
        loss, rows, scale = triton.forward(*operands, 0.1)
        triton.backward(loss, *operands, rows, scale, 0.1)
    return launches
