"""dwconv's Triton kernels in Triton's interpreter, float32, poisoned buffers, against float64; layouts and launches."""

import json
import os
import subprocess
import sys
from math import ceil

import pytest
import torch

from ssr_kernels.dwconv import backends, triton
from tests.kernels.dwconv_interpreter import CASES

BOUND = 1e-5
NAMES = list(CASES)
SHARES = 2
"""Processes, one after another, so that none takes long."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_equal_the_definition(share, seed):
    names = NAMES[share::SHARES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.dwconv_interpreter", str(seed), *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "SSR_FAST_KERNELS": ""},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    found = {case["name"]: case for case in map(json.loads, done.stdout.splitlines())}
    assert list(found) == names
    for name, case in found.items():
        assert max(case["errors"]) < BOUND, f"{name}: {case['errors']}"
        assert case["equal"] in (True, None), f"{name}: a second run gave other numbers"


@pytest.mark.parametrize("kernel", [name for name in triton.configs() if name != "tap_sums"])
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
