"""The instruments of `bench step`: verdicts, times, images a second, memory and utilisation of each row."""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import torch

from bench import measure
from bench.harness import Setting, Status, describe
from bench.measure import Timing
from bench.peaks import Peak
from bench.variants import LOOP, RELEASED, VARIANTS, Step, Variant, as_released
from bench.workload import STEPS, Workload
from ssr_fast.data.batch import Batch

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a right row's losses from the released loop's, by the row's activations."""
GPU_SECONDS, CPU_SECONDS = 5.0, 60.0
"""Time for a row's measurement on a GPU, and for that of all rows on a CPU."""
WARM_UP = 5

METHOD = {
    "gpu": "row by row; CUDA events at the borders of consecutive steps, host and device overlapping as in training; "
    "a row's first steps (those that are judged, and warm-up) are not in it; median and p20/p80",
    "cpu": "time.perf_counter of whole steps, one thread, the rows' steps in turn so that pairs share the machine's "
    "state; median and p20/p80",
    "images_per_second": "images that the student sees, B of the source and B mixed ones, over the median time",
    "mfu": "FLOPs of a step over the median time and the device's dense peak for the row's products (bench/peaks.py); "
    "the FLOPs are those that the ledger counts while our float32 step runs, the same for every row: what a row "
    "computes twice does not count",
    "peak_bytes": "on a GPU torch.cuda.max_memory_allocated of everything that the row does, nets, optimiser and graph "
    "included; on a CPU the most that torch's CPU allocator hands out in a step above its beginning, from the "
    "profiler's memory events (libraries' own scratch memory is not in it)",
    "loss_error": "largest relative difference of a loss from the released loop's in the judged steps (the first "
    "ones), which get the same random numbers; float32 rows with TF32 off",
    "draws": "the timed steps of the released loop draw their random numbers themselves, as it does",
    "precision": "float32 rows are timed with TF32 products on a GPU",
}
"""How each column comes about, for the JSON."""


@dataclass
class Row:
    """What was measured of one way to take a step; None: not measured."""

    size: str
    name: str
    precision: str
    """Of the products in the timed steps: fp32, tf32 or bf16."""
    status: Status = "ok"
    reasons: list[str] = field(default_factory=list)
    """Why it was skipped, or what is wrong with it."""
    error: str | None = None
    step_us: Timing | None = None
    samples: int = 0
    """Steps that were timed."""
    images_per_second: float | None = None
    speedup: float | None = None
    """Median time of the released loop over this row's."""
    peak_bytes: int | None = None
    mfu: float | None = None
    """Percent."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """Of the judged steps."""
    loss_error: float | None = None
    bound: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "error")


class Comparison:
    """All rows of one size.

    Args:
        workload: what the steps work on.
        names: of VARIANTS.
        setting: device and thoroughness.
        peak: the device's, or None.
    """

    def __init__(self, workload: Workload, names: Sequence[str], setting: Setting, peak: Peak | None) -> None:
        self.workload, self.setting, self.peak, self.device = workload, setting, peak, setting.device
        self.batches = [batch.to(self.device) for batch in workload.batches]
        self.on_gpu = self.device.type == "cuda"
        self.rows = {name: Row(workload.name, name, self._precision(VARIANTS[name])) for name in names}
        self.flops = workload.flops(self.device)

    def run(self) -> list[Row]:
        """Judge and time every row that runs here."""
        judged = max(VARIANTS[name].judged for name in self.rows)
        expected = self._losses(LOOP[RELEASED].build(self._method(), self.workload.optim, STEPS, print), judged)
        ready: list[tuple[Row, Step]] = []
        for name, row in self.rows.items():
            variant = VARIANTS[name]
            if variant.reason and not self.on_gpu:
                row.status, row.reasons = "skipped", [variant.reason]
            elif step := self._ready(row, variant, expected):
                ready.append((row, step))
        if ready:
            self._time_in_turns(ready)
        for row in self.rows.values():
            self._enter_rates(row)
        return list(self.rows.values())

    def _ready(self, row: Row, variant: Variant, expected: Sequence[dict[str, float]]) -> Step | None:
        """Build and judge a row; on a GPU time it too, its nets alone on the device, and on a CPU return its step."""
        try:
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            step = variant.build(self._method(), self.workload.optim, STEPS, row.notes.append)
            row.losses = self._losses(step, variant.judged)
            judge(row, expected, BOUNDS["bf16" if variant.bfloat16 else "fp32"])
            if variant.said and not any(variant.said in note for note in row.notes):
                row.status, row.reasons = "error", [*row.reasons, *row.notes]
            as_released(step)
            if self.on_gpu:
                _allow_tf32(row.precision == "tf32")
                self._time_on_gpu(row, step)
                row.peak_bytes = torch.cuda.max_memory_allocated(self.device)
                return None
            row.peak_bytes = cpu_peak_bytes(step, self.batches[0], WARM_UP)
            return step
        except torch.OutOfMemoryError as error:
            row.status, row.reasons = "skipped", [f"out of memory: {describe(error)}"]
        except Exception as error:  # the row shows it and the exit code tells; the others are still measured
            row.status, row.error = "error", describe(error)
        finally:
            _allow_tf32(False)
        return None

    def _method(self) -> Any:
        _allow_tf32(False)
        return self.workload.method(self.device)

    def _losses(self, step: Step, steps: int) -> list[dict[str, float]]:
        """The losses of the first steps."""
        return [loss_terms(step(self.batches[number % len(self.batches)], number)) for number in range(steps)]

    def _time_on_gpu(self, row: Row, step: Step) -> None:
        number = count(len(row.losses))
        for _ in range(WARM_UP):
            step(self.batches[0], next(number))
        torch.cuda.synchronize(self.device)
        events, started = [_event()], time.perf_counter()
        least, budget = (5, 1.0) if self.setting.quick else (20, GPU_SECONDS)
        while len(events) <= least or (time.perf_counter() - started < budget and len(events) <= 200):
            place = next(number)
            step(self.batches[place % len(self.batches)], place)
            events.append(_event())
        torch.cuda.synchronize(self.device)
        times = [first.elapsed_time(last) / 1e3 for first, last in pairwise(events)]
        row.step_us, row.samples = Timing.of(times), len(times)

    def _time_in_turns(self, ready: Sequence[tuple[Row, Step]]) -> None:
        """A step of each row after another, so that what else the machine does meets them alike."""
        samples: dict[str, list[float]] = {row.name: [] for row, _ in ready}
        least, budget = (3, 1.0) if self.setting.quick else (10, CPU_SECONDS)
        for turn in measure.rounds(budget, least):
            batch, number = self.batches[turn % len(self.batches)], WARM_UP + 1 + turn
            for row, step in ready:

                def work(step: Step = step, batch: Batch = batch, number: int = number) -> object:
                    return step(batch, number)

                taken = measure.seconds(work)
                if turn > 0:  # the first one finds cold caches
                    samples[row.name].append(taken)
        for row, _ in ready:
            row.step_us, row.samples = Timing.of(samples[row.name]), len(samples[row.name])

    def _enter_rates(self, row: Row) -> None:
        if row.step_us is None:
            return
        seconds = row.step_us.median / 1e6
        row.images_per_second = self.workload.images / seconds
        base = self.rows.get(RELEASED)
        row.speedup = base.step_us.median / row.step_us.median if base and base.step_us else None
        if self.peak is not None:
            row.mfu = 100 * self.flops / seconds / float(getattr(self.peak, row.precision))

    def _precision(self, variant: Variant) -> str:
        return "bf16" if variant.bfloat16 else "tf32" if self.on_gpu else "fp32"


def loss_terms(terms: Mapping[str, Any]) -> dict[str, float]:
    """The losses among a step's terms, as numbers."""
    return {name: float(terms[name]) for name in sorted(terms) if name.startswith("loss")}


def judge(row: Row, expected: Sequence[dict[str, float]], bound: float) -> None:
    """Enter the largest relative difference of "loss" and its large parts; beyond the bound the row is wrong."""
    row.bound, row.loss_error = bound, 0.0
    for found, right in zip(row.losses, expected, strict=False):
        # the distance starts at nearly nothing, its own relative error says nothing; "loss" contains it
        for name in ("loss", "loss/source", "loss/mixed"):
            error = abs(found[name] - right[name]) / (abs(right[name]) or 1.0)
            row.loss_error = max(row.loss_error, error if math.isfinite(error) else math.inf)
    if not row.loss_error <= bound:
        row.status = "wrong"
        row.reasons.append(f"a loss is off by {row.loss_error:.1e} from the released loop's (bound {bound:.0e})")


def cpu_peak_bytes(step: Step, batch: Batch, number: int) -> int | None:
    """See METHOD; None where the profiler saw no allocation. Runs step number `number`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(batch, number)
    results = profiler.profiler.kineto_results if profiler.profiler else None
    held = most = 0
    events = [event for event in results.events() if event.name() == "[memory]"] if results else []
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most or None


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
