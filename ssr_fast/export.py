"""Export: `python -m ssr_fast.export MODEL --out PATH [--format safetensors|hf|daformer|mmseg|original]`.

MODEL may be a checkpoint `.../step-<n>` of a run, finished or still training, on any number of ranks: its student is
written as a finished run ships it.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from ssr_fast.commandline import DONE, command_parser, parse, raise_problems, run, tell
from ssr_fast.engine.manifest import MANIFEST, is_checkpoint, read_manifest, verify
from ssr_fast.errors import UserError
from ssr_fast.models.formats import from_native, infer_config
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor
from ssr_fast.models.weights import load_model, save_hf, save_model, write_tensors

FOLDERS = ("safetensors", "hf")
FILES = ("daformer", "mmseg", "original")
_META = ("classes", "inference", "resize")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = command_parser("ssr_fast.export", "Write a model, or the student of a checkpoint, for use elsewhere.")
    parser.add_argument("model", type=str, help="run directory, model.safetensors, a run's step-<n>, or another's file")
    parser.add_argument(
        "--format",
        choices=(*FOLDERS, *FILES),
        default="safetensors",
        help="safetensors: a folder with model.safetensors and config.json, as a run ships it; hf: a folder for "
        "transformers; the others: one .safetensors file, with the names that DAFormer's, mmsegmentation's or "
        "SegFormer's original code gives the tensors (the last two have the backbone alone)",
    )
    parser.add_argument("--out", default="", type=str, metavar="PATH", help="the folder or file; replaces an old one")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        UserError: wrong options, a model that cannot be read or is damaged, or a place that cannot be written.
    """
    parser = build_parser()
    options = parse(parser, argv)
    problems = []
    if not options.out:
        problems.append("--out is missing: give the folder or file to write")
    elif options.format in FILES and not options.out.endswith(".safetensors"):
        problems.append(f"--out {options.out} must end in .safetensors: the format {options.format} is one such file")
    raise_problems(problems)
    path, out = Path(options.model).expanduser(), Path(options.out).expanduser()
    if is_checkpoint(path):
        segmentor, meta = read_student(path)
    else:
        loaded = load_model(path, report=tell)
        segmentor, meta = loaded.segmentor, loaded.meta
    if options.format == "safetensors":
        save_model(out, segmentor, meta)
    elif options.format == "hf":
        save_hf(out, segmentor, meta, tell)
    else:
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out {out} cannot be written: its folder does not exist")
        write_tensors(out, from_native(segmentor.state_dict(), options.format, tell))
    tell(f"{options.model} is written to {out}")
    return DONE


def read_student(path: Path) -> tuple[Segmentor, dict[str, Any]]:
    """The student of a run's `step-<n>`, and what its config.json says beside the network.

    Raises:
        UserError: it is damaged, without a student, or of a training that diverged.
    """
    reason = verify(path)
    if reason is not None:
        raise UserError(f"the checkpoint {path} cannot be used: {reason}; take another step-<n> folder beside it")
    from ssr_fast.engine.dcp_files import read_tensors

    try:
        manifest, tensors = read_manifest(path), read_tensors(path, "nets.student")
    except OSError as error:  # a run in progress removes checkpoints that it no longer keeps
        raise UserError(
            f"the checkpoint {path} cannot be read ({error.strerror or error}): take a newer step-<n> folder"
        ) from error
    inferred, class_count = infer_config(tensors, str(path))
    config = _model_config(manifest["config"], path)
    if (config.backbone, config.head, config.channels) != (inferred.backbone, inferred.head, inferred.channels):
        raise UserError(f"the checkpoint {path} is of another network than the config in its {MANIFEST}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"the checkpoint {path} is of a training that diverged: {name} is not finite; take another")
    segmentor = build_segmentor(config, class_count)
    segmentor.load_state_dict(tensors)
    meta = {key: manifest["meta"][key] for key in _META if key in manifest["meta"]}
    if "classes" not in meta:
        tell(f"the checkpoint {path} does not name its {class_count} classes: neither does the exported model")
    return segmentor.eval(), meta


def _model_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The network in a run's config, as the run built it."""
    model, known = config.get("model"), {field.name for field in fields(ModelConfig)}
    if not isinstance(model, dict) or not model.keys() <= known:
        raise UserError(f"the checkpoint {path} has no model that this version knows: it is of another version")
    made = ModelConfig(**model)
    if problems := replace(made, weights="").problems("model"):  # where it started from does not matter any more
        raise UserError(f"the checkpoint {path} cannot be used: {'; '.join(problems)}")
    return made


if __name__ == "__main__":
    run(main)
