"""dwconv: the depthwise 3x3 convolution of MiT's Mix-FFN with bias and GELU, and the head's three dilated ones.

Floors are traffic. Of the first: x in and the result out forward; x and the result's gradient in and x's gradient out
backward: five passes over a map. Of the second: x in and three maps out; x and three gradients in and x's gradient out:
nine passes. Two kernels make the gradients of the second, which costs three passes more.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
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
    speedup,
)
from bench.kernels.align import against_compile
from ssr_kernels.dwconv import DILATED, GELU, dwconv_dilated, dwconv_gelu, reference

STAGES = ((128, 256), (64, 512), (32, 1280), (16, 2048))
"""(height and width, hidden channels) of MiT-B5's stages at crops of 512."""
HEAD = ((128, 1024),)
"""The same of the head's dilated branches."""
DILATIONS = (6, 12, 18)
GPU_BATCHES = ((2, 512), (8, 512), (2, 1024))
CPU_MAPS = ((2, 24, 64), (2, 6, 256))
"""(images, height and width, channels)."""
ODD_MAPS = ((1, 33, 47, 100), (2, 5, 70, 9))
COMPILE_GOAL, FLOOR_GOAL = 2.0, 60.0
NCHW = "cuDNN NCHW"


def make(
    shape: tuple[int, int, int, int], branches: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """A normal map, the filters, the bias (without branches), and the gradient of each result."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    channels = shape[3]
    leaves = {"x": normal(*shape)}
    leaves |= {f"weight{number}": normal(channels, 1, 3, 3) / 3 for number in range(branches or 1)}
    leaves |= {} if branches else {"bias": normal(channels)}
    grads = {f"grad{number}": normal(*shape) for number in range(branches or 1)}
    return Inputs({name: leaf.requires_grad_() for name, leaf in leaves.items()}, grads)


def _as_pair(call: Callable[[], Sequence[Tensor]], inputs: Inputs) -> Pair:
    """A call with its gradients, which the results' given gradients start."""

    def both() -> Outputs:
        outs = call()
        gradients = torch.autograd.grad(outs, list(inputs.leaves.values()), list(inputs.constants.values()))
        results = {f"out{number}": out.detach() for number, out in enumerate(outs)}
        return {**results, **dict(zip(inputs.leaves, gradients, strict=True))}

    return Pair(lambda: call()[-1], both)


def _gelu(function: Callable[..., Tensor], inputs: Inputs) -> Sequence[Tensor]:
    return (function(*inputs.leaves.values()),)


def _dilated(function: Callable[..., list[Tensor]], inputs: Inputs) -> Sequence[Tensor]:
    x, *weights = inputs.leaves.values()
    return function(x, weights, DILATIONS)


def exact(call: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs) -> Outputs:
    """The definition in float64."""
    double = Inputs(
        {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()},
        {name: grad.double() for name, grad in inputs.constants.items()},
    )
    return _as_pair(partial(call, double), double).both()


def make_case(batch: int, height: int, width: int, channels: int, dtype: torch.dtype, branches: int = 0) -> Case:
    """The case of a map; without branches that of the convolution with the GELU."""
    shape, count = (batch, height, width, channels), batch * height * width * channels
    passes = 2 * branches + 3 if branches else 5
    flops = 2 * 9 * 3 * count * (branches or 1)
    definition = partial(_dilated, reference.dwconv_dilated) if branches else partial(_gelu, reference.dwconv_gelu)
    work = Work(passes * count * dtype.itemsize, flops)
    name = f"B={batch} {height}x{width} C={channels}"
    sizes = {"batch": batch, "height": height, "width": width, "channels": channels}
    return Case(name, sizes, dtype, partial(make, shape, branches, dtype), partial(exact, definition), work, work)


def cases(branches: int, setting: Setting) -> list[Case]:
    """On a GPU bf16 maps of MiT-B5 or of its head; on a CPU small float32 ones."""
    if setting.device.type != "cuda":
        found = [make_case(batch, size, size, c, torch.float32, branches) for batch, size, c in CPU_MAPS]
    else:
        found = [
            make_case(batch, size * crop // 512, size * crop // 512, channels, torch.bfloat16, branches)
            for batch, crop in GPU_BATCHES
            for size, channels in (HEAD if branches else STAGES)
        ]
    return found[: 1 if setting.quick else None]


def odd_cases(branches: int, setting: Setting) -> list[Case]:
    """Maps that no block fits."""
    dtypes = (torch.float32,) if setting.device.type == "cpu" else (torch.float32, torch.bfloat16)
    return [make_case(*shape, dtype, branches) for shape in ODD_MAPS for dtype in dtypes]


def _provided(call: Callable[..., Sequence[Tensor]], function: Callable[..., object], task: Task) -> Pair:
    return _as_pair(partial(call, function, task.inputs), task.inputs)


def _compiled(call: Callable[..., Sequence[Tensor]], function: Callable[..., object], task: Task) -> Pair:
    return _provided(call, torch.compile(function, dynamic=False, fullgraph=True), task)


def _planes(call: Callable[..., Sequence[Tensor]], function: Callable[..., object], task: Task) -> Pair:
    """The definition on a map that lies in memory as [B, C, H, W], results too: what a network in NCHW runs."""
    x = task.inputs.leaves["x"].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    grads = {n: g.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for n, g in task.inputs.constants.items()}
    inputs = Inputs({**task.inputs.leaves, "x": x}, grads)
    return _as_pair(partial(call, function, inputs), inputs)


def _planes_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    maps = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3])
    return torch.nn.functional.gelu(maps).permute(0, 2, 3, 1)


def _planes_dilated(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    maps, groups = x.permute(0, 3, 1, 2), x.shape[3]
    return [
        torch.nn.functional.conv2d(maps, weight, None, padding=d, dilation=d, groups=groups).permute(0, 2, 3, 1)
        for weight, d in zip(weights, dilations, strict=True)
    ]


def goals(case: Case, rows: dict[str, Row]) -> list[str]:
    """What this project promises on a GPU."""
    lines, row = [], rows["triton"]
    if row.status != "ok":
        return []
    if ratio := speedup(rows, "triton", COMPILED):
        verdict = "reached" if ratio >= COMPILE_GOAL else "MISSED"
        lines.append(f"triton: {ratio:.2f}x torch.compile; goal {COMPILE_GOAL:g}x {verdict}")
    if row.floor_percent is not None:
        verdict = "reached" if row.floor_percent >= FLOOR_GOAL else "MISSED"
        lines.append(f"triton: {row.floor_percent:.0f} % of copy bandwidth; goal {FLOOR_GOAL:g} % {verdict}")
    return lines


def _bench(
    name: str,
    about: str,
    branches: int,
    call: Callable[..., Sequence[Tensor]],
    functions: tuple[Callable[..., object], Callable[..., object], Callable[..., object]],
) -> Bench:
    """The benchmark of one op: its definition, the same in NCHW, and ours."""
    definition, planes, ours = functions
    op = DILATED if branches else GELU

    def against(backend: str, task: Task) -> list[str]:
        return op.reasons(backend, list(task.inputs.leaves.values()))

    def provider(backend: str) -> Provider:
        build = partial(_provided, call, partial(ours, backend=backend))
        return Provider(backend, build, partial(against, backend), ours=backend == "triton")

    return Bench(
        name,
        about,
        partial(cases, branches),
        (
            Provider(EAGER, partial(_provided, call, definition)),
            Provider(NCHW, partial(_planes, call, planes)),
            Provider(COMPILED, partial(_compiled, call, definition), against_compile),
            provider("triton"),
            provider("reference"),
        ),
        partial(odd_cases, branches),
        goals,
    )


BENCH = _bench(
    "kernels.dwconv",
    "depthwise 3x3 + bias + GELU, channels last",
    0,
    _gelu,
    (reference.dwconv_gelu, _planes_gelu, dwconv_gelu),
)
DILATED_BENCH = _bench(
    "kernels.dwconv_dilated",
    "three dilated depthwise 3x3 of one map, channels last",
    len(DILATIONS),
    _dilated,
    (reference.dwconv_dilated, _planes_dilated, dwconv_dilated),
)
