"""The teacher: an exponential moving average of the student's parameters."""

import copy

import torch
from torch import Tensor, nn

from ssr_fast.models.noise import ChannelDropout, StochasticDepth
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.working_copy import WorkingCopy


class Teacher(nn.Module):
    """EMA copy of a student. Its BatchNorm normalises by the batch's own statistics and keeps its own buffers,
    its dropout and drop path are off, and nothing in it is differentiated (DAFormer's teacher).

    Args:
        student: the network to follow; the teacher starts as its copy.
        momentum: the EMA's final rate.
        ramp: start with a rate of 0 that rises (DAFormer's, for a student that knows nothing yet); else the rate is
            `momentum` from the first step on.
    """

    def __init__(self, student: Segmentor, momentum: float, ramp: bool = True) -> None:
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.momentum, self.ramp = momentum, ramp
        self.copy: WorkingCopy | None = None
        self.dtype = torch.float32
        for module in self.net.modules():
            if isinstance(module, StochasticDepth | ChannelDropout):
                module.disable()

    def compute_in(self, dtype: torch.dtype, copies: bool = True) -> None:
        """Run forward passes on a copy of lower precision (see Method.compute_in); the average stays float32."""
        self.copy, self.dtype = WorkingCopy(self.net, dtype) if copies else None, dtype

    def train(self, mode: bool = True) -> "Teacher":
        """The teacher is always in train mode: batch statistics are what it normalises by."""
        return super().train(True)

    @torch.no_grad()
    def follow(self, student: Segmentor, step: int) -> None:
        """teacher = alpha teacher + (1 - alpha) student, parameters only; alpha is momentum or, with a ramp, at most
        1 - 1 / (step + 1)."""
        alpha = min(1.0 - 1.0 / (step + 1), self.momentum) if self.ramp else self.momentum
        mine: list[Tensor] = list(self.net.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - alpha)
        if self.copy is not None:
            self.copy.refresh()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> stride-4 logits [B, K, h, w]."""
        net = self.net if self.copy is None else self.copy.net
        logits: Tensor = net(images.to(self.dtype)).logits
        return logits
