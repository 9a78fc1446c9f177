"""Ways to take the same step: the released loop, it with one lever after another, and ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bench import released
from bench.draws import CounterDraws, HostDraws
from ssr_fast.data.batch import Batch
from ssr_fast.engine.graphs import WARM_UP, on_cuda
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.parallel import wrap
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.self_training import SelfTraining

Step = Callable[[Batch, int], Mapping[str, float | Tensor]]
"""(batch, number of the step) -> terms of the log, "loss" among them."""
Report = Callable[[str], None]
Build = Callable[[SelfTraining, OptimConfig, int, Report], Step]
"""(method in float32 on its device, options, steps of the run, takes one-line messages) -> its step."""

GPU_ONLY = "timed on a GPU only"


def released_loop(
    method: SelfTraining, optim: OptimConfig, steps: int, report: Report, levers: int = 0, autocast: bool = False
) -> Step:
    """The released loop with the first `levers` levers pulled, on the random numbers of ours; see `as_released`."""
    step = released.ReleasedStep(method, optim, steps, released.LEVERS[:levers])
    step.draws = CounterDraws()
    return _Autocast(step) if autocast else step


class _Autocast:
    """The loop under autocast."""

    def __init__(self, step: released.ReleasedStep) -> None:
        self.step = step

    def __call__(self, batch: Batch, number: int) -> Mapping[str, float | Tensor]:
        with released.autocast(batch.source_image.device.type):
            return self.step(batch, number)


def as_released(step: Step) -> None:
    """From now on the released loop draws its random numbers itself, as it does when nobody compares."""
    inner = step.step if isinstance(step, _Autocast) else step
    if isinstance(inner, released.ReleasedStep):
        inner.draws = HostDraws()


def ours(
    method: SelfTraining,
    optim: OptimConfig,
    steps: int,
    report: Report,
    precision: str = "fp32",
    recompute: bool = False,
    compiled: bool = False,
    graph: bool = False,
) -> Step:
    """TrainStep."""
    wrap(method, RunConfig(recompute_blocks=recompute, compile_blocks=compiled), precision)
    step = TrainStep(method, optim, steps)
    return on_cuda(step, method.key.device, report) if graph else step


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    build: Build
    bfloat16: bool = False
    """Its activations are bfloat16: other bounds, another peak."""
    reason: str = ""
    """Why it does not run on a CPU; empty if it does."""
    judged: int = 2
    """Steps of which the losses are compared."""
    said: str = ""
    """A part of the message without which it did not do what it is named after."""


RELEASED, AUTOCAST = "released loop", "released loop, autocast"
ONE_PASS, BFLOAT16 = "one pass, one backward", "bf16"
GRAPH, COMPILED = "bf16, CUDA graph", "bf16, compiled blocks"

LOOP: dict[str, Variant] = {
    RELEASED: Variant(released_loop),
    AUTOCAST: Variant(partial(released_loop, autocast=True), bfloat16=True, reason=GPU_ONLY),
    **{lever: Variant(partial(released_loop, levers=number)) for number, lever in enumerate(released.LEVERS, start=1)},
}
"""The released loop, and it with the levers one after another, each with those before it."""

OURS: dict[str, Variant] = {
    ONE_PASS: Variant(ours),
    "blocks computed again": Variant(partial(ours, recompute=True)),
    BFLOAT16: Variant(partial(ours, precision="bf16"), bfloat16=True),
    "bf16, blocks computed again": Variant(partial(ours, precision="bf16", recompute=True), bfloat16=True),
    COMPILED: Variant(partial(ours, precision="bf16", compiled=True), bfloat16=True, reason=GPU_ONLY),
    **{
        name: Variant(
            partial(ours, precision="bf16", compiled=compiled, graph=True),
            bfloat16=True,
            reason=GPU_ONLY,
            judged=WARM_UP + 2,  # the eager steps, and two that replay
            said="replay a CUDA graph",
        )
        for name, compiled in ((GRAPH, False), (f"{COMPILED}, CUDA graph", True))
    },
}
"""Our step."""

VARIANTS = {**LOOP, **OURS}
