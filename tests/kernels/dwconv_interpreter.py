"""Run as a program under TRITON_INTERPRET=1: dwconv's Triton kernels on the CPU against the definition in float64.

Prints one JSON object a case: the error of each result, whether a second run was bitwise equal (None: there was none).
"""

import json
import sys
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from ssr_kernels.dwconv import op, reference, triton
from tests.kernels.contrast_interpreter import poison


@dataclass
class Case:
    """A map, and how the kernels run.

    Attributes:
        shape: [B, H, W, C].
        dilations: of the branches; none: the convolution with the GELU.
        blocks: TW and BC of every kernel; None: the shipped ones.
        rows: of a program.
        wanted: which gradients; None: all.
    """

    shape: tuple[int, int, int, int]
    dilations: tuple[int, ...] = ()
    blocks: tuple[int, int] | None = (16, 8)
    rows: int = 8
    wanted: tuple[bool, ...] | None = None
    twice: bool = False


CASES = {
    "shipped blocks": Case((1, 5, 16, 32), blocks=None),
    "shipped blocks, strips with halos": Case((1, 3, 70, 20), blocks=None),
    "one strip": Case((2, 5, 16, 5), twice=True),
    "two strips, the last of one column": Case((1, 4, 15, 8), blocks=(16, 8)),
    "strips": Case((2, 5, 37, 9), twice=True),
    "one row a program": Case((1, 6, 20, 3), rows=1),
    "1x1": Case((3, 1, 1, 4)),
    "one row": Case((1, 1, 30, 8)),
    "one column": Case((1, 6, 1, 8), rows=4),
    "no images": Case((0, 4, 4, 8)),
    "x alone": Case((1, 5, 6, 4), wanted=(True, False, False)),
    "weight alone": Case((1, 5, 20, 4), wanted=(False, True, False)),
    "bias alone": Case((1, 5, 6, 4), wanted=(False, False, True)),
    "many partial sums": Case((3, 7, 3, 4), rows=1),
    "dilated": Case((1, 4, 17, 5), (1, 6, 3), twice=True),
    "dilated, shipped blocks": Case((1, 2, 33, 17), (6, 12, 18), blocks=None),
    "dilation beyond the map": Case((2, 3, 2, 5), (4, 18)),
    "dilated, rows": Case((1, 4, 18, 9), (2,), rows=3),
    "dilated 1x1": Case((1, 1, 1, 3), (1, 12)),
    "dilated, x alone": Case((1, 4, 5, 4), (2, 3), wanted=(True, False, False)),
    "dilated, one weight alone": Case((1, 4, 5, 4), (2, 3), wanted=(False, False, True)),
    "dilated, no images": Case((0, 4, 4, 8), (1, 2)),
}


def run(case: Case, dtype: torch.dtype, backend: str, seed: int) -> list[Tensor]:
    """Results and gradients; `backend` "definition" is the plain PyTorch one."""
    torch.manual_seed(seed)
    channels, filters = case.shape[3], max(1, len(case.dilations))
    tensors = [torch.randn(case.shape), *(torch.randn(channels, 1, 3, 3) for _ in range(filters))]
    tensors += [] if case.dilations else [torch.randn(channels)]
    wanted = case.wanted or (True,) * len(tensors)
    x, *others = [t.to(dtype).requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True)]
    how = {} if backend == "definition" else {"backend": backend}
    module = reference if backend == "definition" else op
    outs = module.dwconv_dilated(x, others, case.dilations, **how) if case.dilations else None
    outs = outs if outs is not None else [module.dwconv_gelu(x, *others, **how)]
    grads = [torch.randn(case.shape).to(dtype) for _ in outs]
    leaves = [t for t in (x, *others) if t.requires_grad]
    used = [index for index, out in enumerate(outs) if out.requires_grad]
    gradients = torch.autograd.grad([outs[i] for i in used], leaves, [grads[i] for i in used])
    return [*(out.detach() for out in outs), *gradients]


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error of the whole; NaN counts as infinite."""
    difference = (found.double() - exact).norm() / exact.norm().clamp(min=1e-12)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def measure(case: Case, seed: int) -> dict[str, object]:
    """Run a case and compare."""
    shipped = triton.configs(torch.device("cpu"))
    blocks = case.blocks and {"TW": case.blocks[0], "BC": case.blocks[1], "num_warps": 4}
    small = {name: [{**blocks, **({"STAGES": 2} if "gelu" in name else {})}] for name in shipped} if blocks else shipped
    small = {**small, "tap_sums": {"BS": 16, "BC": 8, "num_warps": 4}} if blocks else shipped
    with patch.object(triton, "configs", lambda device: small), patch.object(triton, "ROWS", (case.rows,)):
        results = [run(case, torch.float32, "triton", seed) for _ in range(2 if case.twice else 1)]
    exact = run(case, torch.float64, "definition", seed)
    return {
        "errors": [error(found, wanted) for found, wanted in zip(results[0], exact, strict=True)],
        "equal": all(map(torch.equal, *results)) if case.twice else None,
    }


def main() -> None:
    seed = int(sys.argv[1])
    poison()
    for name in sys.argv[2:] or list(CASES):
        print(json.dumps({"name": name, **measure(CASES[name], seed)}), flush=True)


if __name__ == "__main__":
    main()
