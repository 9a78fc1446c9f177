"""Run as a program under TRITON_INTERPRET=1: contrast_loss's Triton kernels on the CPU against the definition.

Prints one JSON object a case: the errors of loss and gradient, whether a second run was bitwise equal (None: there was
none), and forward and backward the launches and the splits of the columns.
"""

import json
import sys
from dataclasses import dataclass
from unittest.mock import patch

import torch

from ssr_kernels.contrast import contrast_loss, triton
from tests.kernels.contrast_cases import KINDS, definition, errors, make


@dataclass
class Case:
    """What contrast_cases.make takes, and how the kernels run."""

    kind: str
    n: int
    width: int
    temperature: float = 0.1
    production: bool = False
    """The blocks of configs.json; otherwise larger ones, of which the interpreter runs fewer."""
    split: bool = True
    """False: one split of the columns, whatever n."""
    twice: bool = False


CASES = {
    "1 row": Case("mixed", 1, 8),
    "2 rows": Case("mixed", 2, 16, split=False),
    "63 rows": Case("mixed", 63, 64, twice=True),
    "257 rows": Case("mixed", 257, 200),
    "150 rows, one split": Case("mixed", 150, 24, split=False),
    "300 rows": Case("mixed", 300, 256),
    "70 rows": Case("mixed", 70, 3, split=False),
    "production blocks": Case("mixed", 70, 40, production=True, twice=True),
    "production blocks, one split": Case("any norm", 70, 72, production=True, split=False),
    **{kind: Case(kind, 60, 20, 0.05) for kind in KINDS},
    **{f"{kind}, temperature 1": Case(kind, 60, 20, 1.0, split=False) for kind in KINDS[-4:]},
    "tiny temperature": Case("mixed", 70, 16, 0.01),
    "nan": Case("nan", 20, 8),
    "no rows": Case("mixed", 0, 8),
    "empty rows": Case("mixed", 40, 0),
}

BLOCKS = {
    "inverse_norms": {"BM": 128},
    "row_sums": {"BM": 128, "BN": 128, "BK": 256},
    "loss_sum": {"BLOCK": 128},
    "row_gradients": {"BM": 64, "BN": 128, "BK": 256},
    "gradient_sums": {"BM": 128},
}


def poison() -> None:
    """Fill every buffer that an op allocates with NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def poisoned(*arguments, original=original, **how):
            buffer = original(*arguments, **how)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        setattr(owner, name, poisoned)


def measure(case: Case) -> dict[str, object]:
    """Run a case and compare."""
    call = make(case.kind, case.n, case.width, case.temperature)
    results, launches, splits = [], [], []
    launch, of = triton.Call.launch, triton.Layout.of

    def counted(self: triton.Call, kernel, *arguments, **named) -> None:
        launches.append(kernel.fn.__name__)
        launch(self, kernel, *arguments, **named)

    def layout(n: int, rows: int, columns: int) -> triton.Layout:
        found = of(n, rows, columns)
        found = found if case.split else triton.Layout(found.blocks, 1, found.splits * found.span)
        splits.append(found.splits)
        return found

    with patch.object(triton.Call, "launch", counted), patch.object(triton.Layout, "of", layout):
        for _ in range(2 if case.twice else 1):
            launches.clear(), splits.clear()
            loss = contrast_loss(*call.arguments(), backend="triton")
            forward = len(launches)
            results.append((loss.detach(), *torch.autograd.grad(loss, call.embedding)))
    return {
        "errors": errors(call, results[0], definition(call)),
        "equal": all(map(torch.equal, *results)) if case.twice else None,
        "launches": (forward, len(launches) - forward),
        "splits": splits,
    }


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    poison()
    wanted = sys.argv[2:] or list(CASES)
    for name in wanted:
        with patch.object(
            triton, "configs", triton.configs if CASES[name].production else lambda dtype, device: BLOCKS
        ):
            print(json.dumps({"name": name, **measure(CASES[name])}), flush=True)


if __name__ == "__main__":
    main()
