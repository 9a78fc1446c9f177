"""A planning table for several GPUs, by a MODEL: `python -m bench scaling`. Nothing of several GPUs is measured here.

The model and its assumptions are in bench/scaling/model.py; each input is printed with its source: counted from the
modules, measured (a file of `python -m bench step --json` from a GPU in bench/results), predicted, given or assumed.
Exit code 2: a mistake on the command line or in a file.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import document, tables
from bench.harness import Setting
from bench.scaling.advice import RECIPE_BATCH, Advice, advise
from bench.scaling.inputs import (
    BadInput,
    Input,
    Measured,
    count_network,
    read_measured,
    read_network,
    step_time,
)
from bench.scaling.model import MODES, OPERATORS, PLANNING_ONLY, Cluster, Plan, Row, predict

TITLE = "MODEL, not measured"
ASSUMED = "bench/scaling/model.py"
REDUCE = {"fp32": 4, "bf16": 2}
MEASURED_FORMAT = (
    "compare the model with measured steps: a JSON file with device, commit, date, mode (ddp, fsdp or hsdp) and rows, "
    'each {"gpus": N, "step_ms": median}; its row of one GPU, if there is one, is the model\'s step'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = parse(arguments)
    try:
        measured = options.check_measured and read_measured(options.check_measured, MODES[:3])
        plan, inputs = _plan(options, measured)
        sizes = _sizes(options.gpus, plan.cluster.gpus_per_node, "--gpus")
        if measured:
            _sizes(list(measured.steps_ms), plan.cluster.gpus_per_node, f"{options.check_measured}: a row of")
        if options.json is not None and options.json.suffix != ".json":
            raise BadInput(f"--json takes a file that ends in .json (it got {str(options.json)!r})")
    except BadInput as error:
        print(f"python -m bench scaling: {error}", file=sys.stderr)
        return 2
    rows = [dataclasses.replace(predict(plan, "ddp", 1), mode="single")] if 1 in sizes else []
    rows += [predict(plan, mode, gpus) for mode in MODES for gpus in sizes if gpus > 1]
    advice = [advise(plan, options.steps, row) for row in rows if row.mode in ("single", "ddp")]
    screen = tables.console()
    _show_inputs(inputs, screen)
    _show_rows(rows, options.steps, screen)
    _show_advice(advice, options.steps, screen)
    content = _document(inputs, rows, advice, options.steps)
    if measured:
        comparison = _compare(plan, measured)
        _show_comparison(comparison, measured, screen)
        content["comparison"] = {"measured": measured.detail, "mode": measured.mode, "rows": comparison}
    if options.json is not None:
        document.write(options.json, document.finite(content))
        print(f"wrote {options.json}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=summary, epilog=details)
    add = parser.add_argument
    add("--gpus", type=_whole, nargs="+", default=[1, 8, 64, 512], metavar="N", help="default: 1 8 64 512")
    add("--step-ms", type=_positive, metavar="MS", help="a step of one GPU (default: measured, else predicted)")
    add("--batch", type=_whole, default=2, help="images a domain of one GPU (default: 2, the recipe's)")
    add("--crop", type=_whole, default=512, help="side of the crop, to find the step's time (default: 512)")
    add("--steps", type=_whole, default=40000, help="of a run (default: 40000)")
    add("--parameters", type=_whole, help="default: counted from MiT-B5 with the DAFormer head")
    add("--reduce", choices=REDUCE, default="fp32", help="type in which gradients are summed (default: fp32)")
    add("--gpus-per-node", type=_whole, default=8, metavar="N", help="default: 8")
    add("--nvlink", type=_positive, default=450.0, metavar="GB/S", help="of a GPU, one direction (default: 450)")
    add("--nics", default="8x400G", help="of a machine, such as 8x400G (default) or 1x100G")
    add("--latency-us", type=_positive, default=3.0, metavar="US", help="from machine to machine (default: 3)")
    add("--sync-batchnorm", action="store_true", help="BatchNorm's statistics over all GPUs")
    add("--json", type=Path, metavar="FILE", help="write inputs and rows")
    add("--check-measured", type=Path, metavar="FILE", help=MEASURED_FORMAT)
    options = parser.parse_args(arguments)
    options.asked = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    return options


def _whole(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _sizes(gpus: Sequence[int], node: int, where: str) -> list[int]:
    """The numbers of GPUs, in order.

    Raises:
        BadInput: one that does not fill its machines.
    """
    for number in gpus:
        if number > node and number % node:
            raise BadInput(
                f"{where} {number} GPUs does not fill machines of {node}: give a multiple, or another --gpus-per-node"
            )
    return sorted(set(gpus))


def _plan(options: argparse.Namespace, measured: Measured | None) -> tuple[Plan, list[Input]]:
    """The model's inputs, and each with its source."""
    if options.step_ms is not None:
        step = Input("step", options.step_ms, "ms", "given", "--step-ms")
    elif measured and 1 in measured.steps_ms:
        step = Input("step", measured.steps_ms[1], "ms", "measured", measured.detail)
    else:
        step = step_time(document.RESULTS, options.batch, options.crop)
    network = count_network()
    if options.parameters is not None:
        network = dataclasses.replace(network, parameters=options.parameters)
    cluster = Cluster(
        gpus_per_node=options.gpus_per_node,
        nvlink=1e9 * options.nvlink,
        nics=read_network(options.nics),
        hop=options.latency_us / 1e6,
    )
    width = REDUCE[options.reduce]
    plan = Plan(network, cluster, float(step.value) / 1e3, options.batch, width, options.sync_batchnorm)
    modules = "MiT-B5 with the DAFormer head, 19 classes"
    units = f"{network.blocks} blocks, {network.batchnorms} BatchNorm layers, the rest of the network"

    def asked(name: str, value: float | str | bool, unit: str, option: str, detail: str = "") -> Input:
        given = option in options.asked
        text = f"--{option.replace('_', '-')}{'' if given else ', its default'}{detail}"
        return Input(name, value, unit, "given" if given else "assumed", text)

    parameters = Input("parameters", network.parameters, "", "counted", modules)
    inputs = [
        step,
        asked("batch", options.batch, "images a domain of one GPU", "batch", f"; {2 * options.batch} images a step"),
        parameters if options.parameters is None else asked("parameters", network.parameters, "", "parameters"),
        Input("tensors", network.tensors, "", "counted", modules),
        Input("FSDP units", network.units, "", "counted", units),
        asked("gradients", width * network.parameters / 1e6, "MB", "reduce", f"; {options.reduce}"),
        Input("operators", OPERATORS, "a step", "counted", "python -m bench ledger --size 2@512, lean, 2026-11-22"),
        asked("GPUs a machine", options.gpus_per_node, "", "gpus_per_node"),
        asked("NVLink", options.nvlink, "GB/s a GPU and direction", "nvlink", "; nominal"),
        asked("NICs", options.nics, "a machine", "nics", f"; {cluster.nics / 1e9:g} GB/s, nominal"),
        asked("latency", options.latency_us, "us a hop between machines", "latency_us"),
        asked("synchronised BatchNorm", options.sync_batchnorm, "", "sync_batchnorm"),
    ]
    named = dataclasses.asdict(plan.assumptions)
    return plan, inputs + [Input(name, value, "", "assumed", ASSUMED) for name, value in named.items()]


def _document(inputs: Sequence[Input], rows: Sequence[Row], advice: Sequence[Advice], steps: int) -> dict[str, Any]:
    """For JSON: what this was computed from and with, and the rows."""
    facts = document.document([], Setting(torch.device("cpu"), False), None)
    kept = {name: facts[name] for name in ("schema", "date", "versions", "platform", "commit", "dirty")}
    return {
        "kind": "model",
        "bench": "scaling",
        "note": "computed by the formula of bench/scaling/model.py; nothing here was measured on several GPUs",
        **kept,
        "steps": steps,
        "inputs": [one.as_row() for one in inputs],
        "rows": [
            {**dataclasses.asdict(row), "hours": _hours(row, steps), "offered": row.mode != PLANNING_ONLY}
            for row in rows
        ],
        "advice": [dataclasses.asdict(one) for one in advice],
    }


def _hours(row: Row, steps: int) -> float:
    return steps * row.step_ms / 3.6e6


def _show_inputs(inputs: Sequence[Input], screen: Console) -> None:
    screen.print(f"{TITLE}: computed from one GPU's step by the formula in bench/scaling/model.py", soft_wrap=True)
    for one in inputs:
        if one.detail != ASSUMED:
            value = f"{one.value:,.6g}" if type(one.value) is float else str(one.value)
            screen.print(
                f"  {one.name}: {value} {one.unit}".rstrip() + f" ({one.source}: {one.detail})", soft_wrap=True
            )
    assumed = ", ".join(f"{one.name} {one.value:.3g}" for one in inputs if one.detail == ASSUMED)
    screen.print(f"  assumed: {assumed}", soft_wrap=True)


def _show_rows(rows: Sequence[Row], steps: int, screen: Console) -> None:
    table = Table(title=f"{TITLE}: a step on N GPUs", title_justify="left")
    table.add_column("mode", no_wrap=True)
    headings = ("GPUs", "MB sent", "calls", "GB saved", "comm. ms", "exposed ms", "late ms", "host ms", "step ms")
    for heading in (*headings, "efficiency %", "images/s", f"hours, {steps:,} steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        traffic = (f"{row.sent_bytes / 1e6:.0f}", str(row.collectives), f"{row.saved_bytes / 1e9:.2f}")
        times = (row.communication_ms, row.exposed_ms, row.late_ms, row.host_ms, row.step_ms, row.efficiency)
        rates = (f"{row.images_per_second:,.0f}", f"{_hours(row, steps):.2f}")
        name = f"{row.mode}*" if row.mode == PLANNING_ONLY else row.mode
        table.add_row(name, str(row.gpus), *traffic, *(f"{value:.1f}" for value in times), *rates)
    screen.print(table)
    notes = (
        f"* {PLANNING_ONLY} in the machine is a row to plan by: the trainer does not offer it",
        "MB sent, calls (collectives) and GB saved: of each GPU, in a step; host ms: fsdp and hsdp are taken to run "
        "outside of a CUDA graph, where the host's time bounds the step; differences below 3 points are within the "
        "model's error",
    )
    for note in notes:
        screen.print(f"  {note}", soft_wrap=True)


def _show_advice(advice: Sequence[Advice], steps: int, screen: Console) -> None:
    table = Table(title=f"{TITLE}: what to use (times by ddp)", title_justify="left")
    samples = f"{steps * RECIPE_BATCH:,} samples a domain"
    headings = ("GPUs", "global batch", f"hours, {steps:,} steps", "epochs GTA5", "epochs Cityscapes")
    for heading in (*headings, f"steps for {samples}", "minutes for these"):
        table.add_column(heading, justify="right")
    for one in advice:
        epochs = (f"{one.source_epochs:,.1f}", f"{one.target_epochs:,.0f}")
        same = (f"{one.same_samples_steps:,}", f"{one.same_samples_minutes:.1f}")
        batch = f"{one.global_batch}+{one.global_batch}"
        table.add_row(str(one.gpus), batch, f"{one.hours:.2f}", *epochs, *same)
    screen.print(table)
    for one in advice:
        screen.print(f"  {one.gpus}: {one.use}: {one.why}", soft_wrap=True)
    screen.print(
        f"  the recipe is {samples} in steps of {RECIPE_BATCH}+{RECIPE_BATCH}: more GPUs mean fewer steps, or more "
        "epochs than the recipe's; a larger global batch changes the method's result",
        soft_wrap=True,
    )


def _compare(plan: Plan, measured: Measured) -> list[dict[str, float]]:
    """Measured and modelled steps side by side."""
    found = []
    for gpus, step in measured.steps_ms.items():
        model = predict(plan, measured.mode, gpus).step_ms
        found.append(
            {"gpus": gpus, "measured_ms": step, "model_ms": model, "model_off_percent": 100 * (model / step - 1)}
        )
    return found


def _show_comparison(rows: Sequence[dict[str, float]], measured: Measured, screen: Console) -> None:
    table = Table(title=f"MODEL beside measured steps: {measured.mode}, {measured.detail}", title_justify="left")
    for heading in ("GPUs", "measured ms", "model ms", "model off by %"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row['measured_ms']:.2f}", f"{row['model_ms']:.2f}", f"{row['model_off_percent']:+.1f}")
        table.add_row(str(row["gpus"]), *times)
    screen.print(table)


if __name__ == "__main__":
    sys.exit(main())
