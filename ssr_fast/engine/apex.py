"""NVIDIA Apex's FusedAdam behind the contract of PyTorch's fused AdamW: a backend by choice, found at run time.

What is relied on was read in apex/optimizers/fused_adam.py and csrc/multi_tensor_adam.cu of NVIDIA/apex at commit
6424da3b4faa (2026-07-08), with capturable=True:

- the kernel takes pointers to the learning rate (float32), the step count (int32 [1], one for a whole group) and the
  inverse scale (float32); where the overflow flag is 1 it returns before it writes anything;
- step(grad_scaler=s) asks s for the flag and the scale (`_check_inf_per_device`, `_get_scale_async`); the kernel writes
  the scaled gradients back;
- step() counts a group's step BEFORE it takes over this step's flag, that is by the flag of the group or step before:
  after a skipped step the first group's count is one too high. So the flag is set beforehand here;
- the kernel walks memory, so parameter, gradient and moments must be laid out alike; it does not check that they are.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssr_fast.errors import UserError

FUSED = ("torch", "apex")
_BUILD = (
    "build it from source (in a clone of https://github.com/NVIDIA/apex: "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .)"
)


def check_fused(name: str, device: torch.device) -> None:
    """Whether this machine can run the fused optimiser that --optim.fused names.

    Raises:
        UserError: it cannot; every reason, and what to do.
    """
    if name != "apex":
        return
    reasons = apex_reasons(device)
    if reasons:
        build = f"{_BUILD} or " if device.type == "cuda" else ""
        raise UserError(f"--optim.fused apex cannot be used: {'; '.join(reasons)}: {build}give --optim.fused torch")


def apex_reasons(device: torch.device) -> list[str]:
    """Why Apex's FusedAdam cannot step parameters on this device; empty if it can."""
    where = None if device.type == "cuda" else "it steps parameters on a GPU, and there is none in use"
    return [reason for reason in (_package_problem(), where) if reason]


def is_nvidias() -> bool:
    """Whether `apex` is NVIDIA's, told by its folders: importing PyPI's project of that name may well fail."""
    spec = importlib.util.find_spec("apex")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / "multi_tensor_apply").is_dir() for folder in folders)


def _package_problem() -> str | None:
    """Why FusedAdam cannot be imported."""
    if importlib.util.find_spec("apex") is None:
        return "NVIDIA Apex is not installed"
    if not is_nvidias():
        return "the apex that is installed is another project, a Pyramid toolkit from PyPI, not NVIDIA's"
    if importlib.util.find_spec("amp_C") is None:
        return "the Apex that is installed was built without its CUDA extension amp_C"
    try:
        importlib.import_module("amp_C")  # Apex itself swallows what goes wrong here
        arguments = inspect.signature(_fused_adam()).parameters
    except Exception as error:  # whatever a package that was built for another PyTorch raises
        text = " ".join(str(error).split())
        return f"the Apex that is installed cannot be imported ({type(error).__name__}: {text})"
    return None if "capturable" in arguments else "the Apex that is installed is too old: FusedAdam is not capturable"


def _fused_adam() -> Any:
    return importlib.import_module("apex.optimizers").FusedAdam


class ApexAdamW(Optimizer):
    """AdamW by Apex's FusedAdam, with the groups, the state and the manners of torch.optim.AdamW(fused=True).

    - `found_inf` (1: this step leaves parameters, moments and counts as they are) and `grad_scale` (gradients are
      divided by it in place) are attributes to set, device scalars that are read in each step.
    - state[parameter] is {"step", "exp_avg", "exp_avg_sq"}, allocated at once; a checkpoint is loaded into these
      tensors in place. Each parameter has a count of its own, as in PyTorch, where Apex has one a group: each step
      hands Apex's kernel parameters of equal counts in groups of their own, with the count read on the device.

    A step waits for the device only where the groups must be found: the first time, when other parameters than in the
    step before have gradients, and after the counts were written from outside. In the capture of a CUDA graph the
    groups of the step before it stay, so load a checkpoint before the steps that warm up.

    Args:
        groups: parameter groups with "params" (pairs of name and parameter, float32), "lr" (a float32 scalar on their
            device) and "weight_decay".
        betas: decay rates of the first and the second moment.
    """

    found_inf: Tensor
    grad_scale: Tensor | None

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas, "eps": 1e-8, "fused": True})
        self._all = [parameter for group in self.param_groups for parameter in group["params"]]
        device = self._all[0].device
        self._counts = torch.zeros(len(self._all), dtype=torch.float32, device=device)
        for number, parameter in enumerate(self._all):
            self.state[parameter] = {
                "step": self._counts[number],
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.grad_scale = None
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._present: list[bool] = []
        self._written = -1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients at hand, or none where found_inf is 1."""
        assert closure is None, "a step that runs its own closure cannot be captured"
        present = [parameter.grad is not None for parameter in self._all]
        if not any(present):
            return
        if present != self._present or (self._counts._version != self._written and not _capturing()):
            self._regroup(present)
        for group, member in zip(self._apex.param_groups, self._members, strict=True):
            group["step"].copy_(self._counts[member : member + 1])
        self._apex._dummy_overflow_buf.copy_(self.found_inf)
        scale = self._one if self.grad_scale is None else self.grad_scale
        self._apex.step(grad_scaler=_Scaler(self.found_inf, scale))
        self._counts.add_(self._counted * (1.0 - self.found_inf))
        self._written = self._counts._version

    def _regroup(self, present: list[bool]) -> None:
        """Build FusedAdam anew, over groups whose parameters have gradients and equal counts. Reads the counts."""
        counts, number = self._counts.tolist(), 0
        found: dict[tuple[int, float], dict[str, Any]] = {}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if present[number]:
                    _check_layout(parameter)
                    like = {"lr": group["lr"], "weight_decay": group["weight_decay"], "member": number, "params": []}
                    found.setdefault((index, counts[number]), like)["params"].append(parameter)
                number += 1
        device = self._counts.device
        for cohort in found.values():
            cohort["step"] = torch.zeros(1, dtype=torch.int32, device=device)
        self._members = [cohort.pop("member") for cohort in found.values()]
        betas, eps = self.defaults["betas"], self.defaults["eps"]
        with torch.accelerator.device_index(device.index):  # FusedAdam's flag goes to the current GPU
            self._apex = _fused_adam()(list(found.values()), betas=betas, eps=eps, adam_w_mode=True, capturable=True)
        self._apex.state = self.state
        self._present = present
        self._counted = torch.tensor(present, dtype=torch.float32, device=device)


class _Scaler:
    """What FusedAdam.step asks of a torch.amp.GradScaler: the flag and the scale, as device tensors."""

    def __init__(self, found_inf: Tensor, scale: Tensor) -> None:
        self._found_inf, self._scale = found_inf, scale

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf}

    def _get_scale_async(self) -> Tensor:
        return self._scale


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_layout(parameter: Tensor) -> None:
    assert parameter.grad is not None
    strides = zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True)
    if any(one != other for size, one, other in strides if size > 1):
        raise RuntimeError(
            f"a gradient of shape {list(parameter.shape)} has the strides {parameter.grad.stride()} and its parameter "
            f"{parameter.stride()}: Apex's kernel would mix up their elements"
        )
