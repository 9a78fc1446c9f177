"""One provider of `python -m bench loader` in a process of its own: `python -m bench.loader_run RESULT < JOB`.

Reads the job from standard input and writes a Measured, or what went wrong, to the file RESULT; both JSON.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.document import finite
from bench.harness import describe
from bench.pipelines import BY_NAME, Delivered, Job
from bench.process_tree import cpu_seconds
from ssr_fast.data.labels import CITYSCAPES, IGNORE
from ssr_fast.engine.host_memory import keep_freed_memory

EXTREMES = (-2.2, 2.7)
"""Between these lie normalised values of 0..255."""


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        samples_per_second: a sample is one source view and one target view.
        cpu_seconds: a sample, user and system, of the process and all below it.
        first_seconds: from asking for batches, in a process that has torch and ssr_fast imported, to the first one.
        batches: in the measured part.
        seconds: length of the measured part.
        peak_bytes, own_bytes: largest PSS of the process and all below it, and the largest without mapped files;
            the parent enters them.
    """

    samples_per_second: float
    cpu_seconds: float
    first_seconds: float
    batches: int
    seconds: float
    peak_bytes: int = 0
    own_bytes: int = 0


def measure(job: Job) -> Measured:
    """Run one provider.

    Raises:
        ValueError: a batch is not what the row says.
    """
    if job.device == "cpu":
        torch.set_num_threads(1)  # as in the other benchmarks
        keep_freed_memory()  # as a training run on a CPU does; for every row
    started = time.perf_counter()
    batches = iter(BY_NAME[job.provider].batches(job))
    batch = next(batches)
    first = time.perf_counter() - started
    check(batch, job)
    for _ in range(job.warm_up):
        batch = next(batches)
    _wait(batch)
    count, used, started = 0, cpu_seconds(os.getpid()), time.perf_counter()
    while count < job.least or time.perf_counter() - started < job.seconds:
        batch = next(batches)
        count += 1
    _wait(batch)
    elapsed = time.perf_counter() - started
    used = cpu_seconds(os.getpid()) - used
    check(batch, job)
    samples = count * job.workload.batch
    return Measured(samples / elapsed, used / samples, first, count, elapsed)


def _wait(batch: Delivered) -> None:
    """For what a device still does to a batch."""
    if any(part.is_cuda for part in batch):
        torch.cuda.synchronize()


def check(batch: Delivered, job: Job) -> None:
    """A batch is what every row has to deliver, so that rows may be compared.

    Raises:
        ValueError: how it is not.
    """
    source, label, target = batch
    shape = (job.workload.batch, 3, *job.workload.crop)
    for name, part in (("source", source), ("target", target)):
        if tuple(part.shape) != shape or part.dtype != torch.float32:
            raise ValueError(f"{name} images are {part.dtype} {tuple(part.shape)}, not float32 {shape}")
        low, high = part.min().item(), part.max().item()
        if not (EXTREMES[0] < low < high < EXTREMES[1]) or high - low < 0.5:
            raise ValueError(f"{name} images lie in {low:.2f}..{high:.2f}, and normalised ones in -2.12..2.64")
    if tuple(label.shape) != (shape[0], *shape[2:]) or label.dtype != torch.uint8:
        raise ValueError(f"labels are {label.dtype} {tuple(label.shape)}, not uint8 {(shape[0], *shape[2:])}")
    values = set(label.unique().tolist())
    if values - {*range(CITYSCAPES.count), IGNORE} or values == {IGNORE}:
        raise ValueError(f"labels hold {sorted(values)}, and train ids are 0..{CITYSCAPES.count - 1} and {IGNORE}")


def main() -> None:
    """Run the job of standard input."""
    job = Job.of(json.load(sys.stdin))
    result: dict[str, Any]
    try:
        result = dataclasses.asdict(measure(job))
    except Exception as error:  # the parent shows it in the row, and the other rows still run
        result = {"error": describe(error)}
    Path(sys.argv[1]).write_text(json.dumps(finite(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
