"""Run as a program under TRITON_INTERPRET=1: the Triton kernels of segloss on the CPU against the definition.

Prints one JSON object a case: the errors of loss, gradient and pseudo-labels, whether a second run was bitwise equal
(None: there was none; it is under torch.use_deterministic_algorithms), and the launches of loss and gradient and of
pseudo-labels.
"""

import json
import sys
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from ssr_kernels.segloss import pseudo_label, triton
from tests.kernels.segloss_cases import KINDS, Call, definition, errors, label_errors, make, run


@dataclass
class Case:
    """What segloss_cases.make takes, and how the kernels run."""

    shape: tuple[int, ...]
    size: tuple[int, int]
    kind: str = "mixed"
    labels: torch.dtype = torch.uint8
    ignore_index: int = 255
    production: bool = False
    """The blocks of configs.json; otherwise larger ones, of which the interpreter runs fewer."""
    twice: bool = False


CASES = {
    "4x": Case((2, 2, 3, 19), (8, 12), twice=True),
    "odd": Case((1, 3, 3, 7), (11, 8)),
    "odd, more columns than a block": Case((1, 2, 37, 3), (3, 75)),
    "same size": Case((2, 4, 5, 3), (4, 5)),
    "3x": Case((1, 3, 4, 6), (9, 12)),
    "1x1 logits": Case((2, 1, 1, 3), (4, 5)),
    "1x1 labels": Case((2, 4, 4, 3), (1, 1)),
    "smaller labels": Case((1, 6, 7, 3), (3, 5)),
    "fewer rows, more columns": Case((1, 9, 3, 4), (3, 10)),
    "1 class": Case((1, 2, 3, 1), (4, 5)),
    "2 classes": Case((1, 2, 3, 2), (7, 9)),
    "2 equal classes": Case((1, 2, 3, 2), (7, 9), "equal logits"),
    "33 classes": Case((1, 2, 3, 33), (5, 6)),
    "150 classes": Case((1, 2, 3, 150), (8, 12)),
    "255 classes": Case((1, 2, 2, 255), (3, 4), "wild labels", torch.int64),
    "production blocks, 19": Case((1, 2, 3, 19), (5, 9), production=True, twice=True),
    "production blocks, 150": Case((1, 2, 3, 150), (4, 6), production=True),
    "int32 labels": Case((1, 2, 3, 5), (7, 9), labels=torch.int32),
    "int64 labels": Case((1, 2, 3, 5), (7, 9), labels=torch.int64),
    "int16 labels": Case((1, 2, 3, 5), (7, 9), labels=torch.int16),
    "ignore a class": Case((1, 2, 3, 5), (7, 9), ignore_index=3),
    "ignore -100": Case((1, 2, 3, 5), (7, 9), "wild labels", torch.int64, ignore_index=-100),
    "wild uint8": Case((1, 2, 3, 5), (7, 9), "wild labels"),
    **{kind: Case((1, 2, 3, 9), (7, 10), kind, torch.int64) for kind in KINDS},
    "no image": Case((0, 3, 4, 9), (10, 13)),
}

THRESHOLD = 0.5
"""Reached exactly by 2 equal classes."""

BLOCKS = {
    "pixel_losses": {"KL": 16, "BP": 32},
    "loss_sum": {"BLOCK": 16},
    "logit_gradients": {"KL": 16, "BP": 32},
    "surest_classes": {"KL": 16, "BP": 32},
    "count_sum": {"BLOCK": 16},
}


def poison() -> None:
    """Fill every buffer that an op allocates with NaN, or with a number that no result is."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def poisoned(*arguments, original=original, **how):
            buffer = original(*arguments, **how)
            return buffer.fill_(float("nan") if buffer.is_floating_point() else 113)

        setattr(owner, name, poisoned)


def results(call: Call, case: Case, launches: list[int]) -> tuple[Tensor, ...]:
    """Loss, gradient, pseudo-labels, confidence, count; adds the launches of the first two and of the others."""
    count = 0
    launch = triton.Call.launch

    def counted(self: triton.Call, kernel, programs: int, **named) -> None:
        nonlocal count
        count += 1
        launch(self, kernel, programs, **named)

    with patch.object(triton.Call, "launch", counted):
        loss, gradient = run(call, "triton")
        launches.append(count)
        labels = pseudo_label(call.logits, case.size, THRESHOLD, backend="triton")
        launches.append(count - launches[-1])
    return loss, gradient, *labels


def measure(case: Case) -> dict[str, object]:
    """Run a case and compare."""
    call = make(case.kind, case.shape, case.size, labels_dtype=case.labels)
    call.ignore_index = case.ignore_index
    launches: list[int] = []
    found = results(call, case, launches)
    torch.use_deterministic_algorithms(True)
    again = results(call, case, []) if case.twice else ()
    torch.use_deterministic_algorithms(False)
    wrong = errors(found[:2], definition(call)) if call.labels.numel() else {"loss": abs(found[0].item())}
    if call.labels.numel():
        wrong |= label_errors(call.logits, case.size, THRESHOLD, "triton")
    return {"errors": wrong, "equal": all(map(torch.equal, found, again)) if case.twice else None, "launches": launches}


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    poison()
    for name in sys.argv[2:] or list(CASES):
        with patch.object(
            triton, "configs", triton.configs if CASES[name].production else lambda classes, device: BLOCKS
        ):
            print(json.dumps({"name": name, **measure(CASES[name])}), flush=True)


if __name__ == "__main__":
    main()
