"""The instruments of `bench step`: verdicts, times, images a second, memory and utilisation of each row."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import Any

import torch

from bench import measure
from bench.harness import Setting, Status, describe
from bench.measure import Timing
from bench.peaks import Peak
from bench.variants import RELEASED, Step, Variant, as_released, reference_of, variants_of
from bench.workload import STEPS, Workload
from ssr_fast.data.batch import Batch

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a right row's losses from the released loop's, by the row's activations."""
GPU_SECONDS, CPU_SECONDS = 5.0, 60.0
"""Time for a row's measurement on a GPU, and for that of all rows on a CPU."""
WARM_UP = 5
JUDGED = ("loss", "loss/source", "loss/mixed", "loss/cosine")
"""Losses that are compared, those that a step has. The distance starts at nearly nothing, so that its own relative
error says nothing; "loss" contains it."""
LEFT_OVER = 256 * 2**20
"""Bytes of an earlier row that a row may find on the GPU; libraries keep workspaces of tens of MB."""

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
    "seconds": "all that a row took: building, judged steps, compilation, warm-up, timed steps; the first row's "
    "with the steps by which all are judged",
    "transformers": "transformers' SegformerModel with our weights under our DAFormer head, its default attention, "
    "torch.optim.AdamW as it comes, else the released loop; its LayerNorm's eps set to MiT's, its stochastic depth on "
    "the loop's random numbers, so that its losses are those of the released loop",
    "sam": "SAM on source and mixed images in each step, random weights; the released loop has segment-anything's "
    "encoder, a projection, a resized feature and a cosine at each of five points in eager PyTorch; ours has our own. "
    "The encoder's FLOPs are those of attention as wide as its heads",
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
    seconds: float | None = None
    """All that the row took; on a CPU without the timed steps, which the rows take in turn."""
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
        names: of its variants; all of them if None.
        setting: device and thoroughness.
        peak: the device's, or None.
        deadline: of time.monotonic; rows that would begin later are skipped.
    """

    def __init__(
        self,
        workload: Workload,
        names: Sequence[str] | None,
        setting: Setting,
        peak: Peak | None,
        deadline: float = math.inf,
    ) -> None:
        self.workload, self.setting, self.peak, self.device = workload, setting, peak, setting.device
        self.deadline = deadline
        self.flops: int | None = None
        """Of a step, counted before the first row that runs; None before, and where it could not be counted."""
        self._counted = False
        self.batches = [batch.to(self.device) for batch in workload.batches]
        self.on_gpu = self.device.type == "cuda"
        self.variants = variants_of(workload.sam)
        self.rows = {
            name: Row(workload.name, name, precision_of(self.variants[name], self.on_gpu))
            for name in names or self.variants
        }

    @cached_property
    def expected(self) -> list[dict[str, float]]:
        """The released loop's losses, for as many steps as a row that runs here is judged by."""
        able = [variant for variant in map(self.variants.__getitem__, self.rows) if not variant.against(self.on_gpu)]
        step = reference_of(self.workload.sam)(self._method(), self.workload.optim, STEPS, print)
        return self._losses(step, max((variant.judged for variant in able), default=0))

    def run(self, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
        """Judge and time every row that runs here.

        Args:
            report: called with a row as soon as it is done; on a CPU its time comes later.
        """
        ready: list[tuple[Row, Step]] = []
        for name, row in self.rows.items():
            variant, started = self.variants[name], time.monotonic()
            if reason := variant.against(self.on_gpu):
                row.status, row.reasons = "skipped", [reason]
            elif started > self.deadline:
                row.status, row.reasons = "skipped", ["the time that --minutes gives was over"]
            elif step := self._ready(row, variant):
                ready.append((row, step))
            row.seconds = time.monotonic() - started
            self._enter_rates(row)
            report(row)
        if ready:
            self._time_in_turns(ready)
        for row in self.rows.values():
            self._enter_rates(row)
        return list(self.rows.values())

    def _ready(self, row: Row, variant: Variant) -> Step | None:
        """Build and judge a row; on a GPU time it too, its nets alone on the device, and on a CPU return its step."""
        try:
            self._count(row)
            expected = self.expected
            self._clear(row)
            step = variant.build(self._method(), self.workload.optim, STEPS, row.notes.append)
            row.losses = self._losses(step, variant.judged)
            judge(row, expected, BOUNDS["bf16" if variant.bfloat16 else "fp32"])
            if variant.said and not any(variant.said in note for note in row.notes):
                row.status, row.reasons = "error", [*row.reasons, *row.notes]
            as_released(step)
            if self.on_gpu:
                allow_tf32(row.precision == "tf32")
                self._time_on_gpu(row, step)
                row.peak_bytes = torch.cuda.max_memory_allocated(self.device)
                return None
            row.peak_bytes = cpu_peak_bytes(step, self.batches[0], WARM_UP)
            return step
        except torch.OutOfMemoryError as error:
            where = "" if "expected" in vars(self) else " in the released loop's steps, which all rows are judged by"
            row.status, row.reasons = "skipped", [f"out of memory{where}: {describe(error)}"]
        except Exception as error:  # the row shows it and the exit code tells; the others are still measured
            row.status, row.error = "error", describe(error)
        finally:
            allow_tf32(False)
        return None

    def _count(self, row: Row) -> None:
        """Count the FLOPs of a step, before anything else is on the device; rows do without if that fails."""
        if self._counted:
            return
        self._counted = True
        try:
            self.flops = self.workload.flops(self.device)
        except Exception as error:  # told in the row; what was to be measured does not depend on it
            row.notes.append(f"no MFU: counting the FLOPs of a step failed: {describe(error)}")

    def _clear(self, row: Row) -> None:
        """Nothing of an earlier row may stand in the GPU's memory, also not of one that has failed."""
        if not self.on_gpu:
            return
        gc.collect()  # blocks and the steps that they are patched with hold each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        own = sum(tensor.nbytes for batch in self.batches for tensor in batch.parts().values())
        left = torch.cuda.memory_allocated(self.device) - own
        if left > LEFT_OVER:
            row.notes.append(f"{left / 1e6:.0f} MB of an earlier row were still allocated: its memory contains them")

    def _method(self) -> Any:
        allow_tf32(False)
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
        if row.step_us is None or row.status == "skipped":
            return
        seconds = row.step_us.median / 1e6
        row.images_per_second = self.workload.images / seconds
        base = self.rows.get(RELEASED)
        row.speedup = base.step_us.median / row.step_us.median if base and base.step_us else None
        if self.peak is not None and self.flops is not None:
            row.mfu = 100 * self.flops / seconds / float(getattr(self.peak, row.precision))


def precision_of(variant: Variant, on_gpu: bool) -> str:
    """Of the products in a row's timed steps."""
    return "bf16" if variant.bfloat16 else "tf32" if on_gpu else "fp32"


def loss_terms(terms: Mapping[str, Any]) -> dict[str, float]:
    """The losses among a step's terms, as numbers."""
    return {name: float(terms[name]) for name in sorted(terms) if name.startswith("loss")}


def judge(row: Row, expected: Sequence[dict[str, float]], bound: float) -> None:
    """Enter the largest relative difference of a loss of JUDGED; beyond the bound the row is wrong."""
    row.bound, row.loss_error = bound, 0.0
    for found, right in zip(row.losses, expected, strict=False):
        for name in JUDGED if "loss/cosine" in right else JUDGED[:3]:
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


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products may be rounded to TF32 from now on."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
