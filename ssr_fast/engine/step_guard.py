"""The skipping of steps that would harm: decided on the device, by all ranks alike, without a trace."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_MIN_WINDOW = 4  # half of it are the two numbers that a deviation needs


@dataclass(kw_only=True)
class GuardConfig:
    """Which steps are skipped, and when that ends the run; the options `--guard.*`."""

    spike_sigmas: float = 0.0
    """A step is skipped too if its loss or the norm of its gradient lies more than this many standard deviations above
    the mean of the last finite ones; 0 = never."""
    spike_window: int = 128
    """How many steps that mean and deviation are of; nothing is judged before half as many are known."""
    abort_after: int = 50
    """Steps skipped in a row after which the run ends; 0 = never."""

    def problems(self, where: str) -> list[str]:
        """One sentence for each illegal value; `where` is the options' prefix, such as "guard"."""
        sigmas, window, steps = self.spike_sigmas, self.spike_window, self.abort_after
        rules = [
            ("spike_sigmas", sigmas, 0 <= sigmas < math.inf, "be >= 0 (0 = no step is skipped for a spike)"),
            ("spike_window", window, window >= _MIN_WINDOW, f"be at least {_MIN_WINDOW}"),
            ("abort_after", steps, steps >= 0, "be >= 0 (0 = never)"),
        ]
        return [f"--{where}.{name} must {rule} (it is {value})" for name, value, legal, rule in rules if not legal]


class StepGuard:
    """Steps the optimiser, unless the step would harm: then it leaves no trace.

    A step is skipped if the norm of its gradient or its loss is not finite or, by option, spikes. Parameters and the
    optimiser's state (its step count included) stay as they were, because fused AdamW, PyTorch's and Apex's alike,
    honours `found_inf`; the buffers are written back. Clipping rides on the same kernel's `grad_scale`, so it costs no
    pass of its own. Nothing here waits for the device, so the step can be captured in a CUDA graph.
    A finite gradient whose norm overflows fp32 (about 1e19 an element) is skipped too.

    Order of a step: `before_forward()`; forward and backward of each share, with `next_share()` between two of them;
    `step()`; whatever depends on it (such as the teacher's average, which a caller masks with `found_inf`); then zero
    the gradients.

    Every share, and on every rank, starts from the buffers that the last step left. What they become is the mean over
    shares and ranks, so all ranks keep the same ones.

    Args:
        optimizer: one whose groups are all "fused": it takes the attributes `found_inf` and `grad_scale` in each step.
            Its gradients, or the norm of sharded ones, are the same on all ranks.
        buffers: what a forward pass changes and a skipped step must not: running statistics of student and teacher.
        clip_norm: largest total norm of the gradient; 0 = no clipping.
        shares: micro-batches of a step.
        mean: replaces a tensor by its mean over the ranks, called once a step; None for a process alone.
        config: the spikes; the defaults know none.

    Raises:
        ValueError: a group of the optimiser is not fused, so it would ignore `found_inf`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffers: Sequence[Tensor],
        clip_norm: float = 0.0,
        *,
        shares: int = 1,
        mean: Callable[[Tensor], None] | None = None,
        config: GuardConfig | None = None,
    ) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("StepGuard needs an optimiser with fused=True: others ignore found_inf")
        config = config or GuardConfig()
        self._optimizer, self._clip_norm = optimizer, clip_norm
        self._buffers = list(buffers)
        self._saved = [buffer.clone() for buffer in self._buffers]
        self._shares, self._mean = shares, mean
        self._share: int | None = None
        device = optimizer.param_groups[0]["params"][0].device
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        """Total norm of the last gradient before clipping; not finite where that is why the step was skipped."""
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        """1 when the last step was skipped, else 0."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Number of steps skipped so far."""
        self.in_row = torch.zeros((), dtype=torch.int64, device=device)
        """Number of steps skipped in a row until now; 0 after a good one."""
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._level = _Level(config.spike_window, device)
        self._sigmas = config.spike_sigmas
        self._averaged = _Averaged(self._buffers, device) if shares > 1 or mean is not None else None
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        optimizer.grad_scale = self._scale if clip_norm > 0 else None  # type: ignore[attr-defined]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the tensors themselves, into which one is loaded in place.

        They are the same ones whether spikes are judged or not, so that this can change when a run is resumed.
        """
        return {
            "skipped": self.skipped,
            "in_row": self.in_row,
            "recent": self._level.recent,
            "recorded": self._level.recorded,
        }

    def before_forward(self) -> None:
        """Remembers the buffers; once before each step's first forward pass."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            saved.copy_(buffer)
        self._share = 0

    @torch.no_grad()
    def next_share(self) -> None:
        """Takes the buffers of the share that ended, and puts the remembered ones back for the next.

        Raises:
            RuntimeError: no further share is expected.
        """
        if self._share is None or self._share + 1 >= self._shares or self._averaged is None:
            raise RuntimeError(f"StepGuard.next_share() belongs between the {self._shares} share(s) of a step")
        self._averaged.take(first=self._share == 0)
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        self._share += 1

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> None:
        """One step of the optimiser with the gradients at hand, or none. The gradients are clipped in place.

        Args:
            loss: this rank's loss of the step, a scalar, the mean over its shares; None: it is not judged.

        Raises:
            RuntimeError: no parameter has a gradient, `before_forward` was not called since the last step, or a share
                is missing.
        """
        if self._share is None:
            raise RuntimeError("StepGuard.before_forward() must be called before the forward pass of each step")
        if self._share + 1 != self._shares:
            raise RuntimeError(f"StepGuard.step() after {self._share + 1} of {self._shares} shares")
        norm = self._norm()
        if self._averaged is not None:
            loss = self._averaged.finish(self._share + 1, loss, self._mean)
        self._share = None
        good = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
        if self._sigmas > 0:
            good = self._level.judge(loss, norm, good, self._sigmas)
        self.grad_norm.copy_(norm)
        self.found_inf.copy_(~good)
        self.skipped.add_(~good)
        self.in_row.add_(1).mul_(~good)
        if self._clip_norm > 0:
            self._scale.copy_(torch.where(good, (norm / self._clip_norm).clamp(min=1.0), 1.0))
        self._optimizer.step()
        self._put_back(good)

    def _put_back(self, good: Tensor) -> None:
        """The remembered buffers come back if the step was skipped; good: bool scalar."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(good, buffer, saved))

    def _norm(self) -> Tensor:
        grads = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise RuntimeError("StepGuard.step() found no gradient: call it after the backward pass")
        norm = get_total_norm(grads, foreach=True)
        if hasattr(norm, "full_tensor"):  # a DTensor, asked without the seconds that importing its class takes
            norm = norm.full_tensor()
        return norm


class _Averaged:
    """The mean of buffers over shares and ranks, and of the loss over ranks, in one vector for one collective.

    Integers (BatchNorm's number of batches) are the same in every share and on every rank, and are left alone.

    Args:
        buffers: the vector is of float32, or of float64 if one of them is; each is read and written in its own type.
    """

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, (buffer.dtype for buffer in self._buffers), torch.float32)
        sizes = [buffer.numel() for buffer in self._buffers]
        self._flat = torch.zeros(sum(sizes) + 1, dtype=dtype, device=device)
        parts = self._flat[:-1].split(sizes)
        self._views = [part.view(buffer.shape) for part, buffer in zip(parts, self._buffers, strict=True)]

    def take(self, first: bool) -> None:
        """Add the buffers of a share to those of the shares before it."""
        if not self._buffers:
            return
        if first:
            torch._foreach_copy_(self._views, self._buffers)
        else:
            torch._foreach_add_(self._views, self._buffers)

    def finish(self, shares: int, loss: Tensor | None, mean: Callable[[Tensor], None] | None) -> Tensor | None:
        """Take the last share, write the means into the buffers and return that of the loss, if there is one."""
        self.take(first=shares == 1)
        if shares > 1:
            self._flat.div_(shares)
        if loss is not None:
            self._flat[-1].copy_(loss)
        if mean is not None:
            mean(self._flat)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._views)
        return None if loss is None else self._flat[-1]


class _Level:
    """Loss and gradient norm of the last steps, and whether new ones lie far above them.

    A spike is recorded too: so a level that stays is soon no spike any more. As OLMo-core's SkipStepOptimizer has it.

    Args:
        window: how many steps are kept.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self._window = window
        self.recent = torch.zeros(2, window, dtype=torch.float64, device=device)
        """Losses and norms, of which the oldest is overwritten next; float64, in which float32's squares are finite."""
        self.recorded = torch.zeros(2, 1, dtype=torch.int64, device=device)
        """How many of each were ever recorded."""
        self._slots = torch.arange(window, device=device)

    def judge(self, loss: Tensor | None, norm: Tensor, finite: Tensor, sigmas: float) -> Tensor:
        """Whether a step is finite and no spike; a finite one is recorded.

        Args:
            loss, norm, finite: scalars.
            sigmas: standard deviations above the mean that make a spike.
        """
        known = self.recorded.clamp(max=self._window)  # [2, 1]
        inside = self._slots < known  # [2, window]
        mean = torch.where(inside, self.recent, 0.0).sum(1, keepdim=True) / known.clamp(min=1)
        squares = torch.where(inside, self.recent - mean, 0.0).square()
        deviation = (squares.sum(1, keepdim=True) / (known - 1).clamp(min=1)).sqrt()
        absent = torch.full_like(norm, math.nan)
        values = torch.stack([(absent if loss is None else loss).double(), norm.double()])[:, None]  # [2, 1]
        spikes = (2 * known >= self._window) & (values > mean + sigmas * deviation)
        self._record(values, finite & torch.isfinite(values))
        return finite & ~spikes.any()

    def _record(self, values: Tensor, wanted: Tensor) -> None:
        """values, wanted: [2, 1]."""
        slot = self.recorded % self._window
        self.recent.scatter_(1, slot, torch.where(wanted, values, self.recent.gather(1, slot)))
        self.recorded.add_(wanted)
