"""contrast: the multi-positive InfoNCE of sampled pixels, forward and backward, and the sampler that draws them.

The loss's floor is that of the form which kernels.md (section 5) plans: the n x n products once in the forward pass and
twice in the backward pass (the scores again, and their gradient times the rows), 2 n^2 D operations each; traffic
decides nowhere. At 800 TFLOP/s and D = 256: 32 us (n = 4096), 129 us (8192), 515 us (16384), 2.1 ms (32768). `least`
leaves out half of the products that are symmetric, which no kernel here makes use of.

The sampler's floor is its traffic: the ids read twice (to count and to sort) and the samples written.
"""

from functools import partial
from typing import Any

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
    by_autograd,
    speedup,
)
from bench.kernels.align import against_compile
from ssr_kernels import counter
from ssr_kernels.contrast import CONTRAST_LOSS, SAMPLE_PAIRS, contrast_loss, forms, reference, sample_pairs

WIDTH, TEMPERATURE = 256, 0.1
PIXELS, CLASSES = 32, 19
"""Rows of a segment, and classes of a data set."""
GPU_ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
CPU_ROWS = (256, 512)
EAGER_GOAL, FLOOR_GOAL, GOAL_ROWS = 4.0, 2.0, 8192
SAMPLER_GOAL_US = 50.0


def make(n: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal rows; segments of 32 rows, of which two thirds have a class."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(n, width, generator=generator, device=device).to(dtype)
    group = torch.arange(n, device=device) // PIXELS
    draw = torch.randint(0, 3 * CLASSES // 2, (int(group.max()) + 1 if n else 0,), generator=generator, device=device)
    klass = torch.where(draw < CLASSES, draw, -1)[group]
    return Inputs({"x": rows.requires_grad_()}, {"group": group.to(torch.int32), "klass": klass.to(torch.int32)})


def exact(inputs: Inputs) -> Outputs:
    """The closed form in float64, which tests/kernels compares with the definition: that needs 8 n^2 bytes a matrix."""
    x, group, klass = inputs.leaves["x"].detach().double(), inputs.constants["group"], inputs.constants["klass"]
    loss, rows, scale = forms.forward(x, group, klass, TEMPERATURE)
    gradient = forms.backward(torch.ones_like(loss), x, group, klass, rows, scale, TEMPERATURE)
    return {"loss": loss, "x": gradient}


def make_case(n: int, width: int, dtype: torch.dtype) -> Case:
    """The case of n rows."""
    product, traffic = 2 * n * n * width, n * width * dtype.itemsize
    floor, least = Work(5 * traffic + 60 * n, 3 * product), Work(2 * traffic, 2 * product)
    return Case(f"n={n}", {"n": n, "width": width}, dtype, partial(make, n, width, dtype), exact, floor, least)


def cases(setting: Setting) -> list[Case]:
    """On a GPU bf16 rows of a training step and far beyond; on a CPU a few float32 ones."""
    on_gpu = setting.device.type == "cuda"
    sizes = (GPU_ROWS if on_gpu else CPU_ROWS)[: 1 if setting.quick else None]
    return [make_case(n, WIDTH if on_gpu else 64, torch.bfloat16 if on_gpu else torch.float32) for n in sizes]


def odd_cases(setting: Setting) -> list[Case]:
    """Rows and widths that no block fits."""
    dtypes = (torch.float32,) if setting.device.type == "cpu" else (torch.float32, torch.bfloat16)
    return [make_case(n, width, dtype) for n, width in ((333, 200), (65, 24)) for dtype in dtypes]


def _arguments(task: Task) -> tuple[Any, ...]:
    inputs = task.inputs
    return inputs.leaves["x"], inputs.constants["group"], inputs.constants["klass"], TEMPERATURE


def _eager(task: Task) -> Pair:
    return by_autograd(partial(reference.contrast_loss, *_arguments(task)), task.inputs)


def _compiled(task: Task) -> Pair:
    compiled = torch.compile(reference.contrast_loss, dynamic=False, fullgraph=True)
    return by_autograd(partial(compiled, *_arguments(task)), task.inputs)


def _ours(backend: str, task: Task) -> Pair:
    return by_autograd(partial(contrast_loss, *_arguments(task), backend=backend), task.inputs)


def _against_ours(backend: str, task: Task) -> list[str]:
    return CONTRAST_LOSS.reasons(backend, _arguments(task)[:3])


def goals(case: Case, rows: dict[str, Row]) -> list[str]:
    """What this project promises of the loss on a GPU."""
    if case.sizes["n"] < GOAL_ROWS or rows["triton"].status != "ok":
        return []
    lines, row = [], rows["triton"]
    if ratio := speedup(rows, "triton", EAGER):
        verdict = "reached" if ratio >= EAGER_GOAL else "MISSED"
        lines.append(f"triton: {ratio:.2f}x eager; goal {EAGER_GOAL:g}x {verdict}")
    if row.graph_us and row.floor_us:
        ratio = row.graph_us.median / row.floor_us
        verdict = "reached" if ratio <= FLOOR_GOAL else "MISSED"
        lines.append(f"triton: graph replay {ratio:.2f}x the floor; goal {FLOOR_GOAL:g}x {verdict}")
    return lines


BENCH = Bench(
    "kernels.contrast",
    "multi-positive InfoNCE over sampled pixels",
    cases,
    (
        Provider(EAGER, _eager),
        Provider(COMPILED, _compiled, against_compile),
        Provider("triton", partial(_ours, "triton"), partial(_against_ours, "triton"), ours=True),
        Provider("reference", partial(_ours, "reference"), partial(_against_ours, "reference")),
    ),
    odd_cases,
    goals,
)


# ---- the sampler ----

SEGMENTS = 64
SAMPLER_GPU = ((4, 128, 50), (4, 128, 500), (4, 256, 50), (4, 256, 500))
SAMPLER_CPU = ((2, 32, 20), (2, 64, 50))
"""(images, height and width, segments of an image)."""


def make_segments(batch: int, size: int, count: int, device: torch.device, seed: int) -> Inputs:
    """Cells around random points: regions of unequal size, as masks are."""
    generator = torch.Generator(device).manual_seed(seed)
    points = torch.rand(batch, count, 2, generator=generator, device=device) * size
    y, x = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.float32),) * 2, indexing="ij")
    pixels = torch.stack([y, x], 2).view(1, -1, 2).expand(batch, -1, -1)
    nearest = torch.cdist(pixels, points).argmin(2).view(batch, size, size)
    key = counter.fold(torch.zeros((), dtype=torch.int64, device=device), seed)
    return Inputs({}, {"segments": (nearest + 1).to(torch.int32), "key": key})


def exact_counts(inputs: Inputs) -> Outputs:
    """How many pixels are drawn of each segment, which any sampler must agree on; the draws themselves are a test's."""
    segments, key = inputs.constants["segments"], inputs.constants["key"]
    return {"count": sample_pairs(segments, key, SEGMENTS, PIXELS, backend="reference").taken.double()}


def _sampler_case(batch: int, size: int, count: int) -> Case:
    traffic = batch * (8 * size * size + 8 * SEGMENTS * PIXELS)
    name = f"B={batch} {size}x{size}, {count} segments"
    sizes = {"batch": batch, "size": size, "segments": count}
    work = Work(traffic, 0)
    return Case(name, sizes, torch.float32, partial(make_segments, batch, size, count), exact_counts, work, work)


def sampler_cases(setting: Setting) -> list[Case]:
    """Grids of stride 4 at crops of 512 and 1024; small ones on a CPU."""
    sizes = SAMPLER_GPU if setting.device.type == "cuda" else SAMPLER_CPU
    return [_sampler_case(*size) for size in sizes[: 1 if setting.quick else None]]


def odd_sampler_cases(setting: Setting) -> list[Case]:
    """A grid that no tile fits, with more segments than are asked for."""
    return [_sampler_case(3, 37, 90)]


def _as_pair(sample: Any, task: Task) -> Pair:
    """A sampler as what the harness times: its counts stand for its result."""
    segments, key = task.inputs.constants["segments"], task.inputs.constants["key"]

    def counts() -> Tensor:
        drawn: Tensor = sample(segments, key)
        return drawn

    return Pair(counts, lambda: {"count": counts().double()})


def _ours_sampling(backend: str, task: Task) -> Pair:
    return _as_pair(lambda segments, key: sample_pairs(segments, key, SEGMENTS, PIXELS, backend=backend).taken, task)


def _against_sampling(backend: str, task: Task) -> list[str]:
    return SAMPLE_PAIRS.reasons(backend, (task.inputs.constants["segments"],))


def _loop_and_sync(task: Task) -> Pair:
    """As the field writes it: a Python loop over images and segments, unique and nonzero, a permutation for each."""

    def sample(segments: Tensor, key: Tensor) -> Tensor:
        counts = torch.zeros(len(segments), SEGMENTS, device=segments.device)
        for image, ids in enumerate(segments.flatten(1)):
            names, sizes = ids.unique(return_counts=True)
            for rank, place in enumerate(sizes.argsort(descending=True, stable=True)[:SEGMENTS].tolist()):
                members = (ids == names[place]).nonzero()[:, 0]
                drawn = members[torch.randperm(len(members))[:PIXELS].to(members.device)]
                counts[image, rank] = len(drawn)
        return counts

    return _as_pair(sample, task)


def sampler_goals(case: Case, rows: dict[str, Row]) -> list[str]:
    """What this project promises of the sampler on a GPU."""
    row = rows["cuda"]
    if case.sizes["size"] != 128 or row.graph_us is None:
        return []
    verdict = "reached" if row.graph_us.median <= SAMPLER_GOAL_US else "MISSED"
    return [f"cuda: {row.graph_us.median:.0f} us in graph replay; goal {SAMPLER_GOAL_US:g} us {verdict}"]


SAMPLER = Bench(
    "kernels.contrast_sample",
    "pixels of the largest segments of each image",
    sampler_cases,
    (
        Provider("loop and sync", _loop_and_sync, graph_reasons=("its shapes depend on the data",)),
        Provider("cuda", partial(_ours_sampling, "cuda"), partial(_against_sampling, "cuda"), ours=True),
        Provider("cpp", partial(_ours_sampling, "cpp"), partial(_against_sampling, "cpp"), ours=True),
        Provider("reference", partial(_ours_sampling, "reference"), partial(_against_sampling, "reference")),
    ),
    odd_sampler_cases,
    sampler_goals,
)
