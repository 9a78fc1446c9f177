"""segloss: bilinear upsampling of stride-4 logits and the weighted cross-entropy of it, forward and backward.

The floor is the traffic of a form that never writes the upsampled logits: forward the logits, labels and weights in and
lse out; backward those and lse in and the logits' gradient out, 18 bytes a label pixel in all. Its arithmetic is not in
it: an exponential a pixel and class forward and, in the gather form, four backward, which no tensor core computes and
which take longer than the traffic. `least` leaves lse out and reads labels and weights once. The case for this op is
memory (see the saved and peak columns: eager holds several maps of B*K*H*W numbers) and determinism, then time.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import (
    COMPILED,
    EAGER,
    Bench,
    Case,
    Inputs,
    Outputs,
    Pair,
    Provider,
    Row,
    Setting,
    Task,
    Work,
    by_autograd,
)
from bench.kernels.align import against_compile
from ssr_kernels.segloss import SEGLOSS, forms, reference, segloss

IGNORE, STRIDE = 255, 4
MEMORY_GOAL = 0.05
"""Of eager's peak, ours at most."""
GPU_SIZES = ((2, 512, 512, 19), (8, 512, 512, 19), (2, 1024, 1024, 19), (8, 1024, 1024, 19), (2, 512, 512, 150))
CPU_SIZES = ((4, 96, 192, 8), (2, 256, 256, 19))
"""(images, height, width, classes) of the labels; the first on a CPU is the demo's."""
ODD_SIZES = ((1, 5, 3, 7, 17, 13), (2, 3, 37, 150, 10, 75))
"""(images, h, w, classes, height, width)."""
LIGER_IN_GRAPHS = ("it reads a number back to the host (how many labels are not ignored)",)


def make(
    shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """Normal logits; a tenth of the labels ignored; weights in [0, 1), as of pseudo-labels and rare classes."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(shape, generator=generator, device=device).to(dtype)
    labels = torch.randint(0, shape[3], (shape[0], *size), generator=generator, device=device)
    ignored = torch.rand(labels.shape, generator=generator, device=device) < 0.1
    weights = torch.rand(labels.shape, generator=generator, device=device)
    labels = torch.where(ignored, IGNORE, labels).to(torch.uint8)
    return Inputs({"logits": logits.requires_grad_()}, {"labels": labels, "weights": weights})


def exact(inputs: Inputs) -> Outputs:
    """The closed form in float64, which tests/kernels compares with the definition: that needs several whole maps."""
    logits = inputs.leaves["logits"].detach().double()
    labels, weights = inputs.constants["labels"], inputs.constants["weights"]
    loss, lse = forms.forward(logits, labels, weights, IGNORE)
    gradient = forms.backward(torch.ones_like(loss), logits, labels, weights, lse, IGNORE)
    return {"loss": loss, "logits": gradient}


def make_case(shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype) -> Case:
    """The case of logits [B, h, w, K] and labels of `size`."""
    batch, h, w, classes = shape
    pixels, traffic = batch * size[0] * size[1], batch * h * w * classes * dtype.itemsize
    name = f"B={batch} {h}x{w} to {size[0]}x{size[1]}, {classes} classes"
    sizes = {"batch": batch, "h": h, "w": w, "height": size[0], "width": size[1], "classes": classes}
    floor, least = Work(3 * traffic + 18 * pixels, 0), Work(2 * traffic + 5 * pixels, 0)
    return Case(name, sizes, dtype, partial(make, shape, size, dtype), exact, floor, least)


def cases(setting: Setting) -> list[Case]:
    """On a GPU bf16 logits of training steps; on a CPU float32 ones, the demo's first."""
    on_gpu = setting.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = (GPU_SIZES if on_gpu else CPU_SIZES)[: 1 if setting.quick else None]
    return [
        make_case((batch, height // STRIDE, width // STRIDE, classes), (height, width), dtype)
        for batch, height, width, classes in sizes
    ]


def odd_cases(setting: Setting) -> list[Case]:
    """Sizes that no block fits."""
    dtypes = (torch.float32,) if setting.device.type == "cpu" else (torch.float32, torch.bfloat16)
    return [
        make_case((b, h, w, k), (height, width), dtype) for b, h, w, k, height, width in ODD_SIZES for dtype in dtypes
    ]


def _arguments(task: Task) -> tuple[Any, ...]:
    return task.inputs.leaves["logits"], task.inputs.constants["labels"], task.inputs.constants["weights"], IGNORE


def _eager(task: Task) -> Pair:
    return by_autograd(partial(reference.segloss, *_arguments(task)), task.inputs)


def _compiled(task: Task) -> Pair:
    compiled = torch.compile(reference.segloss, dynamic=False, fullgraph=True)
    return by_autograd(partial(compiled, *_arguments(task)), task.inputs)


def _liger(task: Task) -> Pair:
    """Liger's cross-entropy of the upsampled logits as rows, a loss a pixel, which are then weighted."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    logits, labels, weights, _ = _arguments(task)
    losses = LigerCrossEntropyLoss(ignore_index=IGNORE, reduction="none")

    def loss() -> Tensor:
        maps = F.interpolate(logits.float().permute(0, 3, 1, 2), size=labels.shape[1:], mode="bilinear")
        rows = maps.permute(0, 2, 3, 1).reshape(-1, logits.shape[3])
        return (losses(rows, labels.reshape(-1).long()) * weights.reshape(-1)).sum() / labels.numel()

    return by_autograd(loss, task.inputs)


def _against_liger(task: Task) -> list[str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return ["liger-kernel is not installed (pip install liger-kernel)"]
    return [] if task.setting.device.type == "cuda" else ["liger-kernel's cross-entropy runs on a GPU only"]


def _ours(backend: str, task: Task) -> Pair:
    return by_autograd(partial(segloss, *_arguments(task), backend=backend), task.inputs)


def _against_ours(backend: str, task: Task) -> list[str]:
    return SEGLOSS.reasons(backend, _arguments(task)[:3])


def goals(case: Case, rows: dict[str, Row]) -> list[str]:
    """What this project promises on a GPU."""
    ours, eager = rows["triton"].peak_bytes, rows[EAGER].peak_bytes
    if ours is None or not eager:
        return []
    verdict = "reached" if ours < MEMORY_GOAL * eager else "MISSED"
    return [f"triton: {100 * ours / eager:.1f} % of eager's peak memory; goal {100 * MEMORY_GOAL:g} % {verdict}"]


BENCH = Bench(
    "kernels.segloss",
    "upsampled, weighted cross-entropy of stride-4 logits",
    cases,
    (
        Provider(EAGER, _eager),
        Provider(COMPILED, _compiled, against_compile),
        Provider("liger", _liger, _against_liger, LIGER_IN_GRAPHS),
        Provider("triton", partial(_ours, "triton"), partial(_against_ours, "triton"), ours=True),
        Provider("reference", partial(_ours, "reference"), partial(_against_ours, "reference")),
    ),
    odd_cases,
    goals,
)
