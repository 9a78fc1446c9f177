"""Where the model's inputs come from: counted modules, a file with a measured step, a prediction, or options."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.ledger.recipes import MODEL
from bench.scaling.model import Network
from bench.variants import OURS
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.models.segmentor import Segmentor

PREDICTED_MS = {(2, 512): 35.5, (8, 512): 101.0, (2, 1024): 117.0}
"""(images a domain, crop) -> a step of an H100 without SAM: predicted from counted operators and bytes at 800 TFLOP/s
and 3.0 TB/s, +-30 %, errs optimistic; not measured."""
_NETWORK = re.compile(r"([1-9]\d*)x([1-9]\d*)G")


class BadInput(Exception):
    """One sentence about an option or a file."""


@dataclass(frozen=True)
class Input:
    """A number that the model is given."""

    name: str
    value: float | str | bool
    unit: str
    source: str
    """measured, predicted, counted, given or assumed."""
    detail: str = ""
    """Where it is from: for a measured one the file, row, device, commit and date."""

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def count_network() -> Network:
    """MiT-B5 with the DAFormer head for 19 classes, counted on the meta device.

    A unit of FSDP is a block, a BatchNorm layer (float32, so on its own), or the rest of the network.
    """
    with torch.device("meta"):
        net = Segmentor(MODEL, CITYSCAPES.count)
    batchnorms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    blocks = list(net.backbone.blocks())
    parameters = list(net.parameters())
    return Network(
        parameters=sum(parameter.numel() for parameter in parameters),
        tensors=len(parameters),
        blocks=len(blocks),
        block_parameters=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
        units=len(blocks) + batchnorms + 1,
        batchnorms=batchnorms,
    )


def read_network(text: str) -> float:
    """A machine's NICs such as 8x400G (NICs x Gbit/s), in bytes a second.

    Raises:
        BadInput: no such text.
    """
    if not (found := _NETWORK.fullmatch(text)):
        raise BadInput(f"--nics takes a number of NICs and their Gbit/s, such as 8x400G or 1x100G (it got {text!r})")
    return int(found[1]) * int(found[2]) * 1e9 / 8


def step_time(results: Path, batch: int, crop: int) -> Input:
    """A step of one GPU, milliseconds: the newest measurement in `results`, else the prediction.

    Args:
        results: folder with <device>/step*.json, which `python -m bench step --json` writes.
        batch: images a domain.
        crop: side of the crop.

    Raises:
        BadInput: neither is there, or a file cannot be read.
    """
    size = f"MiT-B5, {batch}+{batch}@{crop}"
    found = [made for path in sorted(results.glob("*/step*.json")) if (made := _measured_step(path, size))]
    if found:
        return max(found, key=lambda one: one[0])[1]
    if (batch, crop) in PREDICTED_MS:
        detail = "not measured; from counted operators and bytes, an H100's, +-30 %"
        return Input("step", PREDICTED_MS[batch, crop], "ms", "predicted", detail)
    known = ", ".join(f"--batch {images} --crop {side}" for images, side in PREDICTED_MS)
    raise BadInput(
        f"no file in {results} has a GPU's step of {size}, and it is not predicted (there is {known}): give --step-ms"
    )


def _measured_step(path: Path, size: str) -> tuple[str, Input] | None:
    """(date, the shortest right step of ours) in a file; None if it has none of a GPU."""
    content = read_json(path)
    try:
        if content["device"]["kind"] != "cuda":
            return None
        times = {
            row["name"]: float(row["step_us"]["median"]) / 1e3
            for row in content["rows"]
            if row["size"] == size and row["name"] in OURS and row["status"] == "ok" and row["step_us"]
        }
        device, commit, date = content["device"]["name"], content["commit"] or "unknown", content["date"]
        dirty = " with changes" if content["dirty"] else ""
        partial = "" if content.get("complete", True) else ", a run that was cut off: rows are missing"
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path} is no result of `python -m bench step --json` ({type(error).__name__}: {error}): "
            "remove it or write it again"
        ) from error
    if not times:
        return None
    name = min(times, key=lambda name: times[name])
    detail = f"{path}, row {name!r}, {device}, commit {commit}{dirty}, {date}{partial}"
    return date, Input("step", times[name], "ms", "measured", detail)


@dataclass(frozen=True)
class Measured:
    """Steps that were measured at several numbers of GPUs."""

    mode: str
    steps_ms: dict[int, float]
    detail: str


def read_measured(path: Path, modes: tuple[str, ...]) -> Measured:
    """The file of --check-measured.

    Raises:
        BadInput: it is not as the help says.
    """
    content = read_json(path)
    what = 'it must be {"device", "commit", "date", "mode", "rows": [{"gpus", "step_ms"}, ...]}'
    try:
        steps = {int(row["gpus"]): float(row["step_ms"]) for row in content["rows"]}
        mode, rows = content["mode"], len(content["rows"])
        detail = f"{path}, {content['device']}, commit {content['commit']}, {content['date']}"
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no file of measured steps ({type(error).__name__}: {error}): {what}") from error
    if mode not in modes:
        raise BadInput(f"{path} has the mode {mode!r}: there is {', '.join(modes)}")
    if not steps or len(steps) != rows:
        raise BadInput(f"{path} must have a row for each number of GPUs, and at least one")
    for gpus, step in steps.items():
        if gpus < 1 or not 0 < step < float("inf"):
            raise BadInput(f"{path} has a row of {gpus} GPUs and {step} ms: both must be above 0 and finite")
    return Measured(mode, dict(sorted(steps.items())), detail)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error})") from error
