"""Ways to take the same step: the released loop, it with one lever after another, on transformers' net, and ours.

All of them for self-training, and with SAM online for SSR. Rows that torch.compile takes a minute for come last.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bench import released
from bench.draws import CounterDraws, HostDraws
from bench.huggingface import TransformersStep
from bench.released_ssr import ReleasedSsrStep
from ssr_fast.data.batch import Batch
from ssr_fast.engine.deterministic import prepare_deterministic
from ssr_fast.engine.graphs import WARM_UP, on_cuda
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.parallel import wrap
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.self_training import SelfTraining
from ssr_fast.methods.ssr import Ssr
from ssr_fast.models.sam import SHAPES

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
    return _on_our_numbers(released.ReleasedStep(method, optim, steps, released.LEVERS[:levers]), autocast)


def transformers_loop(
    method: SelfTraining, optim: OptimConfig, steps: int, report: Report, autocast: bool = False
) -> Step:
    """The same loop on transformers' Segformer."""
    return _on_our_numbers(TransformersStep(method, optim, steps), autocast)


def ssr_loop(
    method: SelfTraining,
    optim: OptimConfig,
    steps: int,
    report: Report,
    sam: str,
    autocast: bool = False,
    one_by_one: bool = False,
) -> Step:
    """The released loop with segment-anything's encoder (of SHAPES) on top; one_by_one: see ReleasedSsrStep."""
    assert isinstance(method, Ssr)
    return _on_our_numbers(ReleasedSsrStep(method, SHAPES[sam], optim, steps, one_by_one), autocast)


def _on_our_numbers(step: released.ReleasedStep, autocast: bool) -> Step:
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
    deterministic: bool = True,
) -> Step:
    """TrainStep, as the options of a run make it."""
    wrap(method, RunConfig(recompute_blocks=recompute, compile_blocks=compiled), precision)
    exactly = prepare_deterministic(deterministic, method.key.device)
    step = TrainStep(method, optim, steps, deterministic=exactly)
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
    needs: str = ""
    """A package without which it does not run."""

    def against(self, on_gpu: bool) -> str:
        """Why it does not run here; empty if it does."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed (the [dev] extra brings it)"
        return "" if on_gpu else self.reason


RELEASED, AUTOCAST = "released loop", "released loop, autocast"
TRANSFORMERS = "transformers' Segformer, plain loop"
ONE_PASS, BFLOAT16 = "one pass, one backward", "bf16"
GRAPH, COMPILED = "bf16, CUDA graph", "bf16, compiled blocks"
COMPILED_GRAPH = f"{COMPILED}, CUDA graph"

LOOP: dict[str, Variant] = {
    RELEASED: Variant(released_loop),
    AUTOCAST: Variant(partial(released_loop, autocast=True), bfloat16=True, reason=GPU_ONLY),
    **{lever: Variant(partial(released_loop, levers=number)) for number, lever in enumerate(released.LEVERS, start=1)},
}
"""The released loop, and it with the levers one after another, each with those before it."""

PLAIN: dict[str, Variant] = {
    TRANSFORMERS: Variant(transformers_loop, needs="transformers"),
    f"{TRANSFORMERS}, autocast": Variant(
        partial(transformers_loop, autocast=True), bfloat16=True, reason=GPU_ONLY, needs="transformers"
    ),
}
"""The released loop on transformers' Segformer."""


def _graphed(compiled: bool, deterministic: bool = True) -> Variant:
    return Variant(
        partial(ours, precision="bf16", compiled=compiled, graph=True, deterministic=deterministic),
        bfloat16=True,
        reason=GPU_ONLY,
        judged=WARM_UP + 2,  # the eager steps, and two that replay
        said="replay a CUDA graph",
    )


_LEAN: dict[str, Variant] = {
    GRAPH: _graphed(compiled=False),
    f"{GRAPH}, not deterministic": _graphed(compiled=False, deterministic=False),
    COMPILED: Variant(partial(ours, precision="bf16", compiled=True), bfloat16=True, reason=GPU_ONLY),
    COMPILED_GRAPH: _graphed(compiled=True),
}

OURS: dict[str, Variant] = {
    ONE_PASS: Variant(ours),
    "blocks computed again": Variant(partial(ours, recompute=True)),
    BFLOAT16: Variant(partial(ours, precision="bf16"), bfloat16=True),
    "bf16, blocks computed again": Variant(partial(ours, precision="bf16", recompute=True), bfloat16=True),
    **_LEAN,
}
"""Our step."""

VARIANTS = {**LOOP, **PLAIN, **OURS}


def ssr_variants(sam: str) -> dict[str, Variant]:
    """The rows with SAM online, of the same names where they are the same lever.

    Args:
        sam: one of SHAPES.
    """
    return {
        RELEASED: Variant(partial(ssr_loop, sam=sam)),
        AUTOCAST: Variant(partial(ssr_loop, sam=sam, autocast=True), bfloat16=True, reason=GPU_ONLY),
        ONE_PASS: VARIANTS[ONE_PASS],
        BFLOAT16: VARIANTS[BFLOAT16],
        **{name: VARIANTS[name] for name in _LEAN},
    }


def variants_of(sam: str) -> dict[str, Variant]:
    """The rows with SAM of that name online, or, where it is empty, without SAM."""
    return ssr_variants(sam) if sam else VARIANTS


def reference_of(sam: str) -> Build:
    """The loop whose losses are right: the released one."""
    return partial(ssr_loop, sam=sam, one_by_one=True) if sam else LOOP[RELEASED].build
