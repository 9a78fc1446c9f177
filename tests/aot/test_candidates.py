"""What the tuner tries, compiled ahead of time for Hopper: no spill, no more shared memory than there is."""

import itertools
from functools import partial
from unittest.mock import patch

import pytest
import torch

from bench.tune.candidates import CANDIDATES
from bench.tune.search import trials_of, with_trial
from ssr_kernels import tables
from tests.aot import align_launches, contrast_launches, dwconv_launches, segloss_launches
from tests.aot.test_align import PRODUCTS as ALIGN_PRODUCTS
from tests.aot.test_contrast import PRODUCTS as CONTRAST_PRODUCTS
from tests.aot.triton_compile import Launch, problems

CLASSES = {"16": 16, "32": 19, "64": 40, "128": 65, "256": 150}
BF16, FP32 = torch.bfloat16, torch.float32
RECORDS = {
    ("align", "half"): [partial(align_launches.record, BF16)],
    ("align", "float32"): [partial(align_launches.record, FP32)],
    ("contrast", "bfloat16"): [partial(contrast_launches.record, BF16)],
    ("contrast", "float32"): [partial(contrast_launches.record, FP32)],
    ("dwconv", "maps"): [partial(dwconv_launches.record, dtype) for dtype in (BF16, FP32)],
    ("segloss", "sums"): [partial(segloss_launches.record, BF16, 19)],
    **{
        ("segloss", row): [partial(segloss_launches.record, dtype, classes) for dtype in (BF16, FP32)]
        for row, classes in CLASSES.items()
    },
}
"""What launches the kernels of a row; every dtype that shares it."""


def trials(op: str, row: str) -> dict:
    return trials_of(tables.table(op, "default"), {row: CANDIDATES[op][row]})


ALL = [
    (op, row, number)
    for op, row in RECORDS
    for number in range(1, max(len(found) for found in trials(op, row).values()))
]


def changed(op: str, row: str, number: int) -> list[Launch]:
    """The launches of candidate `number` of every kernel of a row that has so many, each once."""
    default = tables.table(op, "default")
    table = with_trial(default, trials(op, row), number)
    before = list(itertools.chain(*(record() for record in RECORDS[op, row])))
    with patch.object(tables, "table", lambda name, architecture: table):
        after = list(itertools.chain(*(record() for record in RECORDS[op, row])))
    return list({str(launch): launch for launch in after if launch not in before}.values())


def test_every_row_has_candidates():
    assert {(op, row) for op, rows in CANDIDATES.items() for row in rows} == set(RECORDS)
    for op, row in RECORDS:
        table = tables.table(op, "default")
        content = {"default": table, "sm_90": {}}
        for number in range(1, 12):
            content["sm_90"] = {row: with_trial(table, trials(op, row), number)[row]}
            assert tables.problem(content) == ""


def test_every_kernel_has_candidates_and_none_is_the_default():
    for op, row in RECORDS:
        table = tables.table(op, "default")
        assert CANDIDATES[op][row].keys() == table[row].keys()
        for knob, tried in trials(op, row).items():
            found = CANDIDATES[op][row][knob.kernel]
            assert len(tried) == 1 + len(found if knob.place is None else found[knob.place]), f"{knob}: one twice"
            assert 4 <= len(tried) - 1 <= 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("op", "row", "number"), ALL)
def test_candidates_do_not_spill_on_hopper(op, row, number):
    products = {"align": ALIGN_PRODUCTS, "contrast": CONTRAST_PRODUCTS}.get(op, ())
    assert not problems(partial(changed, op, row, number), (90,), None, products)
