"""Run as a program under TRITON_INTERPRET=1: align's Triton kernels on the CPU against the definition in float64.

Prints one JSON object a case: the errors of loss and gradients and the number of launches.
"""

import json
import sys

import torch

from ssr_kernels.align import triton_call
from tests.kernels.align_cases import definition, grouped, relative, run

CASES = {
    "five points": ([(3, 5, 32), (3, 4, 24), (2, 2, 64), (2, 3, 48), (2, 5, 32)], (2, 4), 64, False, True),
    "production channels, masks": ([(3, 3, 160), (1, 3, 320)], (2, 2), 256, True, True),
    "direct only, masks, no bias": ([(3, 2, 32), (2, 3, 128)], (3, 4), 128, True, False),
    "odd channels and width, some biases": ([(9, 4, 20), (2, 2, 7), (1, 1, 3)], (2, 3), 100, True, None),
    "gram, no bias": ([(4, 8, 64)], (4, 4), 72, False, False),
    "one token": ([(3, 1, 16), (1, 1, 16)], (1, 1), 16, True, True),
}
"""Stages (h, w, C), the target's grid, D, whether there are masks, and biases (None: all but the first)."""


def poison() -> None:
    """Fill every buffer that an op allocates with NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def poisoned(*arguments, original=original, **how):
            buffer = original(*arguments, **how)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        setattr(owner, name, poisoned)


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    poison()
    launches = []
    launch = triton_call.Call.launch

    def counted(call: triton_call.Call, *arguments, **named) -> None:
        launches.append(1)
        launch(call, *arguments, **named)

    triton_call.Call.launch = counted
    for name, (shapes, coarse, width, masks, biased) in CASES.items():
        batch = 1 if len(shapes) > 3 or width == 256 else 2
        call = grouped(shapes, coarse, width, torch.float32, masks, batch)
        if not biased:
            call.biases = [None, *call.biases[1:]] if biased is None else [None] * len(shapes)
        launches.clear()
        loss, gradients = run(call, "triton")
        expected, wanted = definition(call)
        errors = {"loss": abs(loss.double() - expected).item() / abs(expected.item()), **relative(gradients, wanted)}
        print(json.dumps({"name": name, "launches": len(launches), "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
