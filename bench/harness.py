"""One benchmark: every provider of a task on every case, side by side in one run, against the float64 definition.

A provider that cannot run is listed with its reasons; one that raises, or whose result is wrong, is marked in its row.
Nothing here is predicted: the floor is the one computed column, from peaks that were measured in the same run.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import measure
from .device import check_device, is_lost
from .limits import CaseLimit
from .measure import Peaks, Timing

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest ||out - ref|| / ||ref|| of a right result, by the dtype of the operands."""

EAGER = "eager"
"""The provider whose error, in the same precision, stands beside each provider's own."""

COMPILED = "torch.compile"

Outputs = dict[str, Tensor]
"""The loss under "loss" and each leaf's gradient under the leaf's name."""


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure."""

    device: torch.device
    quick: bool = False
    """Fewer cases and repetitions, for tests and for a first look."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case."""

    leaves: dict[str, Tensor]
    """Each requires a gradient."""
    constants: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.leaves.values(), *self.constants.values()]


@dataclass(frozen=True)
class Work:
    """What forward and backward together must do: bytes of memory traffic and floating point operations."""

    bytes: int
    flops: int

    def microseconds(self, peaks: Peaks) -> float:
        """The least time at the device's peaks: the longer of traffic and arithmetic."""
        return 1e6 * max(self.bytes / peaks.bytes_per_second, self.flops / peaks.flops_per_second)


@dataclass(frozen=True)
class Case:
    """One size of a benchmark's task."""

    name: str
    sizes: dict[str, Any]
    """What the name says, for JSON."""
    dtype: torch.dtype
    make: Callable[[torch.device, int], Inputs]
    """(device, seed) -> inputs."""
    exact: Callable[[Inputs], Outputs]
    """The definition of the task in float64, on the inputs' device."""
    floor: Work
    """What "% of floor" refers to; the benchmark's file says which traffic it counts."""
    least: Work
    """Compulsory work: each operand read once, each result written once. No kernel can be faster."""


@dataclass(frozen=True)
class Task:
    """A case with its inputs: what a provider is asked to run."""

    case: Case
    inputs: Inputs
    setting: Setting


@dataclass(frozen=True)
class Pair:
    """What is timed."""

    forward: Callable[[], Tensor]
    """The loss, ready for backward."""
    both: Callable[[], Outputs]
    """Forward and backward."""


def by_autograd(loss: Callable[[], Tensor], inputs: Inputs) -> Pair:
    """The pair of a loss that autograd differentiates; gradients are fresh tensors in each call."""

    def both() -> Outputs:
        value = loss()
        gradients = torch.autograd.grad(value, list(inputs.leaves.values()))
        return {"loss": value.detach(), **dict(zip(inputs.leaves, gradients, strict=True))}

    return Pair(loss, both)


def nothing_against(task: Task) -> list[str]:
    """The reasons of a provider that runs everywhere."""
    return []


@dataclass(frozen=True)
class Provider:
    """One implementation of a benchmark's task."""

    name: str
    build: Callable[[Task], Pair]
    reasons: Callable[[Task], list[str]] = nothing_against
    """Why it cannot run this task here, a sentence each."""
    graph_reasons: tuple[str, ...] = ()
    """Why it cannot be captured in a CUDA graph at all."""
    hook_reasons: tuple[str, ...] = ()
    """Why saved-tensor hooks cannot see what it keeps for backward."""
    ours: bool = False
    """Native code of this project: bench.sanitize runs it, goals are set for it."""


@dataclass(frozen=True)
class Bench:
    """A task, its sizes and its implementations."""

    name: str
    about: str
    cases: Callable[[Setting], list[Case]]
    providers: tuple[Provider, ...]
    odd_cases: Callable[[Setting], list[Case]]
    """Small cases whose sizes fit no block, for bench.sanitize."""
    goals: "Callable[[Case, dict[str, Row]], list[str]]" = lambda case, rows: []
    """On a GPU: a line for each goal of a case, reached or not, from the rows by provider."""


Status = Literal["ok", "wrong", "error", "skipped"]


@dataclass
class Row:
    """What was measured of one provider on one case; None: not measured, `notes` says why. Times in microseconds."""

    bench: str
    case: str
    sizes: dict[str, Any]
    dtype: str
    provider: str
    status: Status = "ok"
    reasons: list[str] = field(default_factory=list)
    """Why it was skipped, or what is wrong with its result."""
    error: str | None = None
    """The exception that it raised."""
    forward_us: Timing | None = None
    both_us: Timing | None = None
    graph_us: Timing | None = None
    launches: int | None = None
    """CUDA kernels of one forward and backward."""
    peak_bytes: int | None = None
    """Most memory in use in forward and backward, above the inputs; the gradients are in it."""
    saved_bytes: int | None = None
    """Held from forward to backward, the inputs not counted."""
    floor_us: float | None = None
    floor_percent: float | None = None
    """Floor over graph replay, or over forward and backward where there is no graph."""
    least_us: float | None = None
    """Time of the compulsory work alone, see Case.least."""
    errors: dict[str, float] = field(default_factory=dict)
    """||out - ref|| / ||ref|| of the loss and of each gradient."""
    eager_errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "error")


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| in float64; infinite for another shape or anything that is not finite."""
    if out.shape != exact.shape:
        return math.inf
    difference = torch.linalg.vector_norm(out.detach().double() - exact)
    error = float(difference / torch.linalg.vector_norm(exact).clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def judge(row: Row, outputs: Outputs, exact: Outputs, dtype: torch.dtype, what: str = "") -> None:
    """Enter the errors of `outputs` (the worse of these and of earlier ones); beyond the bound the row is wrong."""
    for name, reference in exact.items():
        error = relative_error(outputs[name], reference) if name in outputs else math.inf
        row.errors[name] = max(error, row.errors.get(name, 0.0))
        if not error <= BOUNDS[dtype]:
            row.status = "wrong"
            row.reasons.append(f"{what}{name} is off by {error:.1e} (bound {BOUNDS[dtype]:.0e})")


def run(
    bench: Bench,
    setting: Setting,
    peaks: Peaks | None,
    report: Callable[[Case, list[Row]], None],
    seconds: float = math.inf,
    progress: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> list[Row]:
    """Measure all providers on all cases.

    Args:
        bench: what to measure.
        setting: the device, and whether to be quick.
        peaks: the device's, for the floor; None: there is no floor.
        report: called with each case's rows as soon as it is done.
        seconds: no case is begun that would not end within these, if it took as long as the longest so far.
        progress: on a GPU called with the rows of a case that are measured, after each.

    Returns:
        rows, case by case, in the order of the providers.

    Raises:
        DeviceLost: a case has broken the context; its rows have been reported.
    """
    rows: list[Row] = []
    limit = CaseLimit(seconds)
    for number, case in enumerate(bench.cases(setting)):
        if not limit.another():
            break
        done = run_case(bench, case, setting, peaks, number, partial(progress, case))
        report(case, done)
        rows += done
        check_device(setting.device)
    return rows


def run_case(
    bench: Bench,
    case: Case,
    setting: Setting,
    peaks: Peaks | None,
    seed: int,
    progress: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure all providers on one case; see `run`."""
    if "torch._dynamo" in sys.modules:  # a second size must not make torch.compile generate code for any size
        torch.compiler.reset()
    task = Task(case, case.make(setting.device, seed), setting)
    exact = case.exact(task.inputs)
    rows = [Row(bench.name, case.name, case.sizes, str(case.dtype), provider.name) for provider in bench.providers]
    able = [
        (row, provider) for row, provider in zip(rows, bench.providers, strict=True) if _can_run(row, provider, task)
    ]
    if setting.device.type == "cuda":
        broke, measured = "", list[Row]()
        # what takes the longest comes last: a run that is cut off there has the others
        for row, provider in sorted(able, key=lambda pair: pair[1].name == COMPILED):
            if broke:
                row.status, row.reasons = "skipped", [f"{broke} broke the device's context"]
            elif not _guarded(row, partial(_measure_gpu, row, provider, task, exact)) and is_lost(setting.device):
                broke = provider.name
            measured.append(row)
            progress(measured)
    else:
        _measure_cpu(able, task, exact)
    eager = next((row.errors for row in rows if row.provider == EAGER), {})
    for row, _ in able:
        row.eager_errors = dict(eager)
        _enter_floor(row, case, peaks)
    return rows


def _can_run(row: Row, provider: Provider, task: Task) -> bool:
    try:
        row.reasons = provider.reasons(task)
    except Exception as error:
        row.status, row.error = "error", describe(error)
        return False
    if row.reasons:
        row.status = "skipped"
    return not row.reasons


def _guarded(row: Row, work: Callable[[], None]) -> bool:
    """Do `work`; what it raises is entered into the row. Returns whether it raised nothing."""
    try:
        work()
    except Exception as error:  # the row shows it and the exit code tells; the others are still measured
        row.status, row.error = "error", describe(error)
        return False
    return True


def describe(error: Exception) -> str:
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _measure_gpu(row: Row, provider: Provider, task: Task, exact: Outputs) -> None:
    """Correctness first, then counts and memory, then the times; what raises leaves what came before it."""
    pair, dtype = provider.build(task), task.case.dtype
    pair.both()  # compiles what is compiled on first use
    measure.poison(sum(tensor.nbytes for tensor in task.inputs.tensors()), task.setting.device)
    judge(row, pair.both(), exact, dtype)
    _enter_saved_bytes(row, provider, pair, task)
    row.peak_bytes = measure.peak_bytes(pair.both)
    row.launches, why = measure.launches(pair.both)
    if why:
        row.notes["launches"] = why
    row.forward_us = measure.time_gpu(pair.forward)
    row.both_us = measure.time_gpu(pair.both)
    if provider.graph_reasons:
        row.notes["graph"] = "; ".join(provider.graph_reasons)
        return
    graph, outputs = measure.capture(pair.both)
    for output in outputs.values():
        output.fill_(math.nan)
    graph.replay()
    judge(row, outputs, exact, dtype, "in graph replay ")
    row.graph_us = measure.time_gpu(graph.replay)


def _measure_cpu(able: Sequence[tuple[Row, Provider]], task: Task, exact: Outputs) -> None:
    """Correctness and saved bytes of each provider, then the times, one repetition of each provider after another."""
    pairs: list[tuple[Row, Pair]] = []
    for row, provider in able:

        def prepare(row: Row = row, provider: Provider = provider) -> None:
            pair = provider.build(task)
            judge(row, pair.both(), exact, task.case.dtype)
            _enter_saved_bytes(row, provider, pair, task)
            row.notes["graph, launches, peak memory"] = "measured on a GPU only"
            pairs.append((row, pair))

        _guarded(row, prepare)
    samples: dict[str, tuple[list[float], list[float]]] = {row.provider: ([], []) for row, _ in pairs}
    for _ in measure.rounds(0.5 if task.setting.quick else 3.0):
        for row, pair in pairs:
            if row.status == "error":
                continue
            forward, both = samples[row.provider]
            _guarded(row, partial(_sample, pair, forward, both))
    for row, _ in pairs:
        if row.status != "error":
            row.forward_us, row.both_us = (Timing.of(values) for values in samples[row.provider])


def _sample(pair: Pair, forward: list[float], both: list[float]) -> None:
    forward.append(measure.seconds(pair.forward))
    both.append(measure.seconds(pair.both))


def _enter_saved_bytes(row: Row, provider: Provider, pair: Pair, task: Task) -> None:
    if provider.hook_reasons:
        row.notes["saved bytes"] = "; ".join(provider.hook_reasons)
    else:
        row.saved_bytes = measure.saved_bytes(pair.forward, task.inputs.tensors())


def _enter_floor(row: Row, case: Case, peaks: Peaks | None) -> None:
    if peaks is None:
        row.notes["floor"] = "only on a GPU: the small cases of a CPU stay in its caches"
        return
    row.floor_us, row.least_us = case.floor.microseconds(peaks), case.least.microseconds(peaks)
    time = row.graph_us or row.both_us
    if time:
        row.floor_percent = 100 * row.floor_us / time.median


def speedup(rows: dict[str, Row], fast: str, slow: str, what: str = "both_us") -> float | None:
    """Median time of provider `slow` over that of `fast`, of forward and backward or of "graph_us", if both have it."""
    times: list[Timing] = [
        getattr(rows[name], what) for name in (slow, fast) if name in rows and getattr(rows[name], what)
    ]
    return times[0].median / times[1].median if len(times) == 2 else None


def by_case(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Row]]]:
    """(case, rows by provider), in the order of the rows."""
    for case in dict.fromkeys(row.case for row in rows):
        yield case, {row.provider: row for row in rows if row.case == case}
