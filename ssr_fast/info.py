"""`python -m ssr_fast.info [--json]`: versions, GPUs, compiled libraries, and which kernels run here, or why not."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ssr_fast.commandline import DONE, command_parser, parse, run
from ssr_fast.data.dali_loader import not_supported_reasons
from ssr_fast.engine.apex import apex_reasons
from ssr_fast.engine.attention import head_shapes, xformers_problem
from ssr_fast.engine.environment import communication, environment, missing
from ssr_fast.engine.precision import computed_dtype, pick_precision
from ssr_fast.engine.run_config import pick_device
from ssr_kernels import align, contrast, dwconv, library, segloss
from ssr_kernels.registry import BACKENDS

OPS = (*align.OPS, *contrast.OPS, *dwconv.OPS, *segloss.OPS)


def gather() -> dict[str, Any]:
    """Everything that is shown, ready for JSON.

    Returns:
        environment()'s entries, and: communication (see there), missing (package -> why), libraries (name -> why it
        cannot be used, None if it can), choices (option that is off by default -> the same), ops (op -> backend ->
        list of reasons against it on this machine, empty if it runs).
    """
    return {
        **environment(),
        "communication": communication(),
        "missing": missing(),
        "libraries": {name: next(iter(library.reasons(name)), None) for name in library.LIBRARIES},
        "choices": _choices(),
        "ops": {op.name: {backend: op.reasons(backend) for backend in BACKENDS} for op in OPS},
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what gather() has found as tables."""
    machine = _table("ssr_fast", "")
    for name in ("device", "cuda", "platform", "python", "commit"):
        machine.add_row(name, _text(facts[name]))
    for device in facts["devices"]:
        machine.add_row("GPU", f"{device['name']}, compute {device['capability']}, {device['memory_gib']} GiB")
    for name, text in _processes(facts["communication"]).items():
        machine.add_row(name, text)
    for name, version in facts["versions"].items():
        machine.add_row(name, _text(version or facts["missing"][name]))
    for name, reason in facts["libraries"].items():
        machine.add_row(f"lib{name}.so", reason or "loaded")
    for name, reason in facts["choices"].items():
        machine.add_row(name, reason or "can be used")
    console.print(machine)

    kernels = _table("op", *BACKENDS)
    for name, reasons in facts["ops"].items():
        kernels.add_row(name, *("; ".join(reasons[backend]) or "runs" for backend in BACKENDS))
    console.print(kernels)


def main(argv: Sequence[str]) -> int:
    """Print the report; returns the exit code 0."""
    parser = command_parser("ssr_fast.info", "Show versions, devices, and which kernels run here, or why not.")
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object")
    arguments = parse(parser, argv)
    facts = gather()
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts, Console(markup=False, highlight=False))  # [x] in a sentence is no markup
    return DONE


def _processes(facts: dict[str, Any]) -> dict[str, str]:
    """The lines about several processes."""
    nccl, gpus = facts["nccl"], facts["gpus"]
    unused = "" if gpus else ", and there is no GPU for it"
    return {
        "GPUs": str(gpus),
        "NCCL": f"{nccl}{unused}" if nccl else "not in this build of torch: several GPUs cannot train together",
        "gloo": "can be used" if facts["gloo"] else "not in this build of torch: only one process can train",
    }


def _choices() -> dict[str, str | None]:
    """Backends by choice: what stands against them here, in the precision and with the backbone of the benchmarks."""
    device = pick_device("auto")
    dtype = computed_dtype(pick_precision("auto", device))
    return {
        "--data.loader dali": "; ".join(not_supported_reasons(device)) or None,
        "--optim.fused apex": "; ".join(apex_reasons(device)) or None,
        "--run.attention xformers": xformers_problem(head_shapes("mit_b5"), dtype, device),
    }


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(value: str | None) -> str:
    return "-" if value is None else value


if __name__ == "__main__":
    run(main)
