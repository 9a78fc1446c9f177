"""Apex's FusedAdam in place of PyTorch's fused AdamW: refusals, and the adapter on a stand-in that runs anywhere."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssr_fast.engine import apex
from ssr_fast.engine.apex import ApexAdamW, apex_reasons, check_fused
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.optim import OptimConfig, build_optimizer, optimizer_state, set_learning_rate
from ssr_fast.engine.state import split
from ssr_fast.engine.step_guard import StepGuard
from ssr_fast.errors import UserError
from ssr_fast.train import main
from tests.syncfree import NoHostSync

CPU = torch.device("cpu")


class StandIn(torch.optim.Optimizer):
    """What apex.optimizers.FusedAdam with capturable=True does, in plain PyTorch on any device.

    Follows the behaviour (no code) of apex/optimizers/fused_adam.py and AdamCapturableFunctor in
    csrc/multi_tensor_adam.cu of NVIDIA/apex at commit 6424da3b4faa6c8f062da4a48c424fff3f02d42d: one int32 step count a
    group, which is raised by the flag that is there BEFORE this step's flag is taken over; a raised flag leaves
    everything else as it was; gradients are scaled in place.
    """

    built = 0

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, capturable=False):
        assert adam_w_mode and capturable
        super().__init__(params, {"lr": torch.tensor(lr, dtype=torch.float32), "betas": betas, "eps": eps})
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int, device=device)
        StandIn.built += 1

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            device = group["params"][0].device
            assert group["step"].dtype == torch.int32 and group["step"].shape == (1,)
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            assert group["lr"].dtype == inverse.dtype == torch.float32
            go = self._dummy_overflow_buf != 1
            for p in group["params"]:
                if p.grad is not None:
                    assert len(self.state[p]) > 0
                    self._update(p, group, inverse, go)

    def _update(self, p, group, inverse, go):
        (b1, b2), step, state = group["betas"], group["step"].float(), self.state[p]
        g = p.grad * inverse
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"]) + group["weight_decay"] * p
        new = {p.grad: g, p: p - group["lr"] * update, state["exp_avg"]: m, state["exp_avg_sq"]: v}
        for tensor, value in new.items():
            tensor.copy_(torch.where(go, value, tensor))


class Late(nn.Module):
    """A layer that gets gradients in some steps only, like a loss that starts later."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 3)


class Run:
    """A net with every group of the optimiser, and its guard."""

    def __init__(self, fused, clip_norm=0.0, device="cpu", seed=0):
        torch.manual_seed(seed)
        # no bias in front of BatchNorm: its gradient is rounding, which Adam makes a full step of
        backbone = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
        self.nets = nn.ModuleDict({"backbone": backbone, "head": nn.Conv2d(4, 2, 1), "extra": Late()}).to(device)
        config = OptimConfig(lr=0.01, weight_decay=0.1, fused=fused)
        self.optimizer = build_optimizer(dict(self.nets.items()), config)
        self.guard = StepGuard(self.optimizer, list(self.nets.buffers()), clip_norm)
        self.device = device

    def step(self, seed, late=True, spoil=False, strict=False):
        set_learning_rate(self.optimizer, 0.01 / (seed + 1))
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(self.device)
        self.guard.before_forward()
        out = self.nets["head"](self.nets["backbone"](x))
        loss = out.square().sum()
        if late:
            loss = loss + self.nets["extra"].proj(out.mean((2, 3))).square().sum()
        loss.backward()
        if spoil:
            self.nets["head"].weight.grad.view(-1)[3] = float("nan")
        if strict:
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.guard.step()
        finally:
            if strict:
                torch.cuda.set_sync_debug_mode("default")
        self.optimizer.zero_grad(set_to_none=True)

    def state(self):
        return {"nets": self.nets.state_dict(), "optimizer": optimizer_state(self.optimizer)}

    def tensors(self):
        return {name: tensor.clone() for name, tensor in split(self.state())[0].items()}


# (seed, does the late layer learn, is the gradient spoilt): skips at the start, twice running, and one before a start
STEPS = [(0, False, True), (1, False, False), (2, False, True), (3, False, True), (4, True, False), (5, True, False)]
STEPS += [(6, False, False), (7, True, True), (8, True, False)]


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_near(one, other):
    """Counts equal to the bit, the rest to float32's rounding, as a share of the tensor's largest value."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        if name.endswith("step") or not one[name].is_floating_point():
            assert torch.equal(one[name], other[name]), name
        error = (one[name] - other[name]).abs().max()
        assert error <= 2e-5 * other[name].abs().max(), (name, float(error))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(apex, "_fused_adam", lambda: StandIn)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_steps_equal_torchs_with_skips_clipping_and_a_late_layer(stand_in, clip_norm):
    ours, theirs = Run("apex", clip_norm), Run("torch", clip_norm)
    assert isinstance(ours.optimizer, ApexAdamW) and not isinstance(theirs.optimizer, ApexAdamW)
    for seed, late, spoil in STEPS:
        before = ours.tensors()
        for run in (ours, theirs):
            run.step(seed, late, spoil)
        left = {name for name in differing(before, ours.tensors()) if not name.startswith("optimizer.lr")}
        assert (left == set()) == spoil
        assert_near(ours.tensors(), theirs.tensors())
        assert torch.equal(ours.guard.found_inf, theirs.guard.found_inf)
    assert ours.guard.skipped == 4
    counts = {name: float(t) for name, t in ours.tensors().items() if name.endswith("step")}
    assert counts["optimizer.params.extra.proj.weight.step"] == 3
    assert counts["optimizer.params.backbone.0.weight.step"] == counts["optimizer.params.head.bias.step"] == 5


def test_groups_and_state_are_those_of_torch(stand_in):
    ours, theirs = Run("apex"), Run("torch")
    assert differing(ours.tensors(), theirs.tensors()) == []
    for mine, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        for key in ("param_names", "lr", "lr_factor", "weight_decay", "betas", "eps", "fused"):
            assert mine[key] == other[key], key
    for p, q in zip(ours.nets.parameters(), theirs.nets.parameters(), strict=True):
        mine, other = ours.optimizer.state[p], theirs.optimizer.state[q]
        assert mine.keys() == other.keys()
        assert all(mine[key].stride() == other[key].stride() and mine[key].dtype == other[key].dtype for key in mine)


def test_clipping_scales_the_gradients_in_place(stand_in):
    grads = []
    for fused in ("apex", "torch"):
        run = Run(fused, clip_norm=0.5)
        run.guard.before_forward()
        run.nets["head"](run.nets["backbone"](torch.ones(2, 3, 6, 6).cumsum(2))).square().sum().backward()
        run.guard.step()
        assert run.guard.grad_norm > 0.5
        grads.append({name: p.grad for name, p in run.nets.named_parameters() if p.grad is not None})
    assert_near(*grads)


def test_a_checkpoint_goes_from_torch_to_apex_and_back(stand_in, tmp_path):
    """Bit for bit as saved, and the counts of the late layer keep to themselves."""
    first, second, third = Run("torch"), Run("apex", seed=1), Run("torch", seed=2)
    for steps in STEPS[:6]:
        first.step(*steps)
    second.step(0)  # what it had before must not matter, least of all that all its counts were equal
    for number, (source, target) in enumerate(((first, second), (second, third))):
        store = CheckpointStore(tmp_path / str(number), 1)
        store.save(6, source.state())
        path = store.latest()
        store.load(path, target.state())
        store.wait()
        assert differing(source.tensors(), target.tensors()) == []
    for steps in STEPS[7:]:
        for run in (first, second, third):
            run.step(*steps)
    assert differing(first.tensors(), third.tensors()) == []
    assert_near(second.tensors(), first.tensors())


def test_nothing_waits_for_the_device_once_the_groups_are_known(stand_in):
    run = Run("apex", clip_norm=0.5)
    run.step(0)
    built = StandIn.built
    with NoHostSync():
        run.step(1)
        run.step(2, spoil=True)
        run.step(3)
    assert StandIn.built == built
    assert run.guard.skipped == 1


def test_a_gradient_that_is_laid_out_otherwise_is_an_error(stand_in):
    run = Run("apex")
    weight = run.nets["backbone"][0].weight
    weight.grad = torch.ones_like(weight).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="mix up"):
        run.optimizer.step()


def test_without_a_guard_and_without_gradients(stand_in):
    run = Run("apex")
    before = run.tensors()
    run.optimizer.step()
    assert differing(before, run.tensors()) == []
    run.nets["extra"].proj.bias.grad = torch.ones(3)
    run.optimizer.step()
    changed = differing(before, run.tensors())
    assert len(changed) == 4 and all("extra.proj.bias" in name for name in changed)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes packages of these files and their text; a name without files cannot be found."""
    names = ("apex", "apex.optimizers", "amp_C")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    find = importlib.util.find_spec
    found = lambda name: find(name) if (tmp_path / name).exists() else None  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) if name in names else find(name))
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**files):
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/") / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    yield make
    for name in names:
        sys.modules.pop(name, None)


CLASS = "class FusedAdam:\n    def __init__(self, params, {}): pass\n"
APEX = {"apex": "", "apex__multi_tensor_apply": "", "apex__optimizers": CLASS.format("capturable=False")}
INSTALLED = {
    "nothing": ({}, "NVIDIA Apex is not installed"),
    "wrong": ({"apex": "raise SyntaxError('never imported')"}, "another project, a Pyramid toolkit from PyPI, not NVI"),
    "python only": (APEX, "built without its CUDA extension amp_C"),
    "another torch": (
        {**APEX, "amp_C": "raise ImportError('amp_C.so:\\n undefined symbol: _ZN3c10')"},
        "cannot be imported (ImportError: amp_C.so: undefined symbol: _ZN3c10)",
    ),
    "old": ({**APEX, "amp_C": "", "apex__optimizers": CLASS.format("lr=1e-3")}, "too old: FusedAdam is not capturable"),
    "good": ({**APEX, "amp_C": ""}, None),
}


@pytest.mark.parametrize("case", INSTALLED)
def test_each_reason_has_its_sentence(case, packages):
    files, reason = INSTALLED[case]
    packages(**files)
    reasons = apex_reasons(torch.device("cuda"))
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else reasons == []
    check_fused("torch", CPU)
    if reason is None:
        check_fused("apex", torch.device("cuda"))
    else:
        with pytest.raises(UserError) as refusal:
            check_fused("apex", torch.device("cuda"))
        sentence = str(refusal.value)
        assert sentence.startswith("--optim.fused apex cannot be used: ") and "\n" not in sentence
        assert reason in sentence and "APEX_CUDA_EXT=1 pip install" in sentence
        assert sentence.endswith("or give --optim.fused torch")
    with pytest.raises(UserError, match="there is none in use: give --optim.fused torch$"):
        check_fused("apex", CPU)


def test_a_run_is_refused_before_it_writes_anything(tmp_path, packages):
    with pytest.raises(UserError, match="^--optim.fused apex cannot be used: NVIDIA Apex is not installed"):
        main(["--optim.fused=apex", "--run.device=cpu", "--run.dir", str(tmp_path / "run")])
    assert not Path(tmp_path / "run").exists()
    assert OptimConfig(fused="fast").problems("optim") == ["--optim.fused must be one of torch, apex (it is fast)"]


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_the_real_apex_equals_torch(clip_norm, monkeypatch):
    reasons = apex_reasons(torch.device("cuda"))
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ours, theirs = Run("apex", clip_norm, "cuda"), Run("torch", clip_norm, "cuda")
    for number, (seed, late, spoil) in enumerate(STEPS):
        before = ours.tensors()
        ours.step(seed, late, spoil, strict=number in (1, 5))  # the step before has the same parameters' gradients
        theirs.step(seed, late, spoil)
        left = {name for name in differing(before, ours.tensors()) if not name.startswith("optimizer.lr")}
        assert (left == set()) == spoil
        assert_near(ours.tensors(), theirs.tensors())


@pytest.mark.gpu
def test_a_captured_step_of_the_real_apex_equals_torchs():
    reasons = apex_reasons(torch.device("cuda"))
    if reasons:
        pytest.skip("; ".join(reasons))
    results = []
    for fused in ("apex", "torch"):
        run = Run(fused, 0.5, "cuda")
        parameters = list(run.nets.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p)

        def step(run=run):
            run.guard.before_forward()
            run.guard.step()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for number in range(4):
            for p in parameters:
                p.grad.normal_(generator=torch.Generator("cuda").manual_seed(number))
            if number == 2:
                parameters[0].grad.view(-1)[0] = float("inf")
            graph.replay()
        results.append(run.tensors())
        assert run.guard.skipped == 1
    assert_near(*results)
