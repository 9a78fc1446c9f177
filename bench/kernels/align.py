"""align: four stages of MiT-B5 against SAM's neck, forward and backward; and with the head's feature as fifth point.

The floor is that of the form which kernels.md (section 4) plans: per stage one forward kernel and two backward kernels
(dX, dW), each of which reads the stage and the target once, and three float32 row scalars (cosine, 1/|p|, 1/|t|) kept
between them:

    bytes = 4 X + 3 T points + 36 rows + 4 P,      flops = 8 D sum(rows C)

X features of all points (read by three kernels, dX written), T target, P weights and biases (read by three kernels,
gradients written), 36 = 4 bytes x 3 scalars x (1 write + 2 reads), and four products of 2 D C a row: p, p again, dX and
dW. At 3.0 TB/s and 800 TFLOP/s this gives 28.8, 113, 62.9 and 498 us for (B, crop) = (2, 512), (8, 512), (2, 1024),
(16, 1024); kernels.md has 28, 110, 64 and 516, all within 4 %. Traffic decides everywhere.

This is a floor of that form, not of the task. A target that stays in L2 (4 MB at B=2) is read from memory once and not
twelve times, and the Gram form finds dX in its only pass over X, so more than 100 % of the floor is possible. What no
kernel can beat is the traffic of `least`: X, T and P read once, dX and dP written once. Its arithmetic, which decides
nowhere, is p, dX and dW, or the same in C dimensions (the Gram form) where that is less.
"""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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
    speedup,
)
from ssr_kernels.align import ALIGN, align_stages, reference

STAGES = ((4, 64), (8, 128), (16, 320), (32, 512))
"""(stride, channels) of MiT-B5's stages."""
HEAD = (4, 256)
"""(stride, channels) of the head's fused feature."""
GRID, WIDTH = 64, 256
"""SAM's neck: its grid for any crop, and its channels."""
GPU_SIZES = ((2, 512), (8, 512), (2, 1024), (8, 1024))
CPU_SIZES = ((1, 64), (1, 128))
SPEEDUP_GOALS = ((COMPILED, 2.0), (EAGER, 15.0))
GOAL_CROP = 1024
FLOOR_GOAL = 2.0
"""Graph replay takes at most this many times the floor."""


@dataclass(frozen=True)
class Shape:
    """The shape of one call."""

    batch: int
    grids: tuple[tuple[int, int], ...]
    """(h, w) of each point."""
    channels: tuple[int, ...]
    target_grid: tuple[int, int] = (GRID, GRID)
    biases: bool = True
    valid: bool = False

    @staticmethod
    def of_crop(batch: int, crop: int, head: bool = False) -> "Shape":
        """The points of MiT-B5 on square crops."""
        points = (*STAGES, HEAD) if head else STAGES
        return Shape(batch, tuple((crop // s, crop // s) for s, _ in points), tuple(channels for _, channels in points))

    @property
    def rows(self) -> list[int]:
        return [self.batch * h * w for h, w in self.grids]


def floor(shape: Shape, itemsize: int) -> Work:
    """Traffic and arithmetic of the three-kernel form, see the head of this file."""
    x, target, parameters, products = _sizes(shape)
    scalars = 36 * sum(shape.rows)
    return Work(itemsize * (4 * x + 3 * len(shape.grids) * target + 4 * parameters) + scalars, 4 * products)


def least(shape: Shape, itemsize: int) -> Work:
    """Compulsory traffic and arithmetic, see the head of this file."""
    x, target, parameters, _ = _sizes(shape)
    targets = shape.batch * shape.target_grid[0] * shape.target_grid[1]
    flops = 0
    for rows, c in zip(shape.rows, shape.channels, strict=True):
        direct = 6 * rows * WIDTH * c  # p, dX, dW
        gram = 4 * rows * c * c + 4 * targets * WIDTH * c  # A x and S; T W and its adjoint
        flops += min(direct, gram)
    return Work(itemsize * (2 * x + target + 2 * parameters), flops)


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    """Elements of the features, the target and the parameters, and the operations of one product, of all points."""
    x = sum(rows * c for rows, c in zip(shape.rows, shape.channels, strict=True))
    target = shape.batch * shape.target_grid[0] * shape.target_grid[1] * WIDTH
    parameters = WIDTH * (sum(shape.channels) + len(shape.channels) * shape.biases)
    return x, target, parameters, 2 * WIDTH * x


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal features and target; weights that keep the variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    leaves = {}
    for index, ((h, w), c) in enumerate(zip(shape.grids, shape.channels, strict=True), 1):
        leaves[f"x{index}"] = normal(shape.batch, h, w, c)
        leaves[f"weight{index}"] = normal(WIDTH, c, scale=c**-0.5)
        if shape.biases:
            leaves[f"bias{index}"] = normal(WIDTH, scale=0.1)
    constants = {"target": normal(shape.batch, *shape.target_grid, WIDTH)}
    if shape.valid:
        for index, (h, w) in enumerate(shape.grids, 1):
            draw = torch.rand(shape.batch, h, w, generator=generator, device=device)
            constants[f"valid{index}"] = draw < 0.7
            constants[f"valid{index}"][0, 0, 0] = True  # never empty: then there would be nothing to compare
    return Inputs({name: leaf.requires_grad_() for name, leaf in leaves.items()}, constants)


@dataclass(frozen=True)
class Arguments:
    """The arguments of align_stages."""

    features: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    target: Tensor
    valid: list[Tensor] | None
    shares: list[float]

    @staticmethod
    def of(inputs: Inputs) -> "Arguments":
        points = sum(name.startswith("x") for name in inputs.leaves)
        numbers = range(1, points + 1)
        valid = [inputs.constants[f"valid{i}"] for i in numbers] if "valid1" in inputs.constants else None
        return Arguments(
            [inputs.leaves[f"x{i}"] for i in numbers],
            [inputs.leaves[f"weight{i}"] for i in numbers],
            [inputs.leaves.get(f"bias{i}") for i in numbers],
            inputs.constants["target"],
            valid,
            [1.0] * points,
        )

    def ordered(self) -> tuple[Any, ...]:
        return (self.features, self.weights, self.biases, self.target, self.valid, self.shares)


def exact(inputs: Inputs) -> Outputs:
    """The definition in float64, one point of one image at a time: a map of B=8, crop 1024 is 1 GB in float64."""
    arguments = Arguments.of(inputs)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
    loss = torch.zeros((), dtype=torch.float64, device=arguments.target.device)
    for index in range(1, len(arguments.features) + 1):
        x, weight, bias = (leaves.get(f"{kind}{index}") for kind in ("x", "weight", "bias"))
        assert x is not None and weight is not None
        mask = None if arguments.valid is None else arguments.valid[index - 1].double()
        for image in range(x.shape[0]):
            one = slice(image, image + 1)
            share = 1 / x.shape[0] if mask is None else float(mask[one].sum() / mask.sum())
            target, valid = arguments.target[one].double(), None if mask is None else [mask[one]]
            part = reference.align_stages([x[one]], [weight], [bias], target, valid, [share])
            part.backward()
            loss += part.detach()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss, **gradients}


def make_case(name: str, shape: Shape, dtype: torch.dtype, **sizes: int) -> Case:
    """The case of a shape; `sizes` are what else its JSON says."""
    sizes = {**sizes, "points": len(shape.grids), "target_grid": shape.target_grid[0], "target_width": WIDTH}
    work = (floor(shape, dtype.itemsize), least(shape, dtype.itemsize))
    return Case(name, sizes, dtype, partial(make, shape, dtype), exact, *work)


def cases(setting: Setting) -> list[Case]:
    """On a GPU bf16 crops of training; on a CPU small float32 ones. Then the same with the head's point."""
    on_gpu = setting.device.type == "cuda"
    sizes = (GPU_SIZES if on_gpu else CPU_SIZES)[: 1 if setting.quick else None]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    found = []
    for head in (False, True):
        for batch, crop in sizes:
            name = f"B={batch} crop={crop}" + (" +head" if head else "")
            found.append(make_case(name, Shape.of_crop(batch, crop, head), dtype, batch=batch, crop=crop))
    return found


def odd_cases(setting: Setting) -> list[Case]:
    """Grids that no tile fits, one row, C = 320, coarser and finer than the target, no bias, masks."""
    shapes = {
        "odd grids": Shape(2, ((13, 9), (7, 5), (3, 11), (1, 1)), (64, 128, 320, 512), (6, 7)),
        "finer than the target": Shape(1, ((37, 21), (19, 11)), (64, 128), (5, 3)),
        "one row, no bias": Shape(1, ((1, 1), (1, 1)), (64, 512), (4, 4), biases=False),
        "masks": Shape(3, ((11, 7), (5, 9)), (128, 256), (8, 8), valid=True),
    }
    dtypes = (torch.float32,) if setting.device.type == "cpu" else (torch.float32, torch.bfloat16)
    return [make_case(f"{name} {dtype}", shape, dtype) for name, shape in shapes.items() for dtype in dtypes]


def _eager(task: Task) -> Pair:
    return by_autograd(partial(reference.align_stages, *Arguments.of(task.inputs).ordered()), task.inputs)


def _compiled(task: Task) -> Pair:
    compiled = torch.compile(reference.align_stages, dynamic=False, fullgraph=True)
    return by_autograd(partial(compiled, *Arguments.of(task.inputs).ordered()), task.inputs)


def against_compile(task: Task) -> list[str]:
    """Why torch.compile cannot be a provider here."""
    if task.setting.device.type == "cuda":
        return []
    if task.setting.quick:
        return ["compiling takes most of a minute on a CPU: left out with --quick"]
    return [] if shutil.which("c++") or shutil.which("g++") else ["there is no C++ compiler"]


def _ours(backend: str, task: Task) -> Pair:
    return by_autograd(partial(align_stages, *Arguments.of(task.inputs).ordered(), backend=backend), task.inputs)


def _against_ours(backend: str, task: Task) -> list[str]:
    arguments = Arguments.of(task.inputs)
    biases = [bias for bias in arguments.biases if bias is not None]
    tensors = (arguments.target, *arguments.features, *arguments.weights, *biases, *(arguments.valid or ()))
    return ALIGN.reasons(backend, tensors)


def _liger(whole: bool, task: Task) -> Pair:
    """Liger's distillation loss: student x W^T + b, teacher (resampled target) I^T, soft loss 1, hard loss 0.

    Teacher and student must have rows in common, so the target is resampled before, a full map a point; the teacher's
    projection cannot be left out, so it is the identity, one more product. Its own default is chunks of 1024 rows, kept
    in `liger`; `liger 1 chunk` takes all rows of a point at once. Gradients are computed in its forward.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss as Cosine

    arguments = Arguments.of(task.inputs)
    target = arguments.target.permute(0, 3, 1, 2)  # [B, D, hs, ws]
    identity = torch.eye(WIDTH, dtype=target.dtype, device=target.device)
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0}
    options["compiled"] = target.device.type == "cuda"
    labels = [torch.zeros(rows, dtype=torch.int64, device=target.device) for rows in _rows(arguments.features)]
    modules = [Cosine(**options, **({"chunk_size": len(label)} if whole else {})) for label in labels]

    def loss() -> Tensor:
        total = torch.zeros((), device=target.device)
        for module, label, x, weight, bias in zip(
            modules, labels, arguments.features, arguments.weights, arguments.biases, strict=True
        ):
            maps = F.interpolate(target.float(), size=x.shape[1:3], mode="bilinear", align_corners=False)
            teacher = maps.permute(0, 2, 3, 1).reshape(-1, WIDTH).to(x.dtype)  # [B*h*w, D]
            total = total + module(x.reshape(-1, x.shape[3]), weight, teacher, identity, label, bias)
        return total

    return by_autograd(loss, task.inputs)


def _rows(features: Sequence[Tensor]) -> list[int]:
    return [x.shape[0] * x.shape[1] * x.shape[2] for x in features]


def _against_liger(task: Task) -> list[str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return ["liger-kernel is not installed (pip install liger-kernel)"]
    return []


def goals(case: Case, rows: dict[str, Row]) -> list[str]:
    """What this project promises of align on a GPU, for each backend that ran."""
    lines = []
    for provider in (provider for provider in PROVIDERS if provider.ours and rows[provider.name].status == "ok"):
        if case.sizes["crop"] >= GOAL_CROP:
            for other, goal in SPEEDUP_GOALS:
                if ratio := speedup(rows, provider.name, other):
                    graphs = speedup(rows, provider.name, other, "graph_us")
                    replay = f", {graphs:.2f}x in graph replay" if graphs else ""
                    verdict = "reached" if ratio >= goal else "MISSED"
                    lines.append(f"{provider.name}: {ratio:.2f}x {other}{replay}; goal {goal:g}x {verdict}")
        row = rows[provider.name]
        if row.graph_us and row.floor_us:
            ratio = row.graph_us.median / row.floor_us
            verdict = "reached" if ratio <= FLOOR_GOAL else "MISSED"
            lines.append(f"{provider.name}: graph replay {ratio:.2f}x the floor; goal {FLOOR_GOAL:g}x {verdict}")
    return lines


LIGER_IN_GRAPHS = ("its backward reads the loss's gradient on the host",)
LIGER_HOOKS = ("its forward differentiates with torch.func, which refuses saved-tensor hooks",)

PROVIDERS = (
    Provider(EAGER, _eager),
    Provider(COMPILED, _compiled, against_compile),
    Provider("liger", partial(_liger, False), _against_liger, LIGER_IN_GRAPHS, LIGER_HOOKS),
    Provider("liger 1 chunk", partial(_liger, True), _against_liger, LIGER_IN_GRAPHS, LIGER_HOOKS),
    Provider("triton", partial(_ours, "triton"), partial(_against_ours, "triton"), ours=True),
    Provider("cuda", partial(_ours, "cuda"), partial(_against_ours, "cuda"), ours=True),
    Provider("cpp", partial(_ours, "cpp"), partial(_against_ours, "cpp"), ours=True),
    Provider("reference", partial(_ours, "reference"), partial(_against_ours, "reference")),
)

BENCH = Bench(
    "kernels.align",
    "projection + cosine alignment of MiT-B5's stages with SAM's neck",
    cases,
    PROVIDERS,
    odd_cases,
    goals,
)
