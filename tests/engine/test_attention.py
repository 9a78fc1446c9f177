"""xformers' attention in place of PyTorch's: refusals, and the same network on a stand-in of its signature."""

import copy
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ssr_fast.engine import attention
from ssr_fast.engine.attention import (
    apply_attention,
    check_attention,
    check_sam_attention,
    head_shapes,
    xformers_problem,
)
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.errors import UserError
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.mit import MIT, Attention, MixTransformer
from ssr_fast.models.noise import Noise
from ssr_fast.models.sam import SamConfig
from ssr_fast.train import main
from tests.faults.test_source_free_run import SCENES, SIZES
from tests.methods.support import make_batch, make_method, make_source_free

CPU = torch.device("cpu")
METHODS = {
    "supervised": lambda: make_method("supervised"),
    "reference": lambda: make_method("self_training", feature_distance=0.1),
    "injection": lambda: make_method("ssr", ssr=SsrConfig(regulariser="injection")),
    "source_free": lambda: make_source_free(),
}
# what xformers 0.0.35 raises (xformers/ops/fmha/dispatch.py)
NO_OPERATOR = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(1, 64, 1, 64) (torch.float32)
     p           : 0.0
`fa2F@2.5.7-pt` is not supported because:
    device=cpu (supported: {'cuda'})
    dtype=torch.float32 (supported: {torch.float16, torch.bfloat16})
`cutlassF-pt` is not supported because:
    device=cpu (supported: {'cuda'})"""
REASONS = (
    "fa2F@2.5.7-pt: device=cpu (supported: {'cuda'}), dtype=torch.float32 (supported: {torch.float16, torch.bfloat16})"
    "; cutlassF-pt: device=cpu (supported: {'cuda'})"
)


class StandIn:
    """xformers.ops.memory_efficient_attention of 0.0.35: its signature and layout, [B, M, H, K], in plain PyTorch."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert attn_bias is None and p == 0.0 and scale is None and op is None and output_dtype is None
        assert query.ndim == key.ndim == value.ndim == 4 and query.shape[::3] == key.shape[::3] == value.shape[::3]
        assert query.shape[2] == key.shape[2] == value.shape[2] and query.dtype == key.dtype == value.dtype
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        self.calls += 1
        scores = torch.einsum("bnhk,bmhk->bhnm", query.float() * query.shape[-1] ** -0.5, key.float())
        return torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), value.float()).to(query.dtype)

    def __deepcopy__(self, memo):
        return self  # like a function


def install(monkeypatch, attend, **library):
    for name in ("xformers", "xformers.ops", "xformers._cpp_lib"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["xformers.ops"].memory_efficient_attention = attend
    sys.modules["xformers._cpp_lib"].__dict__.update(library)


@pytest.fixture
def stand_in(monkeypatch):
    attend = StandIn()
    install(monkeypatch, attend)
    return attend


@pytest.fixture
def absent(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xformers" else find(name))


def refused(*_, **__):
    raise NotImplementedError(NO_OPERATOR)


def grads(method, batch):
    terms = method.losses(batch, 3)
    terms["loss"].backward()
    method.hand_over()
    named = ((name, p.grad) for name, p in method.named_parameters() if "copies" not in name)
    return terms["loss"].detach(), {name: grad for name, grad in named if grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_equal_sdpas(name, stand_in, monkeypatch):
    """To 1e-6: the loss, each gradient's elements, and all gradients' norm; every MiT of the step has changed over."""
    batch, results = make_batch(), []
    for choice in ("sdpa", "xformers"):
        method = METHODS[name]()
        apply_precision(method, "fp32")
        apply_attention(method, choice)
        attentions = [module for module in method.modules() if isinstance(module, Attention)]
        assert all((module.attend is stand_in) == (choice == "xformers") for module in attentions)
        calls, plain = stand_in.calls, []
        with monkeypatch.context() as patched:
            sdpa = F.scaled_dot_product_attention
            patched.setattr(F, "scaled_dot_product_attention", lambda *a, s=sdpa, p=plain: p.append(a) or s(*a))
            results.append(grads(method, batch))
        runs = len(attentions)
        assert stand_in.calls - calls == (runs if choice == "xformers" else 0)
        # the injection's own cross-attention is no MiT's, and stays
        assert len(plain) == (4 if name == "injection" else 0) + (runs if choice == "sdpa" else 0)
    (loss, one), (other_loss, other) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=0)
    assert one.keys() == other.keys() and len(one) > 50
    for parameter, grad in one.items():
        assert (grad - other[parameter]).abs().max() <= 1e-6, parameter
    whole, difference = torch.cat([g.flatten() for g in one.values()]), [g - other[n] for n, g in one.items()]
    assert torch.cat([d.flatten() for d in difference]).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("name", METHODS)
def test_in_bf16_the_copies_change_over_and_the_evaluated_networks_do_not(name, stand_in):
    method = METHODS[name]()
    apply_precision(method, "bf16")
    apply_attention(method, "xformers")
    for module in method.modules():
        if isinstance(module, Attention):
            assert (module.attend is stand_in) == (module.q.weight.dtype == torch.bfloat16)
    tried, runs = stand_in.calls, sum(isinstance(m, Attention) and m.attend is not None for m in method.modules())
    grads(method, make_batch())
    assert stand_in.calls - tried == runs > 0
    method.student(torch.zeros(1, 3, 32, 32))
    assert stand_in.calls - tried == runs


def test_recomputed_blocks_and_copies_keep_the_choice(stand_in):
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        backbone = MixTransformer(MIT["mit_tiny"], 0.0, Noise())
        for block in backbone.blocks():
            block.attn.attend = stand_in
        backbone = copy.deepcopy(backbone)
        backbone.recompute_blocks = again
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        calls = stand_in.calls
        sum(feature.square().sum() for feature in backbone(images)).backward()
        assert stand_in.calls - calls == (8 if again else 4)
        results.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_xformers_a_run_is_refused_before_it_writes_anything(tmp_path, absent):
    with pytest.raises(UserError) as refusal:
        main(["--run.attention=xformers", "--run.device=cpu", "--run.dir", str(tmp_path / "run")])
    assert str(refusal.value) == (
        "--run.attention xformers cannot be used: xformers is not installed, and it has no operator for a CPU: "
        "give --run.attention sdpa"
    )
    assert not (tmp_path / "run").exists()
    assert xformers_problem([(1, 64)], torch.float32, torch.device("cuda")) == "xformers is not installed"
    check_attention("sdpa", "mit_b5", "bf16", CPU)
    apply_attention(make_method("supervised"), "sdpa")


def test_xformers_own_reasons_are_handed_on_in_one_line(monkeypatch):
    install(monkeypatch, refused, _cpp_library_load_exception=None)
    with pytest.raises(UserError) as refusal:
        check_attention("xformers", "mit_b5", "fp32", CPU)
    assert str(refusal.value) == (
        "--run.attention xformers cannot be used: xformers has no operator for float32 heads of 64 on cpu: "
        f"{REASONS}: give --run.attention sdpa"
    )
    with pytest.raises(UserError, match="bfloat16 heads of 32 on cpu"):
        check_attention("xformers", "mit_b0", "bf16", CPU)
    with pytest.raises(UserError, match="float32 heads of 16 on cpu"):
        apply_attention(make_method("supervised"), "xformers")


def test_code_that_was_built_for_another_torch_is_named(monkeypatch):
    text = "xFormers can't load C++/CUDA extensions. xFormers was built for:\n  PyTorch 2.10.0\n  Please reinstall x"
    install(monkeypatch, refused, _cpp_library_load_exception=RuntimeError(text))
    problem = xformers_problem([(1, 64)], torch.float32, CPU)
    assert "on cpu: xFormers can't load C++/CUDA extensions. xFormers was built for: PyTorch 2.10.0 (its w" in problem
    assert REASONS in problem


@pytest.mark.parametrize("error", [RuntimeError("no kernel image\n is available"), ValueError("odd\nshape")])
def test_whatever_else_the_trial_raises_is_a_reason_too(error, monkeypatch):
    def broken(*_, **__):
        raise error

    install(monkeypatch, broken)
    assert " ".join(str(error).split()) in xformers_problem(head_shapes("mit_b5"), torch.float32, CPU)


def test_an_import_that_fails_is_a_reason(monkeypatch):
    install(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert xformers_problem([(1, 64)], torch.float32, CPU).startswith("xformers cannot be imported (ModuleNotFoundErr")


def test_forms_of_the_encoders_attention_that_cannot_run_here(monkeypatch, tmp_path):
    for form in ("low_rank", "mask"):
        check_sam_attention(SamConfig(encoder="small", attention=form), "fp32", CPU, True)
    install(monkeypatch, refused, _cpp_library_load_exception=None)
    with pytest.raises(UserError) as refusal:
        check_sam_attention(SamConfig(encoder="vit_h", attention="xformers"), "bf16", CPU, False)
    assert str(refusal.value) == (
        "--sam.attention xformers cannot be used: xformers has no operator for bfloat16 heads of 80 on cpu: "
        f"{REASONS}: give --sam.attention low_rank"
    )
    with pytest.raises(UserError, match="float32 heads of 32 on cpu"):
        options = ["--method.name=ssr", "--sam.encoder=small", "--sam.attention=xformers", "--run.device=cpu"]
        main([*options, *SIZES, *SCENES, "--run.dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

    def no_compiler(*_):
        raise RuntimeError("\nNo working C++ compiler found\nTraceback")

    monkeypatch.setattr(attention, "pick_form", lambda name: no_compiler)
    with pytest.raises(UserError) as refusal:
        check_sam_attention(SamConfig(encoder="small", attention="flex"), "fp32", CPU, False)
    assert str(refusal.value) == (
        "--sam.attention flex cannot be used: FlexAttention cannot be compiled for float32 heads of 32 on cpu "
        "(No working C++ compiler found): give --sam.attention low_rank"
    )
    with pytest.raises(UserError, match="for the CPU cannot place FlexAttention in a compiled block: give"):
        check_sam_attention(SamConfig(encoder="small", attention="flex"), "fp32", CPU, True)


@pytest.mark.slow
def test_flex_is_compiled_to_find_out():
    check_sam_attention(SamConfig(encoder="small", attention="flex"), "fp32", CPU, False)


def test_a_name_that_is_none_and_the_heads_of_the_backbones():
    assert RunConfig(attention="flash").problems("run") == [
        "--run.attention must be one of sdpa, xformers (it is flash)"
    ]
    assert head_shapes("mit_b5") == [(1, 64), (2, 64), (5, 64), (8, 64)]
    assert {size for _, size in head_shapes("mit_b0")} == {32} and {size for _, size in head_shapes("mit_tiny")} == {16}


def test_a_run_trains_with_it_and_ships_no_word_of_it(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    options = ["--method.name=supervised", *SIZES, *SCENES, "--run.device=cpu"]
    before, calls = torch.get_num_threads(), stand_in.calls
    torch.set_num_threads(1)
    try:
        assert main([*options, "--run.attention=xformers", "--run.dir", str(tmp_path / "one")]) == 0
        assert stand_in.calls - calls > 24  # 6 steps of 4 blocks, trials and evaluation besides
        assert main([*options, "--run.dir", str(tmp_path / "other")]) == 0
    finally:
        torch.set_num_threads(before)
    files = [tmp_path / name / "config.json" for name in ("one", "other")]
    assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())
    assert (
        "attention" not in files[0].read_text() and "attention: xformers" in (tmp_path / "one/config.yaml").read_text()
    )
    one, other = (load_file(file.with_name("model.safetensors")) for file in files)
    assert one.keys() == other.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mit_b0", "mit_b1"])
def test_the_real_one_is_as_near_to_float64_as_sdpa_in_bf16(name, seed):
    device = torch.device("cuda")
    problem = xformers_problem(head_shapes(name), torch.bfloat16, device)
    if problem is not None:
        pytest.skip(problem)
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    for heads, size in head_shapes(name):
        source = torch.randn(2, 32, 32, heads * size)
        results = []
        for dtype, choice in ((torch.float64, None), (torch.bfloat16, None), (torch.bfloat16, attend)):
            torch.manual_seed(seed)
            module = Attention(heads * size, heads, 2).to(device, dtype)
            module.attend = choice
            x = source.to(device, torch.bfloat16).to(dtype).requires_grad_()
            out = module(x)
            out.backward(torch.ones_like(out) / out.numel())
            results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
        for exact, plain, ours in zip(*results, strict=True):
            allowed = 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()
            assert (ours.double() - exact).norm() <= allowed
