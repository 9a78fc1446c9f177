"""The tables of block sizes: what is shipped fits the kernels, what is malformed is told, one for each architecture."""

import copy
import json
from types import ModuleType

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ssr_kernels import tables
from ssr_kernels.align import triton_call, triton_direct, triton_gram, triton_sums
from ssr_kernels.contrast import triton as contrast
from ssr_kernels.contrast import triton_kernels as contrast_kernels
from ssr_kernels.dwconv import triton as dwconv
from ssr_kernels.dwconv import triton_common, triton_dilated, triton_gelu
from ssr_kernels.segloss import triton as segloss
from ssr_kernels.segloss import triton_kernels as segloss_kernels

OPS: dict[str, tuple[ModuleType, ...]] = {
    "align": (triton_direct, triton_gram, triton_sums),
    "contrast": (contrast_kernels,),
    "dwconv": (triton_gelu, triton_dilated, triton_common),
    "segloss": (segloss_kernels,),
}
"""The modules with each op's kernels."""

SMALL = {
    "default": {
        "a": {"k": {"BM": 16, "num_warps": 4}, "l": [{"TW": 8, "STAGES": 3}]},
        "b": {"k": {"BM": 32, "num_warps": 4}},
    },
    "sm_90": {"a": {"k": {"BM": 64}}},
    "provenance": {"sm_90": {"device": "a GPU"}},
}


@pytest.fixture
def files(monkeypatch, tmp_path):
    """A folder in which each test's op has its file."""
    monkeypatch.setattr(tables, "path", lambda op: tmp_path / f"{op}.json")
    tables.table.cache_clear()
    yield lambda content: (tmp_path / "op.json").write_text(json.dumps(content))
    tables.table.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_what_is_shipped_fits_the_kernels(op):
    content = tables.read(op)
    assert tables.problem(content) == ""
    kernels = {name: value for module in OPS[op] for name, value in vars(module).items() if hasattr(value, "arg_names")}
    for section in content.keys() - {"provenance"}:
        for row, entries in tables.table(op, section).items():
            for kernel, found in entries.items():
                constants = {parameter.name for parameter in kernels[kernel].params if parameter.is_constexpr}
                for blocks in found if isinstance(found, list) else [found]:
                    strange = blocks.keys() - {"num_warps", "num_stages"} - constants
                    assert not strange, f"{op}, {section}, {row}, {kernel}: {strange}"
    assert content.keys() - {"default", "provenance"} == content.get("provenance", {}).keys()


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("sm_90", "c"), {}, "sm_90 has a row 'c', and default none; its rows are a, b"),
        (("sm_90", "a", "kk"), {"BM": 16}, "sm_90, a: 'kk' is no kernel; the kernels are k, l"),
        (("sm_90", "a", "k", "BN"), 16, "sm_90, a, k has an option 'BN'; its options are BM, num_warps"),
        (("sm_90", "a", "k", "BM"), 48, "sm_90, a, k: BM must be a power of two (it is 48)"),
        (("sm_90", "a", "k", "BM"), 0, "BM must be a whole number from 1 up (it is 0)"),
        (("sm_90", "a", "k", "BM"), 16.0, "BM must be a whole number from 1 up (it is 16.0)"),
        (("sm_90", "a", "k", "num_warps"), True, "num_warps must be a whole number from 1 up (it is True)"),
        (("sm_90", "a", "k"), [{"BM": 16}], "sm_90, a, k must be one set of blocks"),
        (("sm_90", "a", "l"), {"TW": 8}, "sm_90, a, l must be a list of blocks"),
        (("sm_90", "a", "l"), [], "sm_90, a, l must be a list of blocks"),
        (("sm_90", "a", "l"), [{"TW": 8}], "sm_90, a, l lacks the option 'STAGES'"),
        (("default",), None, 'there is no section "default"'),
    ],
)
def test_a_malformed_table_gives_one_sentence(files, where, value, words):
    content = copy.deepcopy(SMALL)
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    files(content)
    with pytest.raises(ValueError) as error:
        tables.table("op", "sm_90")
    assert words in str(error.value) and "op.json" in str(error.value) and "\n" not in str(error.value)


def test_stages_may_be_any_number(files):
    files({"default": {"a": {"k": {"num_stages": 3, "STAGES": 5}}}})
    assert tables.table("op", "default")["a"]["k"] == {"num_stages": 3, "STAGES": 5}


def test_an_architecture_changes_only_what_it_says(files):
    files(SMALL)
    default, tuned = tables.table("op", "default"), tables.table("op", "sm_90")
    assert default == SMALL["default"] == tables.table("op", "sm_80")
    assert tuned == {**default, "a": {**default["a"], "k": {"BM": 64, "num_warps": 4}}}
    assert tables.difference(default, tuned) == {"a": {"k": {"BM": 64}}}


def test_difference_and_merge_are_inverse():
    base = {"a": {"k": {"x": 1, "y": 2}, "l": [{"TW": 8}, {"TW": 16}]}, "b": {"m": {"x": 1}}}
    changed = {"a": {"k": {"x": 1, "y": 4}, "l": [{"TW": 8}, {"TW": 32}]}, "b": {"m": {"x": 1}}}
    before = copy.deepcopy(base)
    changes = tables.difference(base, changed)
    assert changes == {"a": {"k": {"y": 4}, "l": [{"TW": 8}, {"TW": 32}]}}
    assert tables.merge(base, changes) == changed and base == before
    assert tables.difference(base, base) == {}


def test_the_section_is_that_of_the_tensors_device(monkeypatch):
    capabilities = {0: (9, 0), 1: (12, 0)}
    asked = []

    def capability(device):
        asked.append(device)
        return capabilities[device.index]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    tables.architecture.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [tables.architecture(d) for d in (first, second, first, first)] == ["sm_90", "sm_120", "sm_90", "sm_90"]
    assert asked == [first, second]  # once each
    assert tables.architecture(torch.device("cpu")) == tables.architecture(torch.device("meta")) == "default"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tables.architecture.cache_clear()
    assert tables.architecture(first) == "default"
    tables.architecture.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_each_op_reads_the_section_of_its_architecture(op, monkeypatch):
    """A section that changes every kernel is the one that the op finds, and not on other architectures."""
    content = tables.read(op)

    def doubled(found):
        return [doubled(blocks) for blocks in found] if isinstance(found, list) else {**found, "num_warps": 32}

    section = {
        row: {name: doubled(found) for name, found in kernels.items()} for row, kernels in content["default"].items()
    }
    monkeypatch.setattr(tables, "read", lambda name: {"default": content["default"], "sm_90": section})
    device = torch.device("cpu")
    find = {
        "align": lambda: triton_call.configs(torch.float16, device) | triton_call.configs(torch.float32, device),
        "contrast": lambda: contrast.configs(torch.bfloat16, device) | contrast.configs(torch.float32, device),
        "dwconv": lambda: dwconv.configs(device),
        "segloss": lambda: segloss.configs(32, device),
    }[op]
    for architecture, all_changed in (("sm_90", True), ("sm_80", False)):
        monkeypatch.setattr(tables, "architecture", lambda device, name=architecture: name)
        tables.table.cache_clear()
        flat = [b for found in find().values() for b in (found if isinstance(found, list) else [found])]
        assert all(blocks["num_warps"] == 32 for blocks in flat) == all_changed
    tables.table.cache_clear()


def test_reading_a_table_is_nothing_to_a_tracer(monkeypatch):
    """No operator, so no kernel and no sync: reading is the same under capture."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tables.architecture.cache_clear()

    def function(x):
        dwconv.configs(torch.device("cuda", 0))
        return x + 1

    names = [str(node.target) for node in make_fx(function)(torch.ones(2)).graph.nodes if node.op == "call_function"]
    tables.architecture.cache_clear()
    assert names == ["aten.add.Tensor"]
