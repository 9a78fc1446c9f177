"""Align's Triton kernels in Triton's interpreter, float32, with poisoned buffers, against the definition in float64."""

import json
import os
import subprocess
import sys

from tests.kernels.align_interpreter import CASES

BOUND = 1e-5
LAUNCHES = 12
"""The most launches of a grouped forward and backward."""


def test_kernels_equal_the_definition(seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.align_interpreter", str(seed)],
        env={**os.environ, "TRITON_INTERPRET": "1", "SSR_FAST_KERNELS": ""},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    found = {case["name"]: case for case in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(CASES)
    for name, case in found.items():
        for what, error in case["errors"].items():
            assert error < BOUND, f"{name}: {what} is off by {error}"
    assert found["five points"]["launches"] == LAUNCHES
    assert max(case["launches"] for case in found.values()) <= LAUNCHES
