"""What a profile says: which kernels take the time, what kind they are, and how long the device has nothing to do.

Pure functions of recorded events. torch.profiler (CUPTI) records a CUDA graph's replay kernel by kernel: events of the
category "kernel" like those of eager steps, all with the correlation of one cudaGraphLaunch, spread over several
streams where branches of the graph run side by side. So kernels are counted by name, and busy time is the union of
their intervals over all streams.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what runs on the device, in a trace of torch.profiler."""
WIDTH = 60
"""Characters of a shortened name."""
_ROOT = Path(__file__).parent.parent

OURS, OTHER = "this project's kernels", "other"
COPIES, ELEMENTWISE = "copies", "elementwise, reductions"

KINDS = (
    ("elementwise, reductions, by torch.compile", r"^triton_(poi|red|per|for|spl)"),
    ("optimiser, average, working copies", r"multi_tensor_apply|fused_?adam|_foreach_|aten::_fused_adam"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention"),
    ("normalisation", r"layer_?norm|batch_?norm|GammaBeta|cuComputeGradInput|\bbn_[fb]w"),
    ("convolutions", r"conv|fprop|dgrad|wgrad|nchwToNhwc|nhwcToNchw|im2col"),
    ("matrix products", r"gemm|gemv|cutlass|cublas|nvjet|xmma|split_?k|triton_tem|triton_mm|aten::(add|b|badd)?mm\b"),
    (COPIES, r"copy|^memcpy|^memset|aten::(cat|clone|fill_|zero_)\b"),
    (ELEMENTWISE, r"elementwise|reduce|softmax|functor|index|gather|scatter|upsample|pool|topk|sort|scan|cat|arange"),
    (ELEMENTWISE, r"^aten::"),
)
"""Kinds of kernels, and of operators on a CPU, by a pattern of their names; the first that fits."""


@dataclass(frozen=True)
class Event:
    """Something that ran, microseconds."""

    name: str
    start: float
    end: float
    stream: int = 0


@dataclass(frozen=True)
class Share:
    """One kernel's part of a step."""

    name: str
    short: str
    kind: str
    calls: float
    """In a step."""
    ms: float
    """In a step, all calls together."""
    percent: float
    """Of the time of all kernels; where some run side by side that is more than the busy time."""


def device_events(trace: Mapping[str, Any]) -> list[Event]:
    """What ran on the device, of a trace in Chrome's format."""
    return [
        Event(
            str(event["name"]),
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
            int(event.get("args", {}).get("stream", 0)),
        )
        for event in trace["traceEvents"]
        if event.get("cat") in DEVICE and event.get("ph") == "X"
    ]


def busy(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of them runs."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    return total


def wall(events: Sequence[Event]) -> float:
    """Microseconds from the first beginning to the last end."""
    return max(event.end for event in events) - min(event.start for event in events)


def totals(events: Iterable[Event]) -> dict[str, tuple[int, float]]:
    """Calls and microseconds by full name."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        calls, time = found.get(event.name, (0, 0.0))
        found[event.name] = (calls + 1, time + event.end - event.start)
    return found


def shares(by_name: Mapping[str, tuple[int, float]], steps: int, own: Collection[str]) -> list[Share]:
    """Every kernel, the largest first.

    Args:
        by_name: calls and microseconds in all steps.
        steps: their number.
        own: names of this project's kernels.
    """
    whole = sum(time for _, time in by_name.values()) or 1.0
    found = [
        Share(name, shorten(name), kind(name, own), calls / steps, time / 1e3 / steps, 100 * time / whole)
        for name, (calls, time) in by_name.items()
    ]
    return sorted(found, key=lambda share: (-share.ms, share.name))


def by_kind(all_shares: Iterable[Share]) -> dict[str, tuple[float, float, float]]:
    """Calls and milliseconds a step and percent of each kind, the largest first."""
    found: dict[str, tuple[float, float, float]] = {}
    for share in all_shares:
        calls, ms, percent = found.get(share.kind, (0.0, 0.0, 0.0))
        found[share.kind] = (calls + share.calls, ms + share.ms, percent + share.percent)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def incomplete(by_name: Mapping[str, tuple[int, float]], steps: int) -> list[str]:
    """Short names of kernels whose calls are no multiple of the steps: the trace has lost some, or steps differ."""
    return [shorten(name) for name, (calls, _) in by_name.items() if calls % steps]


def kind(name: str, own: Collection[str]) -> str:
    """What kind a kernel or an operator of the CPU is, by its name."""
    if name.startswith("ssr_kernels::") or re.sub(r"_\d+$", "", _base(name)) in own or _base(name) in own:
        return OURS
    return next((label for label, pattern in _patterns() if pattern.search(name)), OTHER)


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    return [(label, re.compile(pattern, re.IGNORECASE)) for label, pattern in KINDS]


@functools.cache
def own_kernels() -> frozenset[str]:
    """Names of the kernels in this project's sources: Triton's by their decorator, CUDA's by their qualifier."""
    found: set[str] = set()
    for path in (_ROOT / "kernels").rglob("*.py"):
        found.update(re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", path.read_text(encoding="utf-8")))
    for path in sorted((_ROOT / "csrc").glob("*.cu*")):
        text = path.read_text(encoding="utf-8")
        found.update(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(", text))
    return frozenset(found)


_GENERIC = re.compile(r"^(ReduceOp|[AB]?(Unary|Binary)Functor|TensorIteratorBase|.*_wrapper_t)$")
_TELLING = re.compile(r"\b(\w*[Ff]unctor\w*|\w+_cuda\w*|\w+Ops?)\b")


def shorten(name: str, width: int = WIDTH) -> str:
    """A kernel's name without types, namespaces and arguments; what tells PyTorch's kernels apart stays, in <>."""
    short = _base(name)
    if "<" in name and "at::native" in name:
        inner = name[name.index("<") :]
        telling = [word for word in _TELLING.findall(inner) if not _GENERIC.match(word)]
        short += f"<{telling[0]}>" if telling else ""
    if len(short) > width:
        half = (width - 2) // 2
        short = f"{short[: width - 2 - half]}..{short[-half:]}"
    return short


def _base(name: str) -> str:
    """The function's own name: what stands before template arguments and arguments, behind namespaces."""
    if name.startswith(("Memcpy", "Memset", "aten::", "ssr_kernels::")):
        return name
    plain, depth = "", 0
    for sign in name.replace("(anonymous namespace)", "_").replace("operator()", "operator"):
        if sign == "<":
            depth += 1
        elif sign == ">":
            depth -= 1
        elif depth == 0 and sign == "(":
            break
        elif depth == 0:
            plain += sign
    return plain.strip().rpartition("::")[2].rpartition(" ")[2] or name
