"""What the tuner runs of each op: its Triton kernels, forward and backward, without autograd around them.

The functions run on any device that the kernels run on, so also in Triton's interpreter, and on the meta device, where
only what they would compile matters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.harness import Case, Inputs, Outputs
from bench.kernels import align as align_bench
from bench.kernels import contrast as contrast_bench
from bench.kernels import dwconv as dwconv_bench
from bench.kernels import segloss as segloss_bench
from ssr_kernels.align import forms as align_forms
from ssr_kernels.align.triton import Triton
from ssr_kernels.contrast import triton as contrast
from ssr_kernels.dwconv import triton as dwconv
from ssr_kernels.segloss import forms as segloss_forms
from ssr_kernels.segloss import triton as segloss

BF16, FP32 = torch.bfloat16, torch.float32
SURE = 0.5
"""Threshold of the pseudo-labels: normal logits reach it often enough for a count."""


@dataclass(frozen=True)
class Group:
    """Rows of an op's table that are tuned together, on the same cases."""

    rows: tuple[str, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Tunable:
    """An op with a table.

    Attributes:
        run: launches all of its kernels and returns what they compute, by the names that the cases' definition has.
        place: which of a kernel's list of blocks the present table gives these inputs; None: it has no list.
    """

    run: Callable[[Inputs], Outputs]
    groups: tuple[Group, ...]
    place: Callable[[str, Inputs], int | None] = lambda kernel, inputs: None


def run_align(inputs: Inputs) -> Outputs:
    """All points, every gradient."""
    given = align_bench.Arguments.of(inputs)
    stages = align_forms.split(given.features, given.weights, given.biases, given.valid)
    kernels = Triton()
    loss, rows, scale = kernels.forward(stages, given.target, given.shares)
    wanted = [tensor is not None for stage in stages for tensor in (stage.x, stage.weight, stage.bias)]
    gradients = kernels.backward(torch.ones_like(loss), stages, given.target, rows, scale, wanted)
    return {"loss": loss, **dict(zip(inputs.leaves, gradients, strict=True))}


def run_contrast(inputs: Inputs) -> Outputs:
    """The loss and its gradient."""
    x, group, klass = inputs.leaves["x"], inputs.constants["group"], inputs.constants["klass"]
    loss, rows, scale = contrast.forward(x, group, klass, contrast_bench.TEMPERATURE)
    gradient = contrast.backward(torch.ones_like(loss), x, group, klass, rows, scale, contrast_bench.TEMPERATURE)
    return {"loss": loss, "x": gradient}


def run_dwconv(inputs: Inputs) -> Outputs:
    """The convolution with the GELU where there is a bias, else the dilated branches; every gradient."""
    x, *others = inputs.leaves.values()
    grads, wanted = list(inputs.constants.values()), [True] * len(inputs.leaves)
    if "bias" in inputs.leaves:
        weight, bias = others
        outs = [dwconv.gelu_forward(x, weight, bias)]
        gradients = dwconv.gelu_backward(grads[0], x, weight, bias, wanted)
    else:
        outs = dwconv.dilated_forward(x, others, dwconv_bench.DILATIONS)
        gradients = dwconv.dilated_backward(grads, x, others, dwconv_bench.DILATIONS, wanted)
    found = {f"out{number}": out for number, out in enumerate(outs)}
    return {**found, **dict(zip(inputs.leaves, gradients, strict=True))}


def place_dwconv(kernel: str, inputs: Inputs) -> int | None:
    """The entry that the map's width takes."""
    x = inputs.leaves["x"]
    entries = dwconv.configs(x.device)[kernel]
    if not isinstance(entries, list):
        return None
    return entries.index(dwconv.Layout.of(x, kernel, halo=int(kernel == "gelu_backward")).blocks)


def run_segloss(inputs: Inputs) -> Outputs:
    """The loss and its gradient, and the pseudo-labels of the same logits."""
    logits, labels, weights = inputs.leaves["logits"], inputs.constants["labels"], inputs.constants["weights"]
    loss, lse = segloss.forward(logits, labels, weights, segloss_bench.IGNORE)
    gradient = segloss.backward(torch.ones_like(loss), logits, labels, weights, lse, segloss_bench.IGNORE)
    height, width = labels.shape[1:]
    pseudo, confidence, count = segloss.pseudo_label(logits, height, width, SURE)
    return {"loss": loss, "logits": gradient, "pseudo": pseudo, "confidence": confidence, "count": count}


def exact_segloss(inputs: Inputs) -> Outputs:
    """The definition in float64."""
    height, width = inputs.constants["labels"].shape[1:]
    found = segloss_forms.pseudo_label(inputs.leaves["logits"].detach().double(), height, width, SURE)
    labels = dict(zip(("pseudo", "confidence", "count"), (value.double() for value in found), strict=True))
    return {**segloss_bench.exact(inputs), **labels}


def _align(dtype: torch.dtype, *sizes: tuple[int, int, bool]) -> tuple[Case, ...]:
    return tuple(
        align_bench.make_case(
            f"{dtype} B={batch} crop={crop}" + (" +head" if head else ""),
            align_bench.Shape.of_crop(batch, crop, head),
            dtype,
            batch=batch,
            crop=crop,
        )
        for batch, crop, head in sizes
    )


def _contrast(dtype: torch.dtype, *sizes: int) -> tuple[Case, ...]:
    cases = (contrast_bench.make_case(n, contrast_bench.WIDTH, dtype) for n in sizes)
    return tuple(replace(case, name=f"{dtype} {case.name}") for case in cases)


def _dwconv() -> tuple[Case, ...]:
    cases = []
    for batch, crop in ((2, 512), (2, 1024)):
        for branches, maps in ((0, dwconv_bench.STAGES), (len(dwconv_bench.DILATIONS), dwconv_bench.HEAD)):
            for size, channels in maps:
                side = size * crop // 512
                case = dwconv_bench.make_case(batch, side, side, channels, BF16, branches)
                cases.append(replace(case, name=f"{'dilated' if branches else 'gelu'} {case.name}"))
    return tuple(cases)


def _segloss(*sizes: tuple[int, int, int]) -> tuple[Case, ...]:
    step = segloss_bench.STRIDE
    cases = (
        segloss_bench.make_case((batch, crop // step, crop // step, classes), (crop, crop), BF16)
        for batch, crop, classes in sizes
    )
    return tuple(replace(case, exact=exact_segloss) for case in cases)


def tunables() -> dict[str, Tunable]:
    """The ops, by name; a group's first case is the one that a quick run takes."""
    return {
        "align": Tunable(
            run_align,
            (
                Group(("half",), _align(BF16, (2, 1024, True), (2, 512, False), (8, 1024, False))),
                Group(("float32",), _align(FP32, (2, 1024, False), (2, 512, False))),
            ),
        ),
        "contrast": Tunable(
            run_contrast,
            (
                Group(("bfloat16",), _contrast(BF16, 8192, 2048, 16384)),
                Group(("float32",), _contrast(FP32, 4096, 8192)),
            ),
        ),
        "dwconv": Tunable(run_dwconv, (Group(("maps",), _dwconv()),), place_dwconv),
        "segloss": Tunable(
            run_segloss,
            (
                Group(("32", "sums"), _segloss((2, 1024, 19), (2, 512, 19), (8, 1024, 19))),
                Group(("256",), _segloss((2, 512, 150))),
                Group(("16",), _segloss((2, 512, 16))),
                Group(("64",), _segloss((2, 512, 40))),
                Group(("128",), _segloss((2, 512, 65))),
            ),
        ),
    }


def meta_inputs(shapes: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]) -> Inputs:
    """Inputs without memory; see shapes_of."""
    empty = partial(torch.empty, device="meta")
    leaves, constants = (
        {name: empty(shape, dtype=dtype) for name, (shape, dtype) in shapes[kind].items()} for kind in shapes
    )
    return Inputs(leaves, constants)


def shapes_of(inputs: Inputs) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Shape and dtype of each tensor, which another process can take."""
    kinds = {"leaves": inputs.leaves, "constants": inputs.constants}
    return {kind: {name: (tuple(t.shape), t.dtype) for name, t in found.items()} for kind, found in kinds.items()}
