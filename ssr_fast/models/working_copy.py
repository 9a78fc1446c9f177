"""A network in a lower precision that follows a master in float32: what forward and backward run on.

The optimiser, the average, checkpoints and the shipped model know the master alone. BatchNorm stays in float32: the
copy has the master's own weights there, and shares every buffer with it.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class WorkingCopy(nn.Module):
    """`net`, a copy of `master` whose parameters are of `dtype`.

    Args:
        master: in float32, on its device.
        dtype: bfloat16 or another of lower precision.
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = copy.deepcopy(master)
        self._masters: list[nn.Parameter] = []
        self._working: list[nn.Parameter] = []
        for theirs, ours in zip(master.modules(), self.net.modules(), strict=True):
            for name, buffer in theirs._buffers.items():
                ours._buffers[name] = buffer
            for name, parameter in theirs._parameters.items():
                if parameter is None or isinstance(theirs, _BatchNorm):
                    ours._parameters[name] = parameter
                    continue
                lower = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                ours._parameters[name] = lower
                self._masters.append(parameter)
                self._working.append(lower)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the master's values; after whatever has changed them."""
        torch._foreach_copy_([*self._working], [*self._masters])

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the gradients to the master's, in its precision, and keep none."""
        fresh: tuple[list[Tensor], list[Tensor]] = [], []
        known: tuple[list[Tensor], list[Tensor]] = [], []
        for master, working in zip(self._masters, self._working, strict=True):
            if working.grad is None:
                continue
            mine, theirs = fresh if master.grad is None else known
            if master.grad is None:
                master.grad = torch.empty_like(master)
            mine.append(master.grad)
            theirs.append(working.grad)
            working.grad = None
        if fresh[0]:
            torch._foreach_copy_(*fresh)
        if known[0]:
            torch._foreach_add_(*known)
