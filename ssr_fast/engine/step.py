"""One optimiser step of a method, in two halves: what depends on the step's number, and what a graph can hold."""

import warnings
from collections.abc import Iterator

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ssr_fast.data.batch import Batch
from ssr_fast.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from ssr_fast.engine.step_guard import StepGuard
from ssr_fast.methods.method import Method


class TrainStep:
    """A method's step: loss, one backward pass, guarded optimiser, refreshed working copies.

    Args:
        method: the nets and their loss, on their device and in their precision.
        optim: the optimiser and its schedule.
        steps: the run's number of steps.
    """

    def __init__(self, method: Method, optim: OptimConfig, steps: int) -> None:
        self.method, self.optim, self.steps = method, optim, steps
        self.optimizer = build_optimizer(method.trainable(), optim)
        self.guard = StepGuard(self.optimizer, list(statistics(method)), optim.clip_norm)
        self.rate = 0.0
        """The backbone's learning rate in the last step."""
        # AdamW tells whoever could capture its step and does not; here `graphs` decides that
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Step number `step`, counted from 0.

        Args:
            batch: on the method's device.

        Returns:
            the terms for the log, scalars on the device, to be read before the next step.
        """
        self.begin(step)
        return self.compute(batch, self.method.begun(step))

    def begin(self, step: int) -> None:
        """Write the learning rate, the average and the random numbers' key of a step into their tensors."""
        self.rate = learning_rate(step, self.optim, self.steps)
        set_learning_rate(self.optimizer, self.rate)
        self.method.begin(step)

    def compute(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """The step that `begin` has prepared. No number of the host enters, so that a graph of it serves many steps."""
        self.guard.before_forward()
        terms = self.method.compute(batch, begun)
        self.backward(terms["loss"])
        self.method.hand_over()
        self.guard.step()
        self.method.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"] = terms["loss"].detach()
        return {**terms, "grad_norm": self.guard.grad_norm, "skipped": self.guard.skipped}

    def backward(self, loss: Tensor) -> None:
        """The step's only backward pass."""
        loss.backward()

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
