"""The launches of align at production sizes, recorded on the meta device: nothing is computed."""

from typing import Any

import torch
from pytest import MonkeyPatch

from ssr_kernels.align import forms, triton_call
from ssr_kernels.align.triton import Triton
from tests.aot.triton_compile import Launch, describe

POINTS = {64: 4, 128: 8, 320: 16, 512: 32}
"""Channels and stride of MiT-B5's stages; the head's fused feature, 256 channels at stride 4, comes after them."""


def record(dtype: torch.dtype, width: int = 256, batch: int = 2, crop: int = 1024) -> list[Launch]:
    """Every launch of one grouped forward and backward over five alignment points, SAM's grid 64 x 64."""
    with MonkeyPatch.context() as patch:
        launches: list[tuple[Any, dict[str, Any]]] = []

        def launch(call: triton_call.Call, kernel: Any, programs: Any, **arguments: Any) -> None:
            ends = {} if programs is None else {"ends": tuple(torch.tensor(programs).cumsum(0).tolist())}
            launches.append((kernel, {**arguments, **ends, **call.config[kernel.fn.__name__]}))

        patch.setattr(triton_call.Call, "launch", launch)
        run(dtype, width, batch, crop)
    return [describe(kernel, arguments) for kernel, arguments in launches]


def run(dtype: torch.dtype, width: int, batch: int, crop: int) -> None:
    """One grouped forward and backward on the meta device."""
    points = [*POINTS.items(), (256, 4)]
    features = [
        torch.empty(batch, crop // stride, crop // stride, c, dtype=dtype, device="meta") for c, stride in points
    ]
    weights = [torch.empty(width, c, dtype=dtype, device="meta") for c, _ in points]
    biases = [torch.empty(width, dtype=dtype, device="meta") for _ in points]
    target = torch.empty(batch, 64, 64, width, dtype=dtype, device="meta")
    stages = forms.split(features, weights, biases, None)
    align = Triton()
    loss, rows, scale = align.forward(stages, target, [1.0] * len(points))
    align.backward(loss, stages, target, rows, scale, [True] * (3 * len(points)))
