"""Documents as the benchmarks write them, with made-up figures."""

import dataclasses

from bench import harness, loader, stepping
from bench.measure import Timing

ABOUT = {
    "schema": 1,
    "complete": True,
    "date": "2027-01-02T00:00:00+00:00",
    "device": {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "driver": "570.1"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
    "commit": "abc123def4567890",
    "dirty": False,
}


def timing(median):
    return Timing(median, 0.9 * median, 1.2 * median)


def document(rows, **more):
    return {**ABOUT, "rows": [dataclasses.asdict(row) for row in rows], **more}


def kernel(bench, case, provider, both, graph=None, **more):
    """Microseconds of forward and backward, and of its replay."""
    times = {"both_us": both and timing(both), "graph_us": graph and timing(graph)}
    return harness.Row(bench, case, {"batch": 2}, "torch.bfloat16", provider, **times, **more)


def align(**more):
    name = "kernels.align"
    return document(
        [
            kernel(name, "B=2 crop=512", "eager", 800.0, 700.0, peak_bytes=5_000_000),
            kernel(name, "B=2 crop=512", "triton", 100.0, 50.0, peak_bytes=1_000_000),
            kernel(name, "B=8 crop=1024", "eager", 9000.0, 8000.0, peak_bytes=90_000_000),
            kernel(name, "B=8 crop=1024", "torch.compile", 2000.0, 1000.0),
            kernel(name, "B=8 crop=1024", "liger", 6000.0),
            kernel(name, "B=8 crop=1024", "liger 1 chunk", None, status="error", error="RuntimeError: no"),
            kernel(name, "B=8 crop=1024", "triton", 1000.0, 800.0, peak_bytes=3_000_000),
            kernel(name, "B=8 crop=1024", "cuda", 900.0, 700.0, peak_bytes=2_000_000, status="wrong"),
        ],
        **more,
    )


def tests(outcomes, **more):
    rows = [{"name": f"tests/t.py::test_{k}", "outcome": one, "seconds": 0.1} for k, one in enumerate(outcomes)]
    counts = {one: outcomes.count(one) for one in dict.fromkeys(outcomes)}
    return {**ABOUT, "rows": rows, "collected": len(rows), "counts": counts, "reasons": {"needs 2 GPUs": 1}, **more}


def step_row(name, ms, size="MiT-B5, 2+2@512", **more):
    return stepping.Row(size, name, "bf16", step_us=ms and timing(1e3 * ms), speedup=2.5, peak_bytes=4e9, **more)


def sam_row(provider, ms, encoder="vit_b", batch=1, **more):
    sizes = {"encoder": encoder, "size": 1024, "batch": batch}
    times = {"forward_us": ms and timing(1e3 * ms), "peak_bytes": 10**9}
    return harness.Row("sam", f"{encoder} B={batch}", sizes, "torch.bfloat16", provider, **times, **more)


def loader_row(name, rate, **more):
    spreads = {"samples_per_second": loader.Spread(rate, 0.9 * rate, rate), "ratio": loader.Spread(1.5, 1.4, 1.6)}
    return loader.Row(name, "", spreads=spreads if rate else {}, **more)
