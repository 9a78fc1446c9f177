"""One optimiser step of a method, in two halves: what depends on the step's number, and what a graph can hold."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ssr_fast.data.batch import Batch
from ssr_fast.engine.deterministic import only_deterministic
from ssr_fast.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from ssr_fast.engine.parallel import Wrapped
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.step_guard import GuardConfig, StepGuard
from ssr_fast.methods.method import Method, step_key


class TrainStep:
    """A method's step: its micro-batches' losses and backward passes, guarded optimiser, refreshed working copies.

    What a step does is a function of its micro-batches, however many processes share them: number k of a process draws
    its random numbers as k of `optim.accumulate` x (number of processes) would.

    Args:
        method: the nets and their loss, on their device and in their precision; or as `wrap` has given it.
        optim: the optimiser, its schedule, and the number of micro-batches.
        steps: the run's number of steps.
        guard: which steps are skipped.
        ranks: the processes that train together.
        deterministic: computed by deterministic kernels alone, see engine/deterministic.py.
    """

    def __init__(
        self,
        method: Method | Wrapped,
        optim: OptimConfig,
        steps: int,
        guard: GuardConfig | None = None,
        ranks: Ranks | None = None,
        deterministic: bool = False,
    ) -> None:
        self.wrapped = method if isinstance(method, Wrapped) else Wrapped(method)
        self.method, self.optim, self.steps = self.wrapped.method, optim, steps
        self.ranks, self.deterministic = ranks or Ranks(), deterministic
        self.optimizer = build_optimizer(self.method.trainable(), optim)
        self.guard = StepGuard(
            self.optimizer,
            list(statistics(self.method)),
            optim.clip_norm,
            shares=optim.accumulate,
            mean=self.ranks.mean_ if self.ranks.world > 1 else None,
            config=guard or GuardConfig(),
        )
        self.keys = torch.zeros(optim.accumulate, dtype=torch.int64, device=self.method.key.device)
        self.rate = 0.0
        """The backbone's learning rate in the last step."""
        # AdamW tells whoever could capture its step and does not; here `graphs` decides that
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Step number `step`, counted from 0.

        Args:
            batch: the step's micro-batches, one behind another, on the method's device.

        Returns:
            the terms for the log, scalars on the device, to be read before the next step.
        """
        self.begin(step)
        return self.compute(batch, self.method.begun(step))

    def begin(self, step: int) -> None:
        """Write the learning rate, the average and the random numbers' keys of a step into their tensors."""
        self.rate = learning_rate(step, self.optim, self.steps)
        set_learning_rate(self.optimizer, self.rate)
        first = self.ranks.rank * self.optim.accumulate
        for share in range(self.optim.accumulate):
            self.keys[share].fill_(step_key(self.method.seed, step, first + share))
        self.method.begin(step)

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """The step that `begin` has prepared. No number of the host enters, so that a graph of it serves many steps."""
        with only_deterministic(self.deterministic):
            return self._compute(batch, begun)

    def _compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        self.guard.before_forward()
        found = []
        for share, part in enumerate(batch.split(self.optim.accumulate)):
            if share > 0:
                self.guard.next_share()
            with self.wrapped.share(last=share == self.optim.accumulate - 1):
                self.method.draw(self.keys[share])
                terms = self.wrapped(part, begun)
                self.backward(terms["loss"])
            self.method.hand_over()
            found.append({**terms, "loss": terms["loss"].detach()})
        self.wrapped.reduce()
        terms = _mean(found)
        self.guard.step(terms["loss"])
        self.method.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        guard = {"skipped": self.guard.skipped, "skipped_in_row": self.guard.in_row}
        return {**terms, "grad_norm": self.guard.grad_norm, **guard}

    def backward(self, loss: Tensor) -> None:
        """The only backward pass of a micro-batch."""
        (loss / self.optim.accumulate if self.optim.accumulate > 1 else loss).backward()

    def abandon(self) -> None:
        """Forget what a `compute` that raised has left behind; nets and optimiser are as `begin` left them."""
        for parameter in self.method.parameters():
            parameter.grad = None


def statistics(method: Method) -> Iterator[Tensor]:
    """Running statistics that a forward pass changes, of the student and of a teacher; working copies share them."""
    found: dict[int, Tensor] = {}
    for module in method.modules():
        if isinstance(module, _BatchNorm):
            found.update((id(buffer), buffer) for buffer in module.buffers(recurse=False))
    yield from found.values()


def _mean(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of a step: the means of its micro-batches'."""
    if len(found) == 1:
        return found[0]
    return {name: torch.stack([terms[name] for terms in found]).mean(0) for name in found[0]}
