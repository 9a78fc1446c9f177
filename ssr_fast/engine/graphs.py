"""A training step as a CUDA graph: thousands of kernels launched by one call of the host.

Kernels of a graph have their arguments frozen. So a step's number reaches them only through tensors (`TrainStep.begin`
writes those before each replay), the batch is copied into tensors that stay, and nothing may wait for the device.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_fast.data.batch import Batch
from ssr_fast.engine.step import TrainStep

WARM_UP = 3
"""Eager steps before the capture: they compile kernels, choose algorithms and let libraries allocate what they keep."""
DDP_WARM_UP = 11
"""The same under DistributedDataParallel, which rearranges its buckets and collects statistics in the first ten."""

Terms = dict[str, Tensor]
Capture = Callable[[Callable[[], Terms]], tuple[Callable[[], None], Terms]]
"""Records what a function does without doing it: (does it, what the function returned, written anew each time)."""


@dataclass(frozen=True)
class _Captured:
    """A graph, where it reads its batch and where it leaves its terms."""

    replay: Callable[[], None]
    batch: Batch
    terms: Terms


class GraphedStep:
    """Does what a TrainStep does, bit for bit: the first steps of a kind eagerly, the others by replaying a graph.

    The kind of a step is the shapes of its batch and whether the method has begun. Where a capture fails, the run goes
    on eagerly and the reason is reported.

    Args:
        step: the step.
        capture: what records it.
        eager: runs a function in the way in which `capture` will run it later.
        report: gets one line for each graph, or why there is none.
    """

    def __init__(
        self,
        step: TrainStep,
        capture: Capture,
        eager: Callable[[Callable[[], Terms]], Terms],
        report: Callable[[str], None] = print,
    ) -> None:
        self._step, self._capture, self._eager, self._report = step, capture, eager, report
        self._warm_up = DDP_WARM_UP if step.wrapped.mode == "ddp" else WARM_UP
        self._kind: Hashable = None
        self._eager_steps = 0
        self._captured: _Captured | None = None
        self._failed = False

    def __call__(self, batch: Batch, step: int) -> Terms:
        """See TrainStep; the terms are overwritten by the next call."""
        self._step.begin(step)
        begun = self._step.method.begun(step)
        kind = (begun, _shapes(batch))
        if kind != self._kind:
            self._kind, self._eager_steps, self._captured = kind, 0, None
        if self._captured is None and self._eager_steps >= self._warm_up and not self._failed:
            self._captured = self._try(batch, begun, step)
        if self._captured is None:
            self._eager_steps += 1
            return self._eager(lambda: self._step.compute(batch, begun))
        _copy(batch, self._captured.batch)
        self._captured.replay()
        return dict(self._captured.terms)

    def _try(self, batch: Batch, begun: bool, step: int) -> _Captured | None:
        """The graph of a step, or None and a line that says why."""
        kept = batch.each(Tensor.clone)
        try:
            replay, terms = self._capture(lambda: self._step.compute(kept, begun))
        except RuntimeError as error:
            self._failed = True
            self._step.abandon()
            first = str(error).strip().partition("\n")[0]
            self._report(
                f"no CUDA graph, every step is launched kernel by kernel: {first} (--run.graph off: not tried)"
            )
            return None
        self._report(f"{self._step.method.stage_name}: steps from {step + 1} on replay a CUDA graph")
        return _Captured(replay, kept, terms)


def on_cuda(step: TrainStep, device: torch.device, report: Callable[[str], None] = print) -> GraphedStep:
    """The step captured on a stream of its own of a GPU, on which its eager steps run too."""
    stream = torch.cuda.Stream(device)

    def eager(work: Callable[[], Terms]) -> Terms:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            terms = work()
        torch.cuda.current_stream(device).wait_stream(stream)
        return terms

    def capture(work: Callable[[], Terms]) -> tuple[Callable[[], None], Terms]:
        graph = torch.cuda.CUDAGraph()
        # only this thread's calls are judged: a loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            terms = work()
        return graph.replay, terms

    return GraphedStep(step, capture, eager, report)


def _shapes(batch: Batch) -> Hashable:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in batch.parts().items())


def _copy(batch: Batch, into: Batch) -> None:
    kept = into.parts()
    for name, tensor in batch.parts().items():
        kept[name].copy_(tensor, non_blocking=True)
