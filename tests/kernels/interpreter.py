"""Runs a program of Triton's interpreter: TRITON_INTERPRET must be set before triton is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

TIMEOUT = 850
"""Seconds; the tests that wait for it have 900."""


def interpret(program: str, seed: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `python -m program seed name...` prints of each case, an object a line, by name."""
    done = subprocess.run(
        [sys.executable, "-m", program, str(seed), *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "SSR_FAST_KERNELS": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    found = {case["name"]: case for case in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(names)
    return found
