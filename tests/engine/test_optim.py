"""Parameter groups, schedule and state of the optimiser."""

import math

import pytest
import torch
from torch import Tensor, nn

from ssr_fast.engine.optim import OptimConfig, build_optimizer, learning_rate, optimizer_state, set_learning_rate
from tests.syncfree import NoHostSync


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class _Backbone(nn.Module):
    """The kinds of parameter that a MiT has, under its names, and a pos_block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = _Attention()
        self.norm1 = nn.LayerNorm(4)
        self.dwconv = nn.Conv2d(4, 4, 3, groups=4)
        self.pos_block = nn.Conv2d(4, 4, 3)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm(4)


def _modules() -> dict[str, nn.Module]:
    return {"head": _Head(), "backbone": _Backbone(), "extra": nn.ModuleDict({"proj": nn.Linear(4, 4)})}


def _mmcv(name: str, lr: float, decay: float) -> tuple[float, float]:
    """mmcv's rule for DAFormer's custom_keys: the longest key that is a substring of the name, then by alphabet."""
    keys: dict[str, tuple[float, float]] = {"head": (10.0, 1.0), "pos_block": (1.0, 0.0), "norm": (1.0, 0.0)}
    for key in sorted(sorted(keys), key=len, reverse=True):
        if key in name:
            return lr * keys[key][0], decay * keys[key][1]
    return lr, decay


def test_groups_are_those_of_the_originals() -> None:
    config = OptimConfig(lr=0.5, weight_decay=0.25)
    optimizer = build_optimizer(_modules(), config)
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            found[name] = (group["lr"].item(), group["weight_decay"], parameter)
    trainable = {f"{role}.{name}": p for role, m in _modules().items() for name, p in m.named_parameters()}
    assert found.keys() == trainable.keys()
    for name, (lr, decay, parameter) in found.items():
        assert (lr, decay) == _mmcv(name.replace("head.", "decode_head.", 1), 0.5, 0.25), name
        assert parameter.shape == trainable[name].shape
    assert found["head.norm.weight"][1] == found["head.bn.weight"][1] == found["backbone.attn.q.bias"][1] == 0.25
    assert found["backbone.attn.norm.bias"][1] == found["backbone.pos_block.weight"][1] == 0.0
    assert len(optimizer.param_groups) == 3


def test_frozen_parameters_stay_out_and_nothing_to_train_is_an_error() -> None:
    modules = _modules()
    modules["backbone"].requires_grad_(False)
    names = [name for group in build_optimizer(modules, OptimConfig()).param_groups for name in group["param_names"]]
    assert names and not any(name.startswith("backbone.") for name in names)
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer({"backbone": modules["backbone"]}, OptimConfig())
    with pytest.raises(ValueError, match="'decoder'"):
        build_optimizer({"decoder": nn.Linear(1, 1)}, OptimConfig())


def test_the_warm_up_multiplies_the_decay() -> None:
    config = OptimConfig()
    assert learning_rate(1500, config, 40000) == pytest.approx(5.775e-5, rel=1e-12)
    assert max(learning_rate(step, config, 40000) for step in range(0, 40000, 50)) == learning_rate(1500, config, 40000)
    assert learning_rate(0, config, 40000) == pytest.approx(6e-11, rel=1e-9)
    assert learning_rate(40000, config, 40000) == 0.0 == learning_rate(50000, config, 40000)


@pytest.mark.parametrize("step", [0, 1, 749, 1499, 1500, 1501, 20000, 39999])
def test_the_schedule_is_mmcvs(step: int) -> None:
    regular = (6e-5 - 0.0) * (1 - step / 40000) ** 1.0 + 0.0
    k = (1 - step / 1500) * (1 - 1e-6)
    expected = regular * (1 - k) if step < 1500 else regular
    assert learning_rate(step, OptimConfig(), 40000) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(step, OptimConfig(decay_steps=40000), 7) == pytest.approx(expected, rel=1e-12)


def test_a_run_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(0, OptimConfig(lr=0.5, warmup_steps=0), 10) == 0.5
    assert learning_rate(5, OptimConfig(lr=0.5, warmup_steps=0), 10) == 0.25


def test_setting_the_rate_fills_the_same_tensors_without_a_sync() -> None:
    optimizer = build_optimizer(_modules(), OptimConfig())
    before = [group["lr"] for group in optimizer.param_groups]
    with NoHostSync():
        set_learning_rate(optimizer, 0.125)
    for group, tensor in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is tensor
        assert tensor.item() == 0.125 * group["lr_factor"]
    assert {group["lr_factor"] for group in optimizer.param_groups} == {1.0, 10.0}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    for step in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_allocated_state_is_what_the_lazy_start_would_be() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(nn.Linear(4, 4))
    rate = torch.tensor(0.01)
    lazy = torch.optim.AdamW([{"params": nets[0].parameters(), "lr": rate}], weight_decay=0.1, fused=True)
    eager = build_optimizer({"backbone": nets[1]}, OptimConfig(lr=0.01, weight_decay=0.1))
    assert all(state["step"].item() == 0 for state in eager.state.values()) and len(eager.state) == 2
    for a, b in zip(_train(nets[0], lazy, 3), _train(nets[1], eager, 3), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert lazy.state[p].keys() == eager.state[q].keys()
        for key in lazy.state[p]:
            assert torch.equal(lazy.state[p][key], eager.state[q][key]), key


def test_the_state_names_every_parameter_and_holds_the_tensors_themselves() -> None:
    modules = _modules()
    optimizer = build_optimizer(modules, OptimConfig())
    state = optimizer_state(optimizer)
    assert len(state["params"]) == sum(len(list(module.parameters())) for module in modules.values())
    assert state["lr"].keys() == {"0", "1", "2"}
    weight = dict(modules["head"].named_parameters())["conv.weight"]
    state["params"]["head.conv.weight"]["exp_avg"].fill_(7.0)
    assert optimizer.state[weight]["exp_avg"].eq(7.0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "--optim.lr must be > 0 (it is -1.0)"),
        ({"lr": math.nan}, "--optim.lr must be > 0 (it is nan)"),
        ({"lr": math.inf}, "--optim.lr must be > 0 (it is inf)"),
        ({"head_lr_factor": 0.0}, "--optim.head_lr_factor must be > 0 (it is 0.0)"),
        ({"betas": (0.9, 1.0)}, "--optim.betas must both lie in [0, 1) (it is (0.9, 1.0))"),
        ({"weight_decay": -0.1}, "--optim.weight_decay must be >= 0 (it is -0.1)"),
        ({"warmup_steps": -1}, "--optim.warmup_steps must be >= 0 (it is -1)"),
        ({"warmup_ratio": 2.0}, "--optim.warmup_ratio must lie in [0, 1] (it is 2.0)"),
        ({"decay_steps": 0}, "--optim.decay_steps must be > 0, or unset for the run's number of steps (it is 0)"),
        ({"clip_norm": -1.0}, "--optim.clip_norm must be >= 0 (0 = no clipping) (it is -1.0)"),
        (
            {"decay_steps": 9, "warmup_steps": 9},
            "--optim.warmup_steps must be smaller than --optim.decay_steps (9 >= 9)",
        ),
    ],
)
def test_each_illegal_value_has_its_sentence(options: dict, sentence: str) -> None:
    assert OptimConfig(**options).problems("optim") == [sentence]


def test_all_problems_come_at_once_and_the_defaults_have_none() -> None:
    assert OptimConfig().problems("optim") == []
    assert len(OptimConfig(lr=0.0, weight_decay=-1.0, clip_norm=-1.0).problems("optim")) == 3
