"""The launches of segloss and pseudo_label at production sizes, recorded on the meta device: nothing is computed."""

from dataclasses import replace
from typing import Any

import torch
from pytest import MonkeyPatch

from ssr_kernels.segloss import triton
from tests.aot.triton_compile import Launch, describe

COUNTS = {"surest_classes": {"partials": "*i32"}, "count_sum": {"partials": "*i32", "count": "*i64"}}
"""Arguments that are whole numbers; describe sees float32 in their place."""


def record(dtype: torch.dtype, classes: int, batch: int = 8, crop: int = 1024) -> list[Launch]:
    """Every launch of one forward and backward and of pseudo-labels, logits at stride 4."""
    with MonkeyPatch.context() as patch:
        launches: list[Launch] = []

        def launch(call: triton.Call, kernel: Any, programs: int, **arguments: Any) -> None:
            name = kernel.fn.__name__
            whole = {argument: torch.empty(0, device="meta") for argument in COUNTS.get(name, {})}
            found = describe(kernel, {**arguments, **whole, **call.config[name]})
            launches.append(replace(found, signature=found.signature | COUNTS.get(name, {})))

        patch.setattr(triton.Call, "launch", launch)
        logits = torch.empty(batch, crop // 4, crop // 4, classes, dtype=dtype, device="meta")
        weights = torch.empty(batch, crop, crop, device="meta")
        labels = weights.to(torch.uint8)
        loss, lse = triton.forward(logits, labels, weights, 255)
        triton.backward(loss, logits, labels, weights, lse, 255)
        triton.pseudo_label(logits, crop, crop, 0.968)
    return launches
