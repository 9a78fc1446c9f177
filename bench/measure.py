"""The instruments: times, memory, saved bytes, kernel launches, and the peaks of the device."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METHOD = {
    "gpu": "triton.testing.do_bench: CUDA events around each repetition, L2 flushed before each, median and p20/p80",
    "graph": "the same around the replay of one CUDA graph of forward and backward, so L2 is flushed there too",
    "cpu": "time.perf_counter, one thread, interleaved, median and p20/p80; too small for conclusions",
    "peaks": "measured in this run: a large device-to-device copy (bytes read and written) and a bf16 matrix product",
    "peak_bytes": "torch.cuda.max_memory_allocated of forward and backward above the inputs, gradients included",
    "saved_bytes": "storages seen by saved_tensors_hooks, each once, those of the inputs not counted",
    "errors": "||out - ref|| / ||ref|| against the definition in float64",
}
"""How each column comes about, for the JSON."""

PEAK_MATRIX = 8192
PEAK_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of a repeated measurement, microseconds."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Timing":
        """Of measurements in seconds, at least two."""
        marks = statistics.quantiles(seconds, n=5, method="inclusive")
        return Timing(1e6 * statistics.median(seconds), 1e6 * marks[0], 1e6 * marks[3])


@dataclass(frozen=True)
class Peaks:
    """What the device reaches in this run."""

    bytes_per_second: float
    flops_per_second: float


def rounds(budget: float, least: int = 5, most: int = 200) -> Iterator[int]:
    """Count rounds until `budget` seconds are spent, at least `least` and at most `most`."""
    started = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - started > budget:
            return
        yield number


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call on the CPU; what it returns is freed afterwards."""
    started = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def time_gpu(work: Callable[[], Any]) -> Timing:
    """Time of `work` on the GPU, see METHOD."""
    from triton.testing import do_bench  # Triton is there where a GPU is; a CPU run need not have it

    median, p20, p80 = do_bench(work, quantiles=[0.5, 0.2, 0.8])
    return Timing(1e3 * median, 1e3 * p20, 1e3 * p80)


def capture(work: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """`work` as a CUDA graph, and its outputs, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most memory that torch's allocator handed out during `work`, above what it had handed out before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward: each storage once and whole, the storages of `inputs` not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them: an address that is free again could be counted twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    def unpack(nothing: None) -> Tensor:
        raise RuntimeError("saved_bytes runs no backward")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def launches(work: Callable[[], Any]) -> tuple[int | None, str]:
    """CUDA kernels of one call of `work`, copies and fills by the driver not counted; or None and why not."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    count = sum(event.get("cat") == "kernel" for event in events)
    return (count, "") if count else (None, "the profiler recorded no kernel")


def poison(size: int, device: torch.device) -> None:
    """Fill memory that torch's allocator will hand out next with NaN: an output that nobody writes then shows."""
    torch.cuda.empty_cache()  # else a freed block with an earlier, right result in it could be handed out
    size = min(8 * size, torch.cuda.mem_get_info(device)[0] // 4)
    large = [torch.full((max(size, 2**22) // 4,), torch.nan, device=device)]
    small = [torch.full((2**17,), torch.nan, device=device) for _ in range(64)]  # requests under 1 MiB: another pool
    del large, small


def measure_peaks(device: torch.device) -> Peaks:
    """Bandwidth of a large copy and rate of a large bf16 matrix product on this GPU, now."""
    size = min(PEAK_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_gpu(lambda: target.copy_(source))
    a, b = (torch.randn(PEAK_MATRIX, PEAK_MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_gpu(lambda: a @ b)
    return Peaks(2 * size / copy.median * 1e6, 2 * PEAK_MATRIX**3 / product.median * 1e6)
