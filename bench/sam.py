"""SAM's image encoder side by side: `python -m bench sam [--json [FILE]] [--quick] [--device cuda|cpu]`.

A forward pass without gradients, random weights, positions included: segment-anything as it is, compiled, transformers'
and ours in each form of attention. On a GPU ViT-B, L and H at 1024, else a small encoder. Every result is compared with
segment-anything's in float64 in the same run. The JSON is written anew after each row, "complete": false until
the last. Exit code 0: all that can run here is right; 1: it is not.
"""

import argparse
import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from bench import document, measure
from bench.device import DeviceLost, check_device
from bench.harness import Row, Setting, describe, relative_error
from bench.limits import CaseLimit
from bench.measure import Timing
from bench.tables import console
from ssr_fast.engine.attention import flex_problem, try_out_biased, xformers_problem
from ssr_fast.models.sam import SHAPES, SamShape, build_vit
from ssr_fast.models.sam_encoder import SamEncoder
from ssr_fast.models.sam_forms import FORMS

STOCK = "segment-anything"
CPU_SHAPE = SamShape(160, 16, 64, 3, 2, 4.0, 32, 4, (1,))
"""Windows with padding, a global block between them."""
FLOAT32_BOUND, STOCK_FACTOR = 1e-5, 1.5
"""Largest relative error in float32; in bfloat16 the largest multiple of segment-anything's own in bfloat16."""

HOST_INDEX = "its get_rel_pos makes an index on the host in every call, whose copy a capture forbids"

Encode = Callable[[Tensor], Tensor]
Build = Callable[[nn.Module, SamShape], Encode]
"""(segment-anything's encoder in the type and on the device to be measured, its shape) -> images -> features."""


@dataclass(frozen=True)
class Provider:
    """One implementation; its name tells the type of numbers too."""

    name: str
    dtype: torch.dtype
    build: Build
    reasons: Callable[[SamShape, torch.device], list[str]] = lambda shape, device: []
    """Why it cannot run here."""
    graph_reasons: str = ""
    """Why it cannot be captured in a CUDA graph."""


@dataclass(frozen=True)
class Case:
    """One encoder on one batch."""

    name: str
    shape: SamShape
    batch: int

    @property
    def title(self) -> str:
        return f"{self.name} B={self.batch}"


def stock(encoder: nn.Module, shape: SamShape) -> Encode:
    """As it is."""
    return encoder


def stock_compiled(encoder: nn.Module, shape: SamShape) -> Encode:
    """torch.compile of the whole."""
    compiled: Encode = torch.compile(encoder, dynamic=False)
    return compiled


def ours(form: str, compiled: bool, encoder: nn.Module, shape: SamShape, wide: bool | None = None) -> Encode:
    """Ours; compiled block by block, as --run.compile_blocks does."""
    parameter = next(encoder.parameters())
    found = SamEncoder(shape, form).eval().requires_grad_(False)
    found.load_state_dict(encoder.state_dict())
    found.to(parameter.device, parameter.dtype)
    if wide is not None:
        side = shape.size // shape.patch
        with torch.no_grad():
            prepared = found.prepare(side, side)
        prepared[:] = [(layout._replace(wide_value=wide), tables) for layout, tables in prepared]
    if compiled:
        for block in found.blocks:
            block.compile(fullgraph=True, dynamic=False)
    return found


def transformers_sam(encoder: nn.Module, shape: SamShape) -> Encode:
    """transformers' SamVisionModel, with PyTorch's attention."""
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=shape.width, output_channels=shape.out, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, image_size=shape.size, patch_size=shape.patch, mlp_ratio=shape.mlp_ratio,
        mlp_dim=int(shape.width * shape.mlp_ratio), window_size=shape.window,
        global_attn_indexes=list(shape.global_blocks),
    )  # fmt: skip
    parameter = next(encoder.parameters())
    theirs = SamVisionModel._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    theirs.load_state_dict({_their_name(name): value for name, value in encoder.state_dict().items()})
    theirs.to(parameter.device, parameter.dtype)
    return lambda images: theirs(images).last_hidden_state


def _their_name(name: str) -> str:
    names = {
        "blocks.": "layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "patch_embed.proj": "patch_embed.projection",
    }
    names |= {f"neck.{i}.": f"neck.{one}." for i, one in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))}
    for ours_, theirs in names.items():
        name = name.replace(ours_, theirs)
    return f"vision_encoder.{name}"


def against_transformers(shape: SamShape, device: torch.device) -> list[str]:
    """Whether it is there."""
    found = importlib.util.find_spec("transformers")
    return [] if found else ["transformers is not installed (the [dev] extra brings it)"]


def against_form(form: str, compiled: bool, dtype: torch.dtype, shape: SamShape, device: torch.device) -> list[str]:
    """Why a form of attention cannot run here."""
    heads, size = shape.heads, shape.width // shape.heads
    problem = flex_problem(heads, size, dtype, device, compiled) if form == "flex" else None
    if form == "xformers":
        problem = xformers_problem([(heads, size)], dtype, device, try_out_biased)
    return [problem] if problem else []


def against_wide(shape: SamShape, device: torch.device) -> list[str]:
    """Widened values are a provider of their own only where they are not what runs anyway."""
    return [] if device.type == "cuda" else ["that is what low_rank does on a CPU"]


def providers(dtype: torch.dtype) -> list[Provider]:
    """segment-anything in float32 first; then everything in `dtype`."""
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

    def of_ours(form: str, compiled: bool) -> Provider:
        name = f"ours {form} {kind}" + (" compiled" if compiled else "")
        return Provider(name, dtype, partial(ours, form, compiled), partial(against_form, form, compiled, dtype))

    wide = partial(ours, "low_rank", False, wide=True)
    found = [Provider(f"{STOCK} fp32", torch.float32, stock, graph_reasons=HOST_INDEX)]
    found += [Provider(f"{STOCK} {kind}", dtype, stock, graph_reasons=HOST_INDEX)] if dtype != torch.float32 else []
    return [
        *found,
        Provider(f"{STOCK} {kind} compiled", dtype, stock_compiled),
        Provider(f"transformers {kind}", dtype, transformers_sam, against_transformers, HOST_INDEX),
        *(of_ours(form, compiled=False) for form in FORMS),
        Provider(f"ours low_rank {kind}, wide v", dtype, wide, against_wide),
        *(of_ours(form, compiled=True) for form in FORMS if form != "xformers"),
    ]


def cases(setting: Setting) -> list[Case]:
    """ViT-B, L and H on 1 and 4 images of 1024 on a GPU; else a small encoder."""
    batches = (1,) if setting.quick else (1, 4)
    if setting.device.type != "cuda":
        return [Case("small", CPU_SHAPE, batch) for batch in batches]
    return [
        Case(name, SHAPES[name], batch)
        for name in ("vit_b", "vit_l", "vit_h")[: 1 if setting.quick else 3]
        for batch in batches
    ]


def random_weights(shape: SamShape) -> nn.Module:
    """segment-anything's encoder, its positions random too, which it initialises with zeros."""
    torch.manual_seed(0)
    encoder = build_vit(shape).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.5)
    return encoder


@torch.no_grad()
def run_case(
    case: Case, setting: Setting, candidates: Sequence[Provider], report: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Every provider on one case; `report` is called with each row as soon as it is done.

    Raises:
        DeviceLost: a provider has broken the context; its row has been reported.
    """
    encoder = random_weights(case.shape).to(setting.device)
    images = torch.randn(case.batch, 3, case.shape.size, case.shape.size, device=setting.device)
    exact: dict[torch.dtype, Tensor] = {}
    rows: list[Row] = []
    for provider in candidates:
        torch.compiler.reset()
        sizes = {"encoder": case.name, "size": case.shape.size, "batch": case.batch}
        rows.append(Row("sam", case.title, sizes, str(provider.dtype), provider.name))
        row = rows[-1]
        row.notes["work"] = "one forward pass of the batch, no gradients"
        try:
            row.reasons = provider.reasons(case.shape, setting.device)
            if row.reasons:
                row.status = "skipped"
                continue
            net, x = copy.deepcopy(encoder).to(provider.dtype), images.to(provider.dtype)
            if provider.dtype not in exact:  # of the weights and images as they are rounded
                double = copy.deepcopy(net).double()
                exact[provider.dtype] = torch.cat([double(image[None].double()) for image in x])
                del double
            row.notes |= {"graph": provider.graph_reasons} if provider.graph_reasons else {}
            _measure(row, provider.build(net, case.shape), x, exact[provider.dtype], setting)
            _judge(row, rows)
        except Exception as error:  # the row shows it and the exit code tells; the others are still measured
            row.status, row.error = "error", describe(error)
        finally:
            report(row)
        check_device(setting.device)
    return rows


def _measure(row: Row, encode: Encode, images: Tensor, exact: Tensor, setting: Setting) -> None:
    work = partial(encode, images)
    row.errors["features"] = relative_error(work(), exact)
    if setting.device.type != "cuda":
        samples = [measure.seconds(work) for _ in measure.rounds(0.3 if setting.quick else 2.0)]
        row.forward_us = Timing.of(samples)
        row.notes["graph, launches, peak memory"] = "measured on a GPU only"
        return
    row.peak_bytes = measure.peak_bytes(work)
    row.launches, why = measure.launches(work)
    if why:
        row.notes["launches"] = why
    row.forward_us = measure.time_gpu(work)
    if "graph" in row.notes:
        return
    graph, outputs = measure.capture(lambda: {"features": work()})
    outputs["features"].zero_()
    graph.replay()
    row.errors["features"] = max(row.errors["features"], relative_error(outputs["features"], exact))
    row.graph_us = measure.time_gpu(graph.replay)


def _judge(row: Row, rows: Sequence[Row]) -> None:
    """Right in float32: within the bound; in bfloat16: not much further off than segment-anything in bfloat16."""
    base = next((one for one in rows if one.provider.startswith(STOCK) and one.dtype == row.dtype), row)
    row.eager_errors = dict(base.errors)
    single = row.dtype == str(torch.float32)
    bound = FLOAT32_BOUND if single else STOCK_FACTOR * base.errors["features"]
    if not row.errors["features"] <= bound:
        row.status = "wrong"
        row.reasons.append(f"features are off by {row.errors['features']:.1e} (bound {bound:.1e})")


def show(rows: Sequence[Row]) -> None:
    """The table of one case, milliseconds an image."""
    screen, batch = console(), int(rows[0].sizes["batch"])
    table = Table(title=f"sam  {rows[0].case}  images of {rows[0].sizes['size']}", title_justify="left")
    table.add_column("provider", no_wrap=True)
    for heading in ("ms an image", "of a graph", "vs stock fp32", "kernels", "peak MB", "error (stock's)", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    reference = rows[0].forward_us
    for row in rows:
        if row.status == "skipped" or row.error:
            continue
        time, graph = (None if t is None else t.median / 1000 / batch for t in (row.forward_us, row.graph_us))
        ratio = reference.median / row.forward_us.median if reference and row.forward_us else None
        table.add_row(
            row.provider,
            "-" if time is None else f"{time:.2f}",
            "-" if graph is None else f"{graph:.2f}",
            "-" if ratio is None else f"{ratio:.2f}x",
            "-" if row.launches is None else str(row.launches),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            f"{row.errors['features']:.1e} ({row.eager_errors['features']:.1e})",
            row.status if not row.failed else row.status.upper(),
        )
    screen.print(table)
    for row in rows:
        for line in (*([row.error] if row.error else []), *row.reasons):
            screen.print(f"  {row.provider} {row.status}: {line}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench sam", description=summary, epilog=details)
    target = "bench/results/<device>/sam.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--quick", action="store_true", help="one encoder, one image, fewer repetitions")
    parser.add_argument("--minutes", **document.MINUTES)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default here: {here}")
    options = parser.parse_args(arguments)
    setting = Setting(torch.device(options.device), options.quick)
    if setting.device.type == "cpu":
        torch.set_num_threads(1)  # as in the other benchmarks
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    candidates = providers(torch.float32 if setting.device.type == "cpu" else torch.bfloat16)
    rows, lost = _run_all(candidates, setting, options)
    failed = [f"{row.case}: {row.provider}: {row.error or '; '.join(row.reasons)}" for row in rows if row.failed]
    for line in failed + lost:
        print(line, file=sys.stderr)
    return 1 if failed or lost else 0


def _run_all(
    candidates: Sequence[Provider], setting: Setting, options: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """All cases; the document is written anew after each row. Returns the rows, and why the device was lost, if so."""
    content = document.document([], setting, None) if options.json is not None else {}
    path = Path(options.json) if options.json else document.default_path("sam", content["device"]) if content else None
    rows: list[Row] = []
    left = [(case, provider.name) for case in cases(setting) for provider in candidates]

    def report(row: Row) -> None:
        rows.append(row)
        left.pop(0)
        if path:
            missing = list(dict.fromkeys(case.title for case, _ in left))
            whole = [document.finite(dataclasses.asdict(one)) for one in rows]
            document.write(path, {**content, "complete": not left, "missing": missing, "rows": whole})

    limit = CaseLimit(60 * options.minutes)
    try:
        for case in cases(setting):
            if not limit.another():
                print(f"left out, not to be done within {options.minutes:g} minutes: {case.title} and what follows")
                break
            show(run_case(case, setting, candidates, report))
    except DeviceLost as error:
        return rows, [f"the device does not answer any more, the rest is left out: {error}"]
    finally:
        if path and rows:
            print(f"wrote {path}")
    return rows, []
