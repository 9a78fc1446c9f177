"""What keeps a run alive: a stop signal that is handled between steps, and the skipping of non-finite steps."""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context manager in which SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) only leave a note in `requested`.

    A second SIGINT raises KeyboardInterrupt: the user does not want to wait. The former handlers come back at the end.
    Python lets only the main thread handle signals; in another one nothing is installed, and `report` is told so.
    """

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self.requested: str | None = None
        """Name of the first signal received, such as "SIGTERM", or None."""
        self._report = report
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            self._report("signals cannot be handled outside of the main thread: a stop will not save a checkpoint")
            return self
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # None is a handler that was not installed from Python, and that Python cannot install again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number).name


class StepGuard:
    """Steps the optimiser, unless the gradient is not finite: then the step leaves no trace, decided on the device.

    Parameters and the optimiser's state (its step count included) stay as they were, because fused AdamW, PyTorch's and
    Apex's alike, honours `found_inf`; the buffers are written back. Clipping rides on the same kernel's `grad_scale`,
    so it costs no pass of its own. Nothing here waits for the device, so the step can be captured in a CUDA graph.
    A finite gradient whose norm overflows fp32 (about 1e19 an element) is skipped too.

    Order of a step: `before_forward()`, forward, backward, `step()`, whatever depends on it (such as the teacher's
    average, which a caller masks with `found_inf`), then zero the gradients.

    Args:
        optimizer: one whose groups are all "fused": it takes the attributes `found_inf` and `grad_scale` in each step.
        buffers: what a forward pass changes and a skipped step must not: running statistics of student and teacher.
        clip_norm: largest total norm of the gradient; 0 = no clipping.

    Raises:
        ValueError: a group of the optimiser is not fused, so it would ignore `found_inf`.
    """

    def __init__(self, optimizer: Optimizer, buffers: Sequence[Tensor], clip_norm: float = 0.0) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("StepGuard needs an optimiser with fused=True: others ignore found_inf")
        self._optimizer = optimizer
        self._buffers = list(buffers)
        self._saved = [buffer.clone() for buffer in self._buffers]
        self._clip_norm = clip_norm
        self._armed = False
        device = optimizer.param_groups[0]["params"][0].device
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        """Total norm of the last gradient before clipping; not finite when the step was skipped."""
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        """1 when the last step was skipped, else 0."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Number of steps skipped so far."""
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        optimizer.grad_scale = self._scale if clip_norm > 0 else None  # type: ignore[attr-defined]

    def before_forward(self) -> None:
        """Remembers the buffers; once before each step's first forward pass."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            saved.copy_(buffer)
        self._armed = True

    @torch.no_grad()
    def step(self) -> None:
        """One step of the optimiser with the gradients at hand, or none. The gradients are clipped in place.

        Raises:
            RuntimeError: no parameter has a gradient, or `before_forward` was not called since the last step.
        """
        if not self._armed:
            raise RuntimeError("StepGuard.before_forward() must be called before the forward pass of each step")
        self._armed = False
        grads = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise RuntimeError("StepGuard.step() found no gradient: call it after the backward pass")
        norm = get_total_norm(grads, foreach=True)
        if hasattr(norm, "full_tensor"):  # a DTensor, asked without the seconds that importing its class takes
            norm = norm.full_tensor()
        finite = torch.isfinite(norm)
        self.grad_norm.copy_(norm)
        self.found_inf.copy_(~finite)
        self.skipped.add_(~finite)
        if self._clip_norm > 0:
            self._scale.copy_(torch.where(finite, (norm / self._clip_norm).clamp(min=1.0), 1.0))
        self._optimizer.step()
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(finite, buffer, saved))
