"""The run's own options, and its device."""

from dataclasses import dataclass

import torch

from ssr_fast.engine.attention import ATTENTIONS
from ssr_fast.engine.checkpoint import ON_ERROR
from ssr_fast.engine.precision import PRECISIONS

GRAPHS = ("auto", "off")


@dataclass(kw_only=True)
class RunConfig:
    """The run; the options `--run.*`."""

    dir: str = ""
    """Folder of everything that the run writes; unset: runs/<preset>, numbered if it exists."""
    steps: int = 40000
    """Optimiser steps of a stage."""
    seed: int = 0
    """Seed of the initial weights, the samples and all augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "auto"
    """bf16 (copies of the weights and activations; weights, losses and statistics stay float32), tf32 (a GPU's), fp32,
    or auto: bf16 on a GPU that has it, else fp32."""
    deterministic: bool = True
    """On a GPU: compute steps by kernels that give the same bits each time, so that a resumed run is the run that was
    not stopped. false: whatever kernel PyTorch likes best. A CPU's kernels are deterministic."""
    compile_blocks: bool = False
    """torch.compile of every block and head: fewer, larger kernels, for minutes of compilation at the first steps."""
    graph: str = "auto"
    """auto (on a GPU a step is captured in a CUDA graph; where that fails a line says why) or off (every kernel is
    launched by itself: for debugging and profiles)."""
    attention: str = "sdpa"
    """The MiT's attention in a step: sdpa (PyTorch's own) or xformers (memory_efficient_attention, on a GPU)."""
    recompute_blocks: bool = False
    """Keep of each block of the student its input alone, and compute the rest again in the backward pass: for crops
    that would not fit into the GPU's memory. Counted at 1024 with MiT-B5: 67 % fewer bytes, 16 % more arithmetic."""
    stages: tuple[str, ...] | None = None
    """Methods to train one after another from the same start, to compare them; null: only method.name."""
    log_every: int = 50
    """Steps in one row of the metrics; the device is read once for each."""
    evaluate_every: int = 4000
    """Steps between evaluations on the target, where it has labels; the last step is always evaluated."""
    save_every: int = 4000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints to keep, the newest ones; the one with the best score is kept beside them."""
    on_save_error: str = "stop"
    """What a checkpoint that cannot be written does (disk full, folder gone): stop ends the run, continue says so and
    trains on; the last one of a run must be written in any case."""
    samples: int = 4
    """Evaluation images (without any: target images) shown in the report."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        for name in ("steps", "log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                found.append(f"--{where}.{name} must be at least 1 (it is {getattr(self, name)})")
        for name in ("seed", "samples"):
            if getattr(self, name) < 0:
                found.append(f"--{where}.{name} must not be negative (it is {getattr(self, name)})")
        if self.precision not in PRECISIONS:
            found.append(f"--{where}.precision must be one of {', '.join(PRECISIONS)} (it is {self.precision})")
        if self.graph not in GRAPHS:
            found.append(f"--{where}.graph must be {' or '.join(GRAPHS)} (it is {self.graph})")
        if self.attention not in ATTENTIONS:
            found.append(f"--{where}.attention must be one of {', '.join(ATTENTIONS)} (it is {self.attention})")
        if self.on_save_error not in ON_ERROR:
            found.append(f"--{where}.on_save_error must be {' or '.join(ON_ERROR)} (it is {self.on_save_error})")
        kind = self.device.partition(":")[0]
        if kind not in ("auto", "cpu", "cuda"):
            found.append(f"--{where}.device must be auto, cpu, cuda or cuda:N (it is {self.device})")
        if kind == "cuda" and not torch.cuda.is_available():
            found.append(f"--{where}.device {self.device} asks for a GPU and PyTorch finds none: use auto or cpu")
        return found


def pick_device(name: str, local: int | None = None) -> torch.device:
    """The device of an option's value: "auto" is a GPU if there is one, else the CPU.

    Args:
        local: number of this process on its machine, and of its GPU; None: the first one, or that of the name.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.device("cuda", local) if kind == "cuda" and local is not None else torch.device(kind)
