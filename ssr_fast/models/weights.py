"""Reads and writes networks: the checkpoints that users have, and our own model.safetensors + config.json.

Reading never executes code from a file (see unpickle.py) and never guesses: a file that does not hold exactly the
tensors that the network needs is refused with the first difference.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssr_fast.errors import UserError
from ssr_fast.models import unpickle
from ssr_fast.models.formats import convert, describe_backbone, detect_format, from_native, infer_config, to_native
from ssr_fast.models.mit import MIT, MixTransformer
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor

__all__ = [
    "LoadedModel",
    "convert",
    "detect_format",
    "load_backbone",
    "load_model",
    "read_tensors",
    "save_hf",
    "save_model",
    "write_tensors",
]

FORMAT = "ssr_fast-1"
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
WEIGHT_FILES = (MODEL_FILE, "pytorch_model.bin")  # in the order of preference inside a folder


@dataclass(frozen=True)
class LoadedModel:
    """A network read from disk, in evaluation mode on the CPU, and what its file says about it."""

    segmentor: Segmentor
    config: ModelConfig
    classes: dict[str, Any] | None
    """{"names": [str] * K, "colors": [[r, g, b]] * K}; None where the file does not tell both."""
    meta: dict[str, Any]
    """The rest of config.json; for other formats what was found, such as "names"."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's state dict, under the file's own names, on the CPU.

    Args:
        path: a safetensors file or a file by torch.save (also the older container). Of a training checkpoint the entry
            "state_dict" or "model" is read. A folder stands for the weight file in it.

    Raises:
        UserError: missing, not a checkpoint, damaged, or without tensors.
    """
    return _read(_weight_file(Path(path)))[0]


def _weight_file(path: Path) -> Path:
    """The weight file that a path means."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a checkpoint, or a folder with {MODEL_FILE} and {CONFIG_FILE}")
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"the folder {path} holds no {' or '.join(WEIGHT_FILES)}: give the checkpoint file itself")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and the plain values that training frameworks keep beside them under "meta"."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"the checkpoint {path} is empty: copy or download it again")
    with path.open("rb") as file:
        start = file.read(16)
    is_torch = start.startswith((unpickle.ZIP_MAGIC, unpickle.PICKLE_MAGIC))
    # safetensors: eight bytes with the length of a JSON header, then the header
    if not is_torch and start[8:9] != b"{":
        raise UserError(f"{path} is not a checkpoint: it is neither a safetensors file nor one written by torch.save")
    try:
        content = unpickle.load_torch(path) if is_torch else safetensors.torch.load_file(path)
    except Exception as error:  # a damaged or hostile file can fail anywhere in a reader, with any type
        reason = str(error).split("\n")[0]
        raise UserError(
            f"the checkpoint {path} cannot be read, it is truncated or damaged: copy or download it again "
            f"({type(error).__name__}: {reason})"
        ) from error
    meta = content.get("meta") if isinstance(content, Mapping) else None
    tensors = _state_dict(content)
    if not tensors:
        raise UserError(f"{path} holds no tensors under names, so it is not a checkpoint of a network")
    return tensors, meta if isinstance(meta, dict) else {}


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The named tensors of what a file holds: itself, or the entry where training frameworks keep the network."""
    if not isinstance(content, Mapping):
        return {}
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from inside DataParallel or DDP
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    return tensors


def load_backbone(network: Segmentor | MixTransformer, path: str | Path) -> str:
    """Fill a backbone from a checkpoint of any format that detect_format knows; a decode head in it is left aside.

    Args:
        network: the network, or its backbone alone.
        path: a file, or a folder with one.

    Returns:
        the format of the file.

    Raises:
        UserError: unreadable, of another backbone (with the first tensor that differs), or not finite.
    """
    backbone = network.backbone if isinstance(network, Segmentor) else network
    file = _weight_file(Path(path))
    tensors = read_tensors(file)
    source = detect_format(tensors, str(file))
    native = to_native(tensors, source, report=_ignore)
    wanted = next((name for name, shape in MIT.items() if shape == backbone.shape), "this backbone")
    _fill(backbone, _below(native, "backbone."), file, wanted)
    return source


def _ignore(line: str) -> None:
    """load_backbone says nothing about heads: it takes none."""


def _below(native: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in native.items() if name.startswith(prefix)}


def _fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], file: Path, wanted: str) -> None:
    """Copy tensors into a module that must have exactly these; `wanted` names the module in messages."""
    own = module.state_dict()
    backbone = _below(tensors, "backbone.") or tensors
    hint = f"the file looks like {describe_backbone(backbone)}"
    for name, mine in own.items():
        if name not in tensors:
            if name.endswith("num_batches_tracked"):  # a counter that evaluation never reads, and old files lack
                continue
            raise UserError(f"{file} is a checkpoint of another model: it has no {name}, which {wanted} needs; {hint}")
        theirs = tensors[name]
        if theirs.shape != mine.shape:
            raise UserError(
                f"{file} is a checkpoint of another model: {name} is {list(theirs.shape)} in the file and "
                f"{list(mine.shape)} in {wanted}; {hint}"
            )
        if theirs.is_floating_point() and not torch.isfinite(theirs).all():
            raise UserError(f"{file} is of a training that diverged: {name} is not finite; use an earlier checkpoint")
    for name in tensors:
        if name not in own:
            raise UserError(f"{file} is a checkpoint of another model: {wanted} has no {name}; {hint}")
    module.load_state_dict(dict(tensors), strict=False)  # the names were compared above


def load_model(path: str | Path, report: Callable[[str], None] = print) -> LoadedModel:
    """A whole network from disk.

    Args:
        path: a run directory or its model.safetensors (with config.json beside it), a transformers folder or weight
            file, or a DAFormer/HRDA/MIC/SSR/SegFormer checkpoint, of which the student is taken.
        report: gets one line when a part of the network is left out.

    Raises:
        UserError: unreadable, without a decode head, of an unknown network, or with a config.json that does not fit.
    """
    file = _weight_file(Path(path))
    data = _read_config(file.with_name(CONFIG_FILE)) if file.name in WEIGHT_FILES else {}
    tensors, extra = _read(file)
    native = to_native(tensors, detect_format(tensors, str(file)), report)
    if data.get("format", "").startswith("ssr_fast"):
        config, class_count = _own_config(data, file.with_name(CONFIG_FILE))
        meta = {name: value for name, value in data.items() if name not in ("format", "model", "class_count")}
        if "classes" in meta and not _are_classes(meta["classes"], class_count):
            raise UserError(
                f"{file.with_name(CONFIG_FILE)}: classes must have {class_count} names and as many colors [r, g, b]"
            )
    else:
        config, class_count = infer_config(native, str(file))
        meta = _foreign_meta(data, extra)
    segmentor = build_segmentor(config, class_count)
    _fill(segmentor, native, file, f"{config.backbone} with the {config.head} head and {class_count} classes")
    classes = meta.get("classes")
    if not _are_classes(classes, class_count):
        classes = None
    return LoadedModel(segmentor.eval(), config, classes, meta)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it from the run it belongs to") from error
    if not isinstance(data, dict) or not isinstance(data.get("format", ""), str):
        raise UserError(f"{path} does not describe a model: restore it from the run it belongs to")
    return data


def _own_config(data: dict[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """ModelConfig and class count of our own config.json, checked."""
    if data["format"] != FORMAT:
        raise UserError(f"{path} has the format {data['format']!r}, this version reads {FORMAT!r}: update ssr_fast")
    model, count = data.get("model"), data.get("class_count")
    known = {field.name: type(field.default) for field in fields(ModelConfig)}
    if not isinstance(model, dict) or type(count) is not int or count < 1:
        raise UserError(f"{path} lacks a legal model or class_count: restore it from the run it belongs to")
    for name, value in model.items():
        if name not in known:
            raise UserError(f"{path} has the unknown entry model.{name}: it was written by another version of ssr_fast")
        if not isinstance(value, (int, float) if known[name] is float else known[name]):
            raise UserError(f"{path} has an illegal model.{name} ({value!r}): restore it from the run it belongs to")
    # the file where training started from has no meaning on another machine, and the weights are here
    config = replace(ModelConfig(**model), weights="")
    if problems := config.problems("model"):
        raise UserError(f"{path}: {'; '.join(problems)}")
    return config, count


def _foreign_meta(data: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Class names (and colours) that transformers' config.json or mmcv's meta give, and what save_hf put there."""
    meta = data.get("ssr_fast")
    if isinstance(meta, dict):
        return dict(meta)
    labels = data.get("id2label")
    if isinstance(labels, dict) and all(str(index) in labels for index in range(len(labels))):
        return {"names": [str(labels[str(index)]) for index in range(len(labels))]}
    dataset = extra.get("dataset_meta")  # mmengine's, where mmcv keeps the two entries in upper case
    names, colors = extra.get("CLASSES"), extra.get("PALETTE")
    if isinstance(dataset, dict):
        names, colors = dataset.get("classes"), dataset.get("palette")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return {}
    found: dict[str, Any] = {"names": list(names)}
    if isinstance(colors, (list, tuple)):
        colors = [list(color) if isinstance(color, tuple) else color for color in colors]
        classes = {"names": found["names"], "colors": colors}
        return found | ({"classes": classes} if _are_classes(classes, len(names)) else {})
    return found


def _are_classes(classes: Any, count: int) -> bool:
    """Whether this is names and 8-bit RGB colours of `count` classes."""
    if not isinstance(classes, dict):
        return False
    names, colors = classes.get("names"), classes.get("colors")
    if not isinstance(names, list) or not isinstance(colors, list) or not len(names) == len(colors) == count:
        return False
    for color in colors:
        if not isinstance(color, list) or len(color) != 3 or not all(type(x) is int and 0 <= x < 256 for x in color):
            return False
    return all(isinstance(name, str) for name in names)


def save_model(folder: str | Path, segmentor: Segmentor, meta: Mapping[str, Any]) -> None:
    """Write model.safetensors and config.json, each whole or not at all.

    Args:
        folder: made if missing.
        segmentor: the network; its tensors are written in their own precision.
        meta: JSON values for config.json beside format, model and class_count, such as "classes" and "inference".

    Raises:
        UserError: the folder cannot be written.
    """
    own = {"format": FORMAT, "model": asdict(segmentor.config), "class_count": segmentor.class_count}
    if taken := own.keys() & meta.keys():
        raise ValueError(f"meta must not have {sorted(taken)}")
    _save(Path(folder), segmentor.state_dict(), {**own, **meta})


def save_hf(
    folder: str | Path, segmentor: Segmentor, meta: Mapping[str, Any], report: Callable[[str], None] = print
) -> None:
    """Write a folder that transformers loads: SegformerForSemanticSegmentation, or SegformerModel where the head is
    not SegFormer's.

    transformers computes the block and stage norms with eps 1e-5, MiT with 1e-6: its outputs differ by about that.

    Args:
        folder: made if missing.
        segmentor: the network.
        meta: as in save_model; kept under "ssr_fast" in config.json, the class names also as transformers' labels.
        report: gets one line when the head is left out.

    Raises:
        UserError: the folder cannot be written.
    """
    data = {**hf_config(segmentor, meta.get("classes") or {}), "ssr_fast": dict(meta)}
    _save(Path(folder), from_native(segmentor.state_dict(), "hf", report), data)


def hf_config(segmentor: Segmentor, classes: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' SegformerConfig of a network, as the entries of its config.json."""
    config, shape = segmentor.config, segmentor.backbone.shape
    whole = config.head == "segformer"
    names = classes.get("names") or [f"LABEL_{index}" for index in range(segmentor.class_count)]
    return {
        "architectures": ["SegformerForSemanticSegmentation" if whole else "SegformerModel"],
        "model_type": "segformer",
        "num_channels": 3,
        "num_encoder_blocks": len(shape.dims),
        "hidden_sizes": list(shape.dims),
        "depths": list(shape.depths),
        "num_attention_heads": list(shape.heads),
        "sr_ratios": list(shape.sr_ratios),
        "mlp_ratios": [shape.mlp_ratio] * len(shape.dims),
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": config.drop_path,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": config.dropout,
        "decoder_hidden_size": config.channels,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    _write(Path(path), lambda part: safetensors.torch.save_file(plain, part, metadata={"format": "pt"}))


def _save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): choose another") from error
    write_tensors(folder / MODEL_FILE, tensors)
    _write(folder / CONFIG_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, reach the disk, then take its name: a crash leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}): check the folder's rights and its free space") from error
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
