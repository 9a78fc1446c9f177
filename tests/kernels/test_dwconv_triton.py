"""dwconv's Triton kernels in Triton's interpreter, float32, poisoned buffers, against float64; layouts and launches."""

import math
from math import ceil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssr_kernels.dwconv import backends, reference, triton
from tests.kernels.dwconv_interpreter import CASES
from tests.kernels.interpreter import interpret

BOUND = 1e-5
NAMES = list(CASES)
SHARES = 2
"""Processes, one after another, so that none takes long."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_equal_the_definition(share, seed):
    names = NAMES[share::SHARES]
    found = interpret("tests.kernels.dwconv_interpreter", seed, names)
    for name, case in found.items():
        assert max(case["errors"]) < BOUND, f"{name}: {case['errors']}"
        assert case["equal"] in (True, None), f"{name}: a second run gave other numbers"


@pytest.mark.parametrize("kernel", [name for name in triton.configs(torch.device("cpu")) if name != "tap_sums"])
@pytest.mark.parametrize(
    "shape", [(2, 128, 128, 256), (2, 16, 16, 2048), (8, 256, 256, 256), (1, 1, 1, 1), (3, 33, 47, 100), (1, 9, 300, 7)]
)
def test_a_layout_gives_every_pixel_and_channel_to_one_program(kernel, shape):
    batch, height, width, channels = shape
    halo = int(kernel == "gelu_backward")
    layout = triton.Layout.of(torch.empty(shape, device="meta"), kernel, halo)
    own = layout.blocks["TW"] - 2 * halo * layout.halo
    assert (layout.strips - 1) * own < width <= layout.strips * own
    assert layout.here == batch * layout.strips * ceil(height / layout.rows)
    assert layout.programs == layout.here * ceil(channels / layout.blocks["BC"])


def test_launches_and_the_maps_that_they_move(monkeypatch):
    """A fused forward and backward: five passes over maps; the dilated branches: their input once."""
    launches = []

    def launch(kernel, programs, **arguments):
        tensors = [t for value in arguments.values() for t in (value if isinstance(value, tuple) else (value,))]
        maps = [t for t in tensors if isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[1:3] == (64, 64)]
        launches.append((kernel.fn.__name__, len(maps)))

    monkeypatch.setattr(triton, "launch", launch)
    x = torch.empty(2, 64, 64, 512, device="meta", dtype=torch.bfloat16)
    weight, bias = x.new_empty(512, 1, 3, 3), x.new_empty(512)
    triton.gelu_forward(x, weight, bias)
    triton.gelu_backward(x, x, weight, bias, (True, True, True))
    assert launches == [("gelu_forward", 2), ("gelu_backward", 3), ("tap_sums", 0)]
    launches.clear()
    triton.dilated_forward(x, [weight] * 3, (6, 12, 18))
    triton.dilated_backward([x] * 3, x, [weight] * 3, (6, 12, 18), (True,) * 4)
    assert launches == [("dilated_forward", 4), ("dilated_dx", 4), ("dilated_dw", 4), ("tap_sums", 0)]


class Passes(TorchDispatchMode):
    """How many maps of a shape the dispatched operators read and write, views left out."""

    def __init__(self, shape):
        super().__init__()
        self.count, self.numbers = 0, math.prod(shape)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith("aten.detach"):
            leaves = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.count += sum(t.numel() == self.numbers for t in leaves)
        return result


def test_the_maps_that_pytorchs_operators_move():
    """Ours move 5 and 12, see above; inside an operator PyTorch may read a map again, which this does not see."""
    x = torch.randn(2, 8, 8, 64, requires_grad=True)
    weights, bias = [torch.randn(64, 1, 3, 3, requires_grad=True) for _ in range(3)], torch.randn(64).requires_grad_()
    grad = torch.randn_like(x)
    with Passes(x.shape) as gelu:
        torch.autograd.grad(reference.dwconv_gelu(x, weights[0], bias), (x, weights[0], bias), grad)
    with Passes(x.shape) as dilated:
        torch.autograd.grad(reference.dwconv_dilated(x, weights, (6, 12, 18)), (x, *weights), [grad] * 3)
    assert (gelu.count, dilated.count) == (10, 21)


def test_reasons_against_triton():
    x = torch.empty(1, 4, 4, 8)
    weight, bias = x.new_empty(8, 1, 3, 3), x.new_empty(8)
    found = " ".join(backends.triton_reasons((x.double(), weight.double(), bias.double())))
    assert "float64" in found
    assert "contiguous" in " ".join(backends.triton_reasons((x.transpose(1, 2)[:, :, ::2], weight, bias)))
    large = torch.empty(1, 1 << 11, 1 << 11, 512, device="meta")
    assert "2^31" in " ".join(backends.triton_reasons((large, weight, bias)))
    assert "at most 4 branches" in " ".join(backends.dilated_triton_reasons((x, *[weight] * 5)))
    assert "branches" not in " ".join(backends.dilated_triton_reasons((x, *[weight] * 4)))
