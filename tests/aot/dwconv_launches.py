"""The launches of dwconv at production sizes, recorded on the meta device: nothing is computed."""

from typing import Any

import torch
from pytest import MonkeyPatch

from ssr_kernels.dwconv import triton
from tests.aot.triton_compile import Launch, describe

STAGES = {256: 128, 512: 64, 1280: 32, 2048: 16}
"""Hidden channels and width of MiT-B5's Mix-FFN at crops of 512."""

HEAD = (1024, 128, (6, 12, 18))
"""Channels, width and dilations of the head."""


def record(dtype: torch.dtype, crop: int = 512, batch: int = 2) -> list[Launch]:
    """Every launch of forward and backward over the four stages and the head, at crops of `crop`."""
    with MonkeyPatch.context() as patch:
        launches: list[Launch] = []

        def launch(kernel: Any, programs: int, **arguments: Any) -> None:
            launches.append(describe(kernel, arguments))

        patch.setattr(triton, "launch", launch)
        for channels, width in STAGES.items():
            x, weight, bias = _map(dtype, batch, width * crop // 512, channels)
            triton.gelu_forward(x, weight, bias)
            triton.gelu_backward(x, x, weight, bias, (True, True, True))
        channels, width, dilations = HEAD
        x, weight, _ = _map(dtype, batch, width * crop // 512, channels)
        grads = triton.dilated_forward(x, [weight] * 3, dilations)
        triton.dilated_backward(grads, x, [weight] * 3, dilations, (True,) * 4)
    return launches


def _map(dtype: torch.dtype, batch: int, width: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.empty(batch, width, width, channels, dtype=dtype, device="meta")
    return x, x.new_empty(channels, 1, 3, 3), x.new_empty(channels)
