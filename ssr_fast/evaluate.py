"""Evaluate: `python -m ssr_fast.evaluate MODEL --data.root DIR [--protocol P] [--official] [--json FILE]`."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from ssr_fast.commandline import DONE, command_parser, parse, raise_problems, run, tell
from ssr_fast.data.index import DomainConfig, Index, build_index
from ssr_fast.data.store_index import require_originals
from ssr_fast.errors import UserError
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.eval.official import OfficialEvaluation
from ssr_fast.eval.protocols import PROTOCOLS, fitting_protocols, protocol_classes, score
from ssr_fast.eval.run import evaluate_samples
from ssr_fast.eval.table import as_json, progress_bar, score_table
from ssr_fast.shipped import ShippedModel, check_classes, given, open_model


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = command_parser("ssr_fast.evaluate", "Score a model on labelled images.")
    parser.add_argument("model", type=str, help="run directory, model.safetensors, or another program's checkpoint")
    parser.add_class_arguments(DomainConfig, "data")
    parser.set_defaults({"data.split": "val"})
    parser.add_argument(
        "--protocol",
        choices=("auto", *PROTOCOLS, "all"),
        default="auto",
        help="classes that the mean is over; auto: cityscapes19 or, for other classes, generic; all: all that fit",
    )
    parser.add_argument("--official", action="store_true", help="score with cityscapesscripts as well")
    parser.add_argument("--json", default="", type=str, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--device", default="auto", type=str, help="auto, cpu, cuda or cuda:<number>")
    parser.add_class_arguments(InferenceConfig, "inference")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        UserError: wrong options, data, or a model that does not fit the data.
    """
    parser = build_parser()
    options = parser.instantiate(parse(parser, argv))
    domain: DomainConfig = options.data
    problems = domain.problems("data") + options.inference.problems("inference")
    if not domain.root:
        problems.append("--data.root is missing: give the folder of the labelled images")
    report = Path(options.json).expanduser() if options.json else None
    if report is not None and not report.absolute().parent.is_dir():
        problems.append(f"--json {report} cannot be written: its folder does not exist")
    raise_problems(problems)
    model = open_model(options.model, options.device, tell)
    inference = options.inference if given(argv, "inference") else model.inference
    if not given(argv, "data.resize") and model.resize is not None:
        domain = dataclasses.replace(domain, resize=model.resize)
        tell(f"images are resized to fit {model.resize}, as the model saw them; --data.resize null keeps their size")
    index = build_index(domain, True, "data", report=tell)
    require_originals(index, "data")
    check_classes(model, index.classes, domain.root, tell)
    fitting = fitting_protocols(index.classes.names)
    if options.official and fitting == ["generic"]:
        raise UserError("--official needs labels of Cityscapes' 19 classes, and the data has others: leave it out")
    protocols = {"auto": fitting[:1], "all": fitting}.get(options.protocol, [options.protocol])
    for name in protocols:  # refused before the long part
        protocol_classes(name, index.classes.names)
    result = _evaluate(model, index, domain, inference, protocols, options.official)
    if report is not None:
        _write_json(report, {"model": options.model, "data": dataclasses.asdict(domain), **result})
    return DONE


def _evaluate(
    model: ShippedModel,
    index: Index,
    domain: DomainConfig,
    inference: InferenceConfig,
    protocols: list[str],
    with_official: bool,
) -> dict[str, Any]:
    """Predict, score and print; what --json writes."""
    with tempfile.TemporaryDirectory(prefix="ssr_fast-") as folder, progress_bar("evaluating") as progress:
        official = OfficialEvaluation(Path(folder)) if with_official else None
        counts = evaluate_samples(
            model.segmentor,
            index.samples,
            index.layout,
            inference,
            domain.resize,
            model.device,
            index.classes.count,
            progress,
            visit=official.add if official is not None else None,
        ).counts
        official_scores = official.miou() if official is not None else None
    scores = [score(counts, index.classes.names, name) for name in protocols]
    Console().print(score_table(index.classes.names, scores, official_scores))
    head = {"images": len(index.samples), "inference": dataclasses.asdict(inference)}
    return {**head, **as_json(scores, official_scores), "confusion": counts.tolist()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}): give another file") from error


if __name__ == "__main__":
    run(main)
