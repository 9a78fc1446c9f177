"""The choice of a backend: automatic, by argument, by environment variable, and every refusal with its reasons."""

import pytest
import torch

from ssr_kernels import align, dwconv, segloss
from ssr_kernels.registry import BACKENDS, Backend, BackendError, Op, no_reasons

OPS = (*align.OPS, *dwconv.OPS, *segloss.OPS)


def make_op() -> Op:
    """An op whose best backend runs on integer tensors only."""

    def integers_only(tensors):
        return [f"fast runs on integers only (tensor {i})" for i, t in enumerate(tensors) if t.is_floating_point()]

    fast = Backend("cuda", lambda x: "fast", integers_only)
    return Op("fabricated", (fast, Backend("reference", lambda x: "reference", no_reasons)))


def test_auto_takes_the_first_backend_without_a_reason(monkeypatch):
    monkeypatch.delenv("SSR_FAST_KERNELS", raising=False)
    assert make_op().choose(None, (torch.zeros(1, dtype=torch.long),)).name == "cuda"
    assert make_op().choose(None, (torch.zeros(1),)).name == "reference"
    assert make_op().choose("auto", (torch.zeros(1),)).name == "reference"


def test_a_named_backend_that_cannot_run_raises_with_every_reason():
    with pytest.raises(BackendError) as error:
        make_op().choose("cuda", (torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.zeros(1)))
    assert "backend=cuda" in str(error.value)
    assert "(tensor 0)" in str(error.value) and "(tensor 2)" in str(error.value)
    assert "(tensor 1)" not in str(error.value)


def test_auto_without_any_backend_raises_with_every_reason():
    op = Op("lonely", (make_op().backends[0],))
    with pytest.raises(BackendError, match="integers only"):
        op.choose(None, (torch.zeros(1),))


def test_the_environment_variable_chooses_and_the_argument_wins(monkeypatch):
    op, integers = make_op(), (torch.zeros(1, dtype=torch.long),)
    monkeypatch.setenv("SSR_FAST_KERNELS", "reference")
    assert op.choose(None, integers).name == "reference"
    assert op.choose("cuda", integers).name == "cuda"
    assert op.choose("auto", integers).name == "cuda"
    monkeypatch.setenv("SSR_FAST_KERNELS", "triton")
    with pytest.raises(BackendError, match="SSR_FAST_KERNELS=triton .*fabricated has no triton backend yet"):
        op.choose(None, integers)
    monkeypatch.setenv("SSR_FAST_KERNELS", "")
    assert op.choose(None, integers).name == "cuda"


def test_an_unknown_name_is_refused_with_its_origin(monkeypatch):
    with pytest.raises(ValueError, match="backend=cuda12: expected auto, cuda, triton, reference, cpp"):
        make_op().choose("cuda12", ())
    monkeypatch.setenv("SSR_FAST_KERNELS", "eager")
    with pytest.raises(ValueError, match="SSR_FAST_KERNELS=eager"):
        make_op().choose(None, ())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_a_reference_and_says_why_it_lacks_a_backend(op):
    assert op.reasons("reference") == []
    present = {backend.name for backend in op.backends}
    assert present <= set(BACKENDS)
    for name in set(BACKENDS) - present:
        assert op.reasons(name) == [f"{op.name} has no {name} backend yet in this version"]


def test_the_public_functions_pass_the_choice_on(monkeypatch):
    x, weight, bias = torch.randn(1, 2, 2, 3), torch.randn(3, 1, 3, 3), torch.randn(3)
    calls = {
        "align": lambda **how: align.align_loss(x, torch.randn(4, 3), None, torch.randn(1, 2, 2, 4), **how),
        "dwconv_gelu": lambda **how: dwconv.dwconv_gelu(x, weight, bias, **how),
        "dwconv_dilated": lambda **how: dwconv.dwconv_dilated(x, [weight], [2], **how),
        "segloss": lambda **how: segloss.segloss(x, torch.zeros(1, 4, 4, dtype=torch.uint8), **how),
        "pseudo_label": lambda **how: segloss.pseudo_label(x, (4, 4), 0.5, **how),
    }
    assert set(calls) == {op.name for op in OPS}
    for call in calls.values():
        call(backend="reference")
        with pytest.raises(ValueError, match="backend=none"):
            call(backend="none")
        monkeypatch.setenv("SSR_FAST_KERNELS", "none")
        with pytest.raises(ValueError, match="SSR_FAST_KERNELS=none"):
            call()
        monkeypatch.delenv("SSR_FAST_KERNELS")
