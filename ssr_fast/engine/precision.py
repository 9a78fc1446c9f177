"""The precision of a training step, as written: no autocast region decides anything.

- fp32: everything in float32.
- tf32: float32, whose products a GPU may round to TF32.
- bf16: forward and backward passes on bfloat16 copies of the nets; weights, optimiser, average, BatchNorm's statistics,
  losses and reductions stay float32. A gradient of bfloat16 has float32's range: no loss scaling.
"""

import torch

from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of an option's value: "auto" is bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: the GPU has none of what was asked for.
    """
    if device.type != "cuda":
        if name == "tf32":
            raise UserError("--run.precision tf32 is a GPU's, and this run is on the CPU: give fp32 or bf16")
        return "fp32" if name == "auto" else name
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    if name in ("tf32", "bf16") and not able:
        raise UserError(f"--run.precision {name} needs a GPU of compute capability 8.0 or newer: give fp32")
    return ("bf16" if able else "fp32") if name == "auto" else name


def computed_dtype(name: str) -> torch.dtype:
    """The type of weights and activations in a step, for a precision that pick_precision has given."""
    return torch.bfloat16 if name == "bf16" else torch.float32


def apply_precision(method: Method, name: str, copies: bool = True) -> None:
    """Make a method on its device compute in a precision that pick_precision has given.

    Args:
        copies: on working copies of the trained nets; else whoever shards these sees to their types.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "bf16":
        method.compute_in(torch.bfloat16, copies)
