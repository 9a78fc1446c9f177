"""The names under which MiT networks are stored, and the way from one to another.

Every format is translated to and from "native": the names of our own state dict, `backbone.` + the original MiT names
and `decode_head.` + the names that DAFormer (daformer head) and NVIDIA's SegFormer (segformer head) use.

| format   | what it is                                                                                        |
|----------|---------------------------------------------------------------------------------------------------|
| native   | our model.safetensors; also NVIDIA's SegFormer and source-only mmseg 0.x checkpoints               |
| original | the flat MiT weight files: `patch_embed1.proj.weight`; their ImageNet classifier is left out       |
| hf       | transformers' Segformer, as it is on disk, with or without the prefix `segformer.`                |
| mmseg    | mmsegmentation 1.x's MixVisionTransformer: `layers.0.1.0.attn.attn.in_proj_weight`; backbone only  |
| daformer | DAFormer, HRDA, MIC and SSR training checkpoints: student `model.`, teacher, ImageNet net, SAM     |
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ssr_fast.errors import UserError
from ssr_fast.models.mit import MIT, STAGES
from ssr_fast.models.segmentor import ModelConfig

Tensors = dict[str, Tensor]

FORMATS = ("native", "original", "hf", "mmseg", "daformer")

# (name in native, name there); {s} is the stage, counted from 1 in native and from 0 there, {j} the block.
_HF_BACKBONE = (
    ("patch_embed{s}.proj.", "encoder.patch_embeddings.{s}.proj."),
    ("patch_embed{s}.norm.", "encoder.patch_embeddings.{s}.layer_norm."),
    ("block{s}.{j}.norm1.", "encoder.block.{s}.{j}.layer_norm_1."),
    ("block{s}.{j}.attn.q.", "encoder.block.{s}.{j}.attention.self.query."),
    ("block{s}.{j}.attn.k.", "encoder.block.{s}.{j}.attention.self.key."),
    ("block{s}.{j}.attn.v.", "encoder.block.{s}.{j}.attention.self.value."),
    ("block{s}.{j}.attn.sr.", "encoder.block.{s}.{j}.attention.self.sr."),
    ("block{s}.{j}.attn.norm.", "encoder.block.{s}.{j}.attention.self.layer_norm."),
    ("block{s}.{j}.attn.proj.", "encoder.block.{s}.{j}.attention.output.dense."),
    ("block{s}.{j}.norm2.", "encoder.block.{s}.{j}.layer_norm_2."),
    ("block{s}.{j}.mlp.fc1.", "encoder.block.{s}.{j}.mlp.dense1."),
    ("block{s}.{j}.mlp.dwconv.dwconv.", "encoder.block.{s}.{j}.mlp.dwconv.dwconv."),
    ("block{s}.{j}.mlp.fc2.", "encoder.block.{s}.{j}.mlp.dense2."),
    ("norm{s}.", "encoder.layer_norm.{s}."),
)
_HF_HEAD = (
    ("linear_c{s}.proj.", "linear_c.{s}.proj."),
    ("linear_fuse.conv.", "linear_fuse."),
    ("linear_fuse.bn.", "batch_norm."),
    ("linear_pred.", "classifier."),
)
_MMSEG_BACKBONE = (
    ("patch_embed{s}.proj.", "layers.{s}.0.projection."),
    ("patch_embed{s}.norm.", "layers.{s}.0.norm."),
    ("block{s}.{j}.norm1.", "layers.{s}.1.{j}.norm1."),
    ("block{s}.{j}.attn.qkv.", "layers.{s}.1.{j}.attn.attn.in_proj_"),
    ("block{s}.{j}.attn.sr.", "layers.{s}.1.{j}.attn.sr."),
    ("block{s}.{j}.attn.norm.", "layers.{s}.1.{j}.attn.norm."),
    ("block{s}.{j}.attn.proj.", "layers.{s}.1.{j}.attn.attn.out_proj."),
    ("block{s}.{j}.norm2.", "layers.{s}.1.{j}.norm2."),
    ("block{s}.{j}.mlp.fc1.", "layers.{s}.1.{j}.ffn.layers.0."),
    ("block{s}.{j}.mlp.dwconv.dwconv.", "layers.{s}.1.{j}.ffn.layers.1."),
    ("block{s}.{j}.mlp.fc2.", "layers.{s}.1.{j}.ffn.layers.4."),
    ("norm{s}.", "layers.{s}.2."),
)
_POINTWISE = re.compile(r"mlp\.fc[12]\.weight$")  # linear here, a 1x1 convolution in mmseg


def _rename(tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], shift: int) -> Tensors:
    """Rename by (from, to) templates; `shift` is added to the stage. A name that no rule knows stays as it is."""
    compiled = [
        (re.compile(re.escape(old).replace(r"\{s\}", r"(?P<s>\d)").replace(r"\{j\}", r"(?P<j>\d+)") + r"(?=\w+$)"), new)
        for old, new in rules
    ]
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in compiled:
            if found := pattern.match(name):
                numbers = found.groupdict()
                stage = int(numbers.get("s") or 0) + shift
                name = new.format(s=stage, j=numbers.get("j")) + name[found.end() :]
                break
        renamed[name] = tensor
    return renamed


def _to_native_names(tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> Tensors:
    return _rename(tensors, [(other, native) for native, other in rules], shift=1)


def _join(tensors: Tensors, parts: tuple[str, str], whole: str) -> Tensors:
    """Replace `...{parts[0]}.weight` and `...{parts[1]}.weight` (and bias) by their rows one after the other.

    Where the second is missing nothing is made: whoever loads the result finds the whole missing.
    """
    joined = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(parts[0]):
            other = stem.removesuffix(parts[0]) + parts[1] + f".{kind}"
            if other in tensors:
                joined[stem.removesuffix(parts[0]) + whole + f".{kind}"] = torch.cat([tensor, tensors[other]])
        elif not stem.endswith(parts[1]):
            joined[name] = tensor
    return joined


def _split(tensors: Tensors, whole: str, parts: tuple[str, str], share: tuple[int, int]) -> Tensors:
    """The inverse of _join: rows are dealt out in the proportion `share`."""
    dealt = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(whole):
            dealt[name] = tensor
            continue
        rows = tensor.shape[0] * share[0] // sum(share)
        for part, piece in zip(parts, (tensor[:rows], tensor[rows:]), strict=True):
            dealt[stem.removesuffix(whole) + part + f".{kind}"] = piece.clone()
    return dealt


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def detect_format(tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> str:
    """Which of FORMATS the names belong to.

    Args:
        tensors: as read from the file.
        where: the file, for the message.

    Raises:
        UserError: none of them.
    """
    signs = {
        "daformer": ("model.backbone.patch_embed1.proj.weight",),
        "native": ("backbone.patch_embed1.proj.weight",),
        "original": ("patch_embed1.proj.weight",),
        "hf": ("segformer.encoder.patch_embeddings.0.proj.weight", "encoder.patch_embeddings.0.proj.weight"),
        "mmseg": ("backbone.layers.0.0.projection.weight", "layers.0.0.projection.weight"),
    }
    for name, keys in signs.items():
        if any(key in tensors for key in keys):
            return name
    shown = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{where} holds no MiT network that is known here (its first tensors are {shown}): give an original MiT, "
        "Hugging Face, mmsegmentation, DAFormer/MIC/SSR or ssr_fast checkpoint"
    )


def to_native(tensors: Mapping[str, Tensor], source: str, report: Callable[[str], None] = print) -> Tensors:
    """Translate a file's tensors to native names; what belongs to no student network is left out.

    Args:
        tensors: name -> tensor.
        source: one of FORMATS.
        report: gets one line when a part of the network is left out.
    """
    if source == "native":
        return _usable_head(dict(tensors), report)
    if source == "daformer":
        return _usable_head(_under(tensors, "model."), report)
    if source == "original":
        return {f"backbone.{name}": tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if source == "hf":
        plain = {name.removeprefix("segformer."): tensor for name, tensor in tensors.items()}
        backbone = _to_native_names(_with("encoder.", _under(plain, "encoder.")), _HF_BACKBONE)
        head = _to_native_names(_under(plain, "decode_head."), _HF_HEAD)
        return _with("backbone.", _join(backbone, ("attn.k", "attn.v"), "attn.kv")) | _with("decode_head.", head)
    if source == "mmseg":
        plain = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
        backbone = _to_native_names(_with("layers.", _under(plain, "layers.")), _MMSEG_BACKBONE)
        backbone = _split(backbone, "attn.qkv", ("attn.q", "attn.kv"), (1, 2))
        backbone = {name: x.flatten(1) if _POINTWISE.search(name) else x for name, x in backbone.items()}
        return _with("backbone.", backbone) | _with("decode_head.", _under(tensors, "decode_head."))
    raise ValueError(f"unknown format {source!r}, known are {', '.join(FORMATS)}")


def from_native(native: Mapping[str, Tensor], target: str, report: Callable[[str], None] = print) -> Tensors:
    """Translate native names to another format's.

    Args:
        native: name -> tensor, as Segmentor.state_dict().
        target: one of FORMATS.
        report: gets one line when the format has no place for the head and it is left out.
    """
    backbone, head = _under(native, "backbone."), _under(native, "decode_head.")
    kept = target in ("native", "daformer") or (target == "hf" and "linear_pred.weight" in head)
    if head and not kept:
        report(f"the {target} format has no place for this head: only the backbone is converted")
    if target == "native":
        return dict(native)
    if target == "original":
        return backbone
    if target == "daformer":
        if "linear_pred.weight" in head:
            head = _reverse_stages(_rename(head, _HF_HEAD[:1], shift=-1))
        return _with("model.backbone.", backbone) | _with("model.decode_head.", head)
    if target == "hf":
        renamed = _rename(_split(backbone, "attn.kv", ("attn.k", "attn.v"), (1, 1)), _HF_BACKBONE, shift=-1)
        if not (head and kept):
            return renamed
        return _with("segformer.", renamed) | _with("decode_head.", _rename(head, _HF_HEAD, shift=-1))
    if target == "mmseg":
        shaped = {name: x[..., None, None] if _POINTWISE.search(name) else x for name, x in backbone.items()}
        return _rename(_join(shaped, ("attn.q", "attn.kv"), "attn.qkv"), _MMSEG_BACKBONE, shift=-1)
    raise ValueError(f"unknown format {target!r}, known are {', '.join(FORMATS)}")


def convert(tensors: Mapping[str, Tensor], source: str, target: str, report: Callable[[str], None] = print) -> Tensors:
    """Rename and reshape a network from one of FORMATS to another; values are not touched.

    Args:
        tensors: name -> tensor in the format `source`.
        source, target: of FORMATS.
        report: gets one line for a part of the network that is left out.
    """
    return from_native(to_native(tensors, source, report), target, report)


def _usable_head(native: Tensors, report: Callable[[str], None]) -> Tensors:
    """Bring the variants of heads that training checkpoints hold to native names."""
    rest = {name: tensor for name, tensor in native.items() if not name.startswith("decode_head.")}
    head = _under(native, "decode_head.")
    if any(name.startswith("head.") for name in head):
        report("HRDA checkpoint: its single-scale head is used, the scale attention is left out; scores will differ")
        head = _under(head, "head.")
    if "linear_c.0.proj.weight" in head:
        head = _to_native_names(_reverse_stages(head), _HF_HEAD[:1])
    if "linear_pred.weight" in head:
        # the base class of the original heads makes a classifier that SegFormer's head never uses
        head = {name: tensor for name, tensor in head.items() if not name.startswith("conv_seg.")}
    return rest | _with("decode_head.", head)


def _reverse_stages(head: Tensors) -> Tensors:
    """DAFormer's code concatenates SegFormer's stages the other way round: reverse the fusing weight's four blocks."""
    name = "linear_fuse.conv.weight"
    return head | {name: torch.cat(head[name].chunk(len(STAGES), dim=1)[::-1], dim=1)}


def describe_backbone(backbone: Mapping[str, Tensor]) -> str:
    """The MIT name whose dims and depths these tensors (original names) have, or the numbers themselves."""
    dims, depths = [], []
    for stage in STAGES:
        embed = backbone.get(f"patch_embed{stage}.proj.weight")
        dims.append(0 if embed is None else embed.shape[0])
        blocks = {name.split(".")[1] for name in backbone if name.startswith(f"block{stage}.")}
        depths.append(len(blocks))
    for name, shape in MIT.items():
        if list(shape.dims) == dims and list(shape.depths) == depths:
            return name
    return f"a MiT with {'/'.join(map(str, dims))} channels and {'/'.join(map(str, depths))} blocks"


def infer_config(native: Mapping[str, Tensor], where: str) -> tuple[ModelConfig, int]:
    """The ModelConfig and class count of a whole network, from its tensors alone.

    Raises:
        UserError: no known backbone, or no head of ours.
    """
    backbone = describe_backbone(_under(native, "backbone."))
    if backbone not in MIT:
        raise UserError(f"{where} holds {backbone}, which is none of {', '.join(MIT)}")
    for head, classifier in (("daformer", "conv_seg.weight"), ("segformer", "linear_pred.weight")):
        weight = native.get(f"decode_head.{classifier}")
        if weight is not None and weight.ndim == 4 and "decode_head.convs.0.conv.weight" not in native:
            return ModelConfig(backbone=backbone, head=head, channels=weight.shape[1]), weight.shape[0]
    if "decode_head.convs.0.conv.weight" in native:
        raise UserError(
            f"{where} has mmsegmentation 1.x's own SegFormer head, which computes something else than the published "
            "one: use the file as --model.weights, which takes its backbone"
        )
    raise UserError(f"{where} holds a {backbone} without a decode head: it can only serve as --model.weights")
