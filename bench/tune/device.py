"""The tuner's rig on a GPU: runs an op with a given table, judges it, and reads each kernel's own time."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import measure
from bench.harness import Case, Inputs, Outputs, Row, describe, judge
from ssr_kernels import tables

from .ops import Tunable
from .search import Knob, Table, Times

FLUSH_BYTES = 256 * 2**20
"""Written before each run: more than any GPU's L2 holds."""

FLUSHES_A_RUN = 20
"""Where events are around each launch: about 2 ms, in which the host queues a run."""

ROUNDS, QUICK_ROUNDS = 25, 10


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Every op that asks for its table gets this one, in any thread."""
    with patch.object(tables, "table", lambda op, architecture: table):
        yield


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels of every launch inside."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, **named: Any) -> Any:
        kernels.append(run(self, *arguments, **named))
        return kernels[-1]

    with patch.object(JITFunction, "run", recorded):
        yield kernels


@contextmanager
def stamped() -> Iterator[list[tuple[str, Any, Any]]]:
    """Name of the kernel and an event before and after it, of every launch inside."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, Any, Any]] = []
    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, **named: Any) -> Any:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        kernel = run(self, *arguments, **named)
        end.record()
        launches.append((kernel.name, start, end))
        return kernel

    with patch.object(JITFunction, "run", recorded):
        yield launches


class DeviceRig:
    """Search's rig: one op on one device."""

    def __init__(self, op: Tunable, knobs: Sequence[Knob], device: torch.device, rounds: int = ROUNDS) -> None:
        self.op, self.knobs, self.device, self.rounds = op, knobs, device, rounds
        self.no_profiler = False
        """Whether the profiler has recorded nothing; it needs a driver's interface that not every machine has."""
        self._case: Case | None = None
        self._inputs: Inputs
        self._exact: Outputs

    def fault(self, case: Case, table: Table, may_spill: bool = False) -> str:
        """Why the table is of no use on this case; see search.Rig."""
        inputs, exact = self._prepare(case)
        try:
            with launched() as kernels:
                first = self._run(inputs, table)
            if self.device.type == "cuda":
                measure.poison(sum(tensor.nbytes for tensor in inputs.tensors()), self.device)
            second = self._run(inputs, table)
            row = Row("tune", case.name, case.sizes, str(case.dtype), "triton")
            judge(row, second, exact, case.dtype)
            differing = [name for name in first if not torch.equal(first[name], second[name])]
        except Exception as error:  # the search leaves the candidate out and says so
            return describe(error)
        spilling = [] if may_spill else sorted({kernel.name for kernel in kernels if kernel.n_spills})
        reasons = [*row.reasons, *(f"{name} differs in a second run" for name in differing)]
        return "; ".join(reasons + [f"{name} spills" for name in spilling])

    def times(self, case: Case, tables: Sequence[Table]) -> list[Times]:
        """Each kernel's time by the profiler, L2 flushed before each run; see search.Rig."""
        inputs, _ = self._prepare(case)
        for table in tables:
            self._run(inputs, table)
        events = [] if self.no_profiler else self._profiled(inputs, tables)
        kernels = {knob.kernel for knob in self.knobs}
        if not any(event.get("cat") == "kernel" for event in events):
            if not self.no_profiler:
                print("the profiler records no kernel here: events around each launch instead", flush=True)
            self.no_profiler = True
            events = self._stamped(inputs, tables)
        found = by_kernel(events, kernels, len(tables), self.rounds)
        results: list[Times] = []
        for table, durations in zip(tables, found, strict=True):
            with using(table):
                places = {kernel: self.op.place(kernel, inputs) for kernel in durations}
            used = [knob for knob in self.knobs if knob.kernel in places and knob.place == places[knob.kernel]]
            results.append({knob: durations[knob.kernel] for knob in used})
        return results

    def _profiled(self, inputs: Inputs, tables: Sequence[Table]) -> list[dict[str, Any]]:
        """The profiler's trace of all rounds."""
        from torch.profiler import ProfilerActivity, profile

        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(self.rounds):
                for table in tables:
                    flush.zero_()
                    self._run(inputs, table)
            torch.cuda.synchronize()
        return _events(profiler)

    def _stamped(self, inputs: Inputs, tables: Sequence[Table]) -> list[dict[str, Any]]:
        """The same by CUDA events around each launch: a microsecond or two more, the same for every table.

        The GPU is kept busy while a run is queued, so that no event waits for the host.
        """
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        found = []
        for _ in range(self.rounds):
            for table in tables:
                for _ in range(FLUSHES_A_RUN):
                    flush.zero_()
                with stamped() as launches:
                    self._run(inputs, table)
                torch.cuda.synchronize()
                found += [(name, 1e3 * start.elapsed_time(end)) for name, start, end in launches]
        return [{"cat": "kernel", "name": name, "ts": place, "dur": us} for place, (name, us) in enumerate(found)]

    def overall(self, case: Case, old: Table, new: Table) -> tuple[float, float]:
        """Microseconds of the whole op with each table: the mean of two medians, in the order old, new, new, old."""
        inputs, _ = self._prepare(case)
        medians = [measure.time_gpu(partial(self._run, inputs, table)).median for table in (old, new, new, old)]
        return (medians[0] + medians[3]) / 2, (medians[1] + medians[2]) / 2

    def _run(self, inputs: Inputs, table: Table) -> Outputs:
        with using(table), torch.no_grad():
            return self.op.run(inputs)

    def _prepare(self, case: Case) -> tuple[Inputs, Outputs]:
        """Inputs and exact results of a case; those of the case before are freed first."""
        if self._case is not case:
            self._case, self._inputs, self._exact = None, Inputs({}, {}), {}
            self._inputs = case.make(self.device, 0)
            self._exact = case.exact(self._inputs)
            self._case = case
        return self._inputs, self._exact


def _events(profiler: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def by_kernel(
    events: Sequence[dict[str, Any]], kernels: set[str], runs: int, rounds: int
) -> list[dict[str, list[float]]]:
    """Microseconds that each kernel took in each round, one dictionary for each of the runs that a round has.

    Args:
        events: of the profiler's trace, in any order; a Triton kernel's has the name of its function.
        kernels: names to look for; those that no event has are left out.
        runs: how many a round has, one after another; each launches a kernel equally often.
        rounds: how many there were.

    Raises:
        RuntimeError: the launches of a kernel cannot be shared out evenly: the profiler has lost some.
    """
    found: list[dict[str, list[float]]] = [{} for _ in range(runs)]
    launches = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda event: float(event["ts"]))
    for kernel in sorted(kernels):
        durations = [float(event["dur"]) for event in launches if event["name"] == kernel]
        if len(durations) % (runs * rounds):
            raise RuntimeError(f"the profiler saw {len(durations)} launches of {kernel} in {rounds} x {runs} runs")
        each = len(durations) // (runs * rounds)
        for number in range(runs * rounds if each else 0):
            total = sum(durations[number * each : (number + 1) * each])
            found[number % runs].setdefault(kernel, []).append(total)
    return found
