"""AdamW with the parameter groups and the learning-rate schedule of SegFormer and DAFormer.

The groups follow the originals' `custom_keys` (DAFormer experiments.py; mmcv matches a key as a substring of the
parameter's name, longer keys first, then in alphabetical order): "pos_block" no decay, "head" learning rate x 10,
"norm" no decay. "head" comes before "norm", so everything in the head is decayed, its norms too; biases are decayed
everywhere. "pos_block" names nothing in a MiT, whose positions come from a depthwise convolution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssr_fast.engine.apex import FUSED, ApexAdamW

_ROLES = ("backbone", "head", "extra")
_UNDECAYED = ("pos_block", "norm")


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser and schedule. The defaults are DAFormer's for 40,000 iterations of 2 + 2 images."""

    lr: float = 6e-5
    """Peak learning rate of the backbone."""
    head_lr_factor: float = 10.0
    """The decode head's learning rate is this times `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; the backbone's norms have none."""
    warmup_steps: int = 1500
    """Steps of linear warm-up, which multiplies the decay; 0 = none."""
    warmup_ratio: float = 1e-6
    """Share of the learning rate at step 0 of the warm-up."""
    decay_steps: int | None = None
    """Step at which the linear decay reaches 0; unset: the run's number of steps."""
    clip_norm: float = 0.0
    """Largest total norm of the gradient, beyond which it is scaled down; 0 = no clipping."""
    accumulate: int = 1
    """Micro-batches of --data.batch_size in one step of one process. Each is a batch of its own to BatchNorm and to
    the share of confident pseudo-labels, as it would be on another process; their gradients are averaged."""
    fused: str = "torch"
    """Whose fused AdamW: torch's, or apex for FusedAdam of NVIDIA Apex, which must be built from source. Checkpoints of
    one can be resumed with the other."""

    def problems(self, where: str) -> list[str]:
        """One sentence for each illegal value; `where` is the options' prefix, such as "optim"."""
        b1, b2 = self.betas
        decay = self.decay_steps
        rules = [
            ("lr", self.lr, 0 < self.lr < math.inf, "be > 0"),
            ("head_lr_factor", self.head_lr_factor, 0 < self.head_lr_factor < math.inf, "be > 0"),
            ("betas", self.betas, 0 <= b1 < 1 and 0 <= b2 < 1, "both lie in [0, 1)"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "be >= 0"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "be >= 0"),
            ("warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio <= 1, "lie in [0, 1]"),
            ("decay_steps", decay, decay is None or decay > 0, "be > 0, or unset for the run's number of steps"),
            ("clip_norm", self.clip_norm, 0 <= self.clip_norm < math.inf, "be >= 0 (0 = no clipping)"),
            ("accumulate", self.accumulate, self.accumulate >= 1, "be at least 1"),
            ("fused", self.fused, self.fused in FUSED, f"be one of {', '.join(FUSED)}"),
        ]
        found = [f"--{where}.{name} must {rule} (it is {value})" for name, value, legal, rule in rules if not legal]
        if decay is not None and 0 < decay <= self.warmup_steps:
            found.append(
                f"--{where}.warmup_steps must be smaller than --{where}.decay_steps ({self.warmup_steps} >= {decay})"
            )
        return found


def learning_rate(step: int, config: OptimConfig, total: int) -> float:
    """The backbone's learning rate for the step with 0-based number `step`.

    The linear warm-up MULTIPLIES the linear decay (mmcv's LrUpdaterHook with policy "poly", power 1, min_lr 0), so with
    the defaults it peaks at 5.775e-5 at step 1500.

    Args:
        step: number of steps done so far.
        config: the schedule.
        total: the run's number of steps, used where `decay_steps` is unset.
    """
    decay_steps = total if config.decay_steps is None else config.decay_steps
    rate = config.lr * max(0.0, 1.0 - step / decay_steps)
    if step < config.warmup_steps:
        rate *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
    return rate


def build_optimizer(modules: Mapping[str, nn.Module], config: OptimConfig) -> Optimizer:
    """Fused AdamW over the trainable parameters, its state allocated at once, its learning rates in device tensors.

    A state of zeros is what AdamW's lazy start makes too; to have it from the beginning means that checkpoints always
    hold the same tensors and that a captured step finds them.

    Args:
        modules: under "backbone", "head" and "extra" (projections and other parts that only training needs; they join
            the backbone's groups). Build it after the modules stand on their device and are sharded.
        config: learning rates and decay. Set each step's rate with `set_learning_rate`.

    Returns:
        PyTorch's AdamW or, for `config.fused` "apex", ApexAdamW with the same groups and state; a group also holds
        "lr_factor" and "param_names" (such as "backbone.block1.0.norm1.weight").

    Raises:
        ValueError: an unknown key in `modules`, or nothing to train.
    """
    unknown = sorted(set(modules) - set(_ROLES))
    if unknown:
        raise ValueError(f"unknown module role {unknown[0]!r}, expected some of {', '.join(_ROLES)}")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for role in _ROLES:
        for name, parameter in modules[role].named_parameters() if role in modules else ():
            if parameter.requires_grad:
                groups.setdefault(_group_of(role, name, config), []).append((f"{role}.{name}", parameter))
    if not groups:
        raise ValueError("there is no trainable parameter")
    device = next(iter(groups.values()))[0][1].device
    built = [
        {
            "params": parameters,
            "lr": torch.full((), config.lr * factor, dtype=torch.float32, device=device),
            "lr_factor": factor,
            "weight_decay": decay,
        }
        for (factor, decay), parameters in groups.items()
    ]
    if config.fused == "apex":
        return ApexAdamW(built, config.betas)
    optimizer = AdamW(built, betas=config.betas, fused=True, capturable=device.type == "cuda")
    _allocate_state(optimizer)
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets each group's learning rate to `rate` times the group's factor, without a host sync.

    It belongs outside of a captured CUDA graph, in which `rate` would be frozen.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group["lr_factor"])


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's tensors themselves, by parameter name: {"params": {name: {"step", ...}}, "lr": {group: tensor}}.

    Loading a checkpoint writes into these tensors in place. The optimiser must come from `build_optimizer`.
    """
    params = {
        name: {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    return {"params": params, "lr": {str(i): group["lr"] for i, group in enumerate(optimizer.param_groups)}}


def _group_of(role: str, name: str, config: OptimConfig) -> tuple[float, float]:
    """(factor of the learning rate, weight decay) of a parameter."""
    if role == "head":
        return config.head_lr_factor, config.weight_decay
    return 1.0, 0.0 if any(key in name for key in _UNDECAYED) else config.weight_decay


def _allocate_state(optimizer: AdamW) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
