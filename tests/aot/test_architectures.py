"""A tuned section is compiled for its own architecture, and is held to the same rules as the default one."""

import pytest
import torch

from ssr_kernels import tables
from tests.aot.test_contrast import PRODUCTS, REGISTERS, of_kernel
from tests.aot.triton_compile import problems, recorded


@pytest.fixture
def section(monkeypatch):
    """Gives contrast's row_sums blocks of its own on sm_90."""

    def give(**blocks: int) -> None:
        content = {**tables.read("contrast"), "sm_90": {"bfloat16": {"row_sums": blocks}}}
        monkeypatch.setattr(tables, "read", lambda op: content)
        tables.table.cache_clear()

    yield give
    tables.table.cache_clear()


def row_sums():
    return of_kernel("row_sums", torch.bfloat16, (256,))


def test_each_architecture_is_compiled_with_its_own_blocks(section):
    section(num_stages=2)
    default, ampere, hopper = (recorded(row_sums, name)[0] for name in ("default", "sm_80", "sm_90"))
    assert ampere == default != hopper and hopper.options["num_stages"] == 2


def test_a_section_may_not_spill(section):
    section(BN=64)
    found = problems(row_sums, (80, 90), REGISTERS, PRODUCTS)
    assert len(found) == 1 and found[0].startswith("row_sums on sm_90 spills")


def test_a_section_has_no_budget_of_registers_but_the_default_has(section):
    section(num_stages=2)
    none = {"row_sums": (0, 0, 0)}
    assert problems(row_sums, (90,), none, PRODUCTS) == []
    section()
    [found] = problems(row_sums, (90,), none, PRODUCTS)
    assert "registers, more than 0" in found
