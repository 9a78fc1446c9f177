"""The one short table of a call of `make gpu`: medians with their spread, from the documents that it wrote.

Every figure was measured in this call; what is missing is named with the reason. At most LINES lines of WIDTH columns.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LINES, WIDTH = 45, 120
OURS = ("triton", "cuda")
KERNELS = {
    "kernels.align": {"eager": "eager", "compile": "torch.compile", "liger": "liger", "liger 1": "liger 1 chunk"},
    "kernels.contrast": {"eager": "eager", "compile": "torch.compile"},
    "kernels.contrast_sample": {"loop": "loop and sync"},
    "kernels.dwconv": {"channels-last": "eager", "NCHW": "cuDNN NCHW", "compile": "torch.compile"},
    "kernels.dwconv_dilated": {"channels-last": "eager", "NCHW": "cuDNN NCHW", "compile": "torch.compile"},
    "kernels.segloss": {"eager": "eager", "compile": "torch.compile", "liger": "liger"},
}
"""Benchmark -> heading of a peer -> its provider."""
SAM_PEERS = {
    "stock fp32": "segment-anything fp32",
    "stock bf16": "segment-anything bf16",
    "compile": "segment-anything bf16 compiled",
    "transformers": "transformers bf16",
}
Document = Mapping[str, Any]
Row = Mapping[str, Any]


def fresh(results: Path, since: float) -> list[Path]:
    """The documents of any device that were written since then (seconds since the epoch)."""
    return [path for path in sorted(results.glob("*/*.json")) if path.stat().st_mtime >= since]


def read(results: Path, since: float) -> dict[str, Document]:
    """Name -> what `fresh` finds; what is no document is left out."""
    found = dict[str, Document]()
    for path in fresh(results, since):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "rows" in content:
            found[path.stem] = content
    return found


def lines(documents: Mapping[str, Document], width: int = WIDTH) -> list[str]:
    """The table, with lines of at most `width` columns."""
    if not documents:
        return ["nothing was measured"]
    said = [_about(next(iter(documents.values()))), *_tests(documents.get("tests")), *_sanitizer(documents)]
    for name, peers in KERNELS.items():
        said += _kernels(name, peers, documents.get(name))
    steps = [_step(document) for name, document in documents.items() if name.split("-")[0] == "step"]
    said += sum(steps, []) if steps else ["step: no result"]
    said += _sam(documents.get("sam")) + _loader(documents.get("loader"))
    said += [f"{name}: written" for name in documents if name not in _KNOWN and not name.startswith("step")]
    short = [line if len(line) <= width else line[: width - 3] + "..." for line in said]
    return short if len(short) <= LINES else [*short[: LINES - 1], f"... {len(short) - LINES + 1} more lines: see JSON"]


_KNOWN = {*KERNELS, "tests", "sanitize-memcheck", "sanitize-racecheck", "sam", "loader"}


def _about(document: Document) -> str:
    device, versions = document["device"], document["versions"]
    commit = str(document["commit"] or "unknown")[:12] + ("-dirty" if document["dirty"] else "")
    facts = [device["name"], *([f"driver {device['driver']}"] if device.get("driver") else [])]
    facts += [f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if versions.get(name)]
    return ", ".join([*facts, f"commit {commit}", document["date"][:10]])


def _part(document: Document) -> str:
    return "" if document.get("complete", True) else " (cut off: a part)"


def _tests(document: Document | None) -> list[str]:
    if document is None:
        return ["tests: no result"]
    counts, collected = document["counts"], document["collected"]
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    said = [f"tests{_part(document)}: {told or 'none ended'} of {collected if collected is not None else '?'}"]
    failed = [row["name"] for row in document["rows"] if row["outcome"] in ("failed", "error")]
    said += [f"  failed: {name.removeprefix('tests/')}" for name in failed[:5]]
    said += [f"  and {len(failed) - 5} more failed, all in tests.json"] if len(failed) > 5 else []
    reasons = [f"{count} {reason}" for reason, count in document["reasons"].items()]
    return said + ([f"  skipped: {'; '.join(reasons)}"] if reasons else [])


def _sanitizer(documents: Mapping[str, Document]) -> list[str]:
    said = []
    for tool in ("memcheck", "racecheck"):
        document = documents.get(f"sanitize-{tool}")
        if document is None:
            said.append(f"{tool}: no result")
            continue
        ran = sum(row["status"] != "skipped" for row in document["rows"])
        said.append(f"{tool}{_part(document)}: {document['verdict']}, {ran} cases ran")
        said += [f"  {line}" for line in document.get("findings", [])[:2] if document["verdict"] != "clean"]
    return said


def _kernels(name: str, peers: Mapping[str, str], document: Document | None) -> list[str]:
    """The largest case, by the time of ours: ours, peers as multiples of it, memory."""
    if document is None:
        return [f"{name}: no result"]
    own = [row for row in document["rows"] if row["provider"] in OURS]
    timed = [row for row in own if row["both_us"]]
    if not timed:
        return [f"{name}{_part(document)}: no time of ours: {_why(own)}"]
    case = max(timed, key=lambda row: float(row["both_us"]["median"]))["case"]
    rows = {row["provider"]: row for row in document["rows"] if row["case"] == case}
    said = []
    for provider in OURS:
        row = rows.get(provider)
        if row is None or not row["both_us"]:
            continue
        status = "" if row["status"] == "ok" else f" {row['status'].upper()}"
        times = f"{_time(row['both_us'])} us, graph {_time(row['graph_us'])}"
        said.append(f"{name.removeprefix('kernels.')}  {case}{_part(document)}: {provider}{status} {times}")
        said.append(f"  {_peers(row, rows, peers)}; peak {_memory(rows, provider)}")
    return said


def _peers(row: Row, rows: Mapping[str, Row], peers: Mapping[str, str]) -> str:
    """Each peer's time as a multiple of ours, of single calls and of graph replays."""
    told = []
    for heading, provider in peers.items():
        peer = rows.get(provider)
        if peer is None or not peer["both_us"]:
            told.append(f"{heading} {'missing' if peer is None else peer['status']}")
            continue
        ratio = f"{heading} {float(peer['both_us']['median']) / float(row['both_us']['median']):.2f}x"
        if peer["graph_us"] and row["graph_us"]:
            ratio += f" ({float(peer['graph_us']['median']) / float(row['graph_us']['median']):.2f}x)"
        told.append(ratio)
    return ", ".join(told)


def _memory(rows: Mapping[str, Row], provider: str) -> str:
    own, eager = (rows[name]["peak_bytes"] if name in rows else None for name in (provider, "eager"))
    return _megabytes(own) + (f" (eager {_megabytes(eager)})" if eager is not None else "")


def _step(document: Document) -> list[str]:
    said = []
    for size in dict.fromkeys(row["size"] for row in document["rows"]):
        said.append(f"step  {size}{_part(document)}")
        for row in document["rows"]:
            if row["size"] != size:
                continue
            if not row["step_us"]:
                said.append(f"  {row['name']}: {row['status']}: {_why([row])}")
                continue
            marks = "" if row["status"] == "ok" else f" {row['status'].upper()}"
            speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
            memory = _megabytes(row["peak_bytes"])
            said.append(f"  {row['name']}{marks}: {_time(row['step_us'], 1e-3)} ms, {speed}, peak {memory}")
    return said or [f"step{_part(document)}: no row"]


def _sam(document: Document | None) -> list[str]:
    """The largest case of each encoder: our fastest form that is right, and the peers as multiples of it."""
    if document is None:
        return ["sam: no result"]
    said = []
    for encoder in dict.fromkeys(row["sizes"]["encoder"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["sizes"]["encoder"] == encoder]
        own = [
            row for row in rows if row["provider"].startswith("ours") and row["forward_us"] and row["status"] == "ok"
        ]
        if not own:
            said.append(f"sam  {encoder}{_part(document)}: no time of ours: {_why(rows)}")
            continue
        case = max(own, key=lambda row: int(row["sizes"]["batch"]))["case"]
        best = min((r for r in own if r["case"] == case), key=lambda row: float(row["forward_us"]["median"]))
        here = {row["provider"]: row for row in rows if row["case"] == case}
        told = []
        for heading, provider in SAM_PEERS.items():
            peer = here.get(provider)
            if peer is None or not peer["forward_us"]:
                told.append(f"{heading} {'missing' if peer is None else peer['status']}")
            else:
                ratio = float(peer["forward_us"]["median"]) / float(best["forward_us"]["median"])
                told.append(f"{heading} {ratio:.2f}x")
        said.append(f"sam  {case}{_part(document)}: {best['provider']} {_time(best['forward_us'], 1e-3)} ms a batch")
        said.append(f"  {', '.join(told)}; peak {_megabytes(best['peak_bytes'])}")
    return said or [f"sam{_part(document)}: no row"]


def _loader(document: Document | None) -> list[str]:
    if document is None:
        return ["loader: no result"]
    said, without = [f"loader{_part(document)}, samples a second"], dict[str, list[str]]()
    for row in document["rows"]:
        rate = row["spreads"].get("samples_per_second") or _of_rounds(row)
        if rate is None:
            why = row["error"] or "; ".join(row["reasons"]) or "not reached"
            without.setdefault(why, []).append(row["name"])
            continue
        ratio = row["spreads"].get("ratio")
        versus = f", {ratio['median']:.2f}x" if ratio else ""
        said.append(f"  {row['name']}: {rate['median']:.1f} ({rate['least']:.1f}..{rate['greatest']:.1f}){versus}")
    return said + [f"  {', '.join(names)}: {why}" for why, names in without.items()]


def _of_rounds(row: Row) -> Mapping[str, float] | None:
    """The rounds so far of a run that was cut off in one."""
    rates = sorted(float(one["samples_per_second"]) for one in row["rounds"])
    return {"median": statistics.median(rates), "least": rates[0], "greatest": rates[-1]} if rates else None


def _why(rows: Iterable[Row]) -> str:
    reasons: Sequence[str] = [row.get("error") or "; ".join(row.get("reasons", [])) for row in rows]
    return next((reason for reason in reasons if reason), "not reached")


def _time(timing: Mapping[str, float] | None, factor: float = 1.0) -> str:
    """Median and p20..p80."""
    if timing is None:
        return "-"
    median, low, high = (f"{factor * float(timing[mark]):.1f}" for mark in ("median", "p20", "p80"))
    return f"{median} ({low}..{high})"


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{float(size) / 1e6:.1f} MB"
