"""The frozen image encoder that regularises the student: SAM as segment-anything builds it, or any module of its form.

B batch, D feature channels (256 for SAM's neck), h w feature pixels (64 x 64 for SAM).
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ssr_fast.errors import UserError
from ssr_fast.models.sam_encoder import SamEncoder
from ssr_fast.models.sam_forms import FORMS
from ssr_fast.models.weights import read_tensors

SMALL_WEIGHTS = Path(__file__).with_name("sam_small.safetensors")


@dataclass(frozen=True)
class SamShape:
    """Constructor values of segment_anything's ImageEncoderViT.

    Without absolute positions an encoder takes images of any size, else squares of side `size` only.
    """

    size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    out: int
    window: int
    global_blocks: tuple[int, ...]
    absolute_positions: bool = True


SHAPES = {
    "vit_b": SamShape(1024, 16, 768, 12, 12, 4.0, 256, 14, (2, 5, 8, 11)),
    "vit_l": SamShape(1024, 16, 1024, 24, 16, 4.0, 256, 14, (5, 11, 17, 23)),
    "vit_h": SamShape(1024, 16, 1280, 32, 16, 4.0, 256, 14, (7, 15, 23, 31)),
    "small": SamShape(192, 8, 96, 3, 3, 4.0, 64, 6, (1, 2), absolute_positions=False),
}
HALF_SIZE = 512
"""The one other size of images that SAM's encoders can be asked to take."""
KNOWN_FILES = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}


@dataclass(kw_only=True)
class SamConfig:
    """The regulariser's frozen encoder; the options `--sam.*`."""

    encoder: str = "vit_b"
    """vit_b, vit_l or vit_h (need a checkpoint), small (the demo's, ships with the package), untrained (small with
    random weights: a control), or package.module:function, a function that returns an nn.Module mapping images
    [B, 3, H, W] (normalised as the student's) to features [B, D, h, w]."""
    checkpoint: str = ""
    """Weights of vit_b, vit_l or vit_h: the file that segment-anything publishes."""
    input_size: int | None = None
    """Side of the square that images are resized to before an encoder of your own; unset: images go in as they are.
    SAM's encoders take 1024 x 1024; 512 makes vit_b, vit_l and vit_h take 512 x 512, with interpolated positions: other
    features, 32 x 32 of them, at about a quarter of the work. The small one takes images of any size."""
    attention: str = "low_rank"
    """How the encoder's attention is computed (models/sam_forms.py): low_rank, flex, mask or xformers."""
    standardise: bool = False
    """Give each feature channel zero mean and unit variance over the batch before the alignment."""
    features: str = "online"
    """online: every image is encoded in every step. cached_views: a source view and its mirror image are encoded when
    they first come and kept in memory, for a few hundred images whose crops repeat; mixed images stay online.
    cached_full: whole images are encoded once, by `python -m ssr_fast.prepare features`, and their features are cut and
    mirrored as the images are. That is another target than online, not a faster way to the same."""
    mixed: str = "online"
    """With cached_full, the features of mixed images. online: encoded in every step. composed: those of the source
    where a source class is pasted, of the target elsewhere, by shares of a token: an approximation, which encodes
    nothing, so that training needs no encoder."""
    resident: bool = False
    """With cached_full, keep the stored features in the memory of the training device, 16 GB for GTA5 and Cityscapes in
    int8, and cut them there: the loader reads none and sends none."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        known = ("vit_b", "vit_l", "vit_h", "small", "untrained")
        if self.encoder not in known and ":" not in self.encoder:
            found.append(
                f"--{where}.encoder must be one of {', '.join(known)} or package.module:function (it is {self.encoder})"
            )
        if self.encoder.startswith("vit_") and not self.checkpoint and self.features != "cached_full":
            found.append(
                f"--{where}.checkpoint is missing: --{where}.encoder {self.encoder} needs segment-anything's file"
            )
        if self.checkpoint and not self.encoder.startswith("vit_"):
            found.append(f"--{where}.checkpoint has no effect with --{where}.encoder {self.encoder}: leave one out")
        if self.features not in ("online", "cached_views", "cached_full"):
            found.append(f"--{where}.features must be online, cached_views or cached_full (it is {self.features})")
        if self.mixed not in ("online", "composed"):
            found.append(f"--{where}.mixed must be online or composed (it is {self.mixed})")
        if self.resident and self.features != "cached_full":
            found.append(
                f"--{where}.resident keeps stored features, of which --{where}.features {self.features} has none: "
                f"leave it out"
            )
        return found + self._size_problems(where) + self._attention_problems(where)

    def _size_problems(self, where: str) -> list[str]:
        if self.input_size is None:
            return []
        if self.encoder.startswith("vit_"):
            wrong = f"--{where}.input_size must be 512 or unset, which is 1024, with --{where}.encoder {self.encoder}"
            return [] if self.input_size == HALF_SIZE else [f"{wrong} (it is {self.input_size})"]
        if ":" not in self.encoder:
            return [f"--{where}.input_size has no effect with --{where}.encoder {self.encoder}: leave it out"]
        return [] if self.input_size >= 32 else [f"--{where}.input_size must be at least 32 (it is {self.input_size})"]

    def _attention_problems(self, where: str) -> list[str]:
        if self.attention not in FORMS:
            return [f"--{where}.attention must be one of {', '.join(FORMS)} (it is {self.attention})"]
        if self.attention != "low_rank" and ":" in self.encoder:
            return [f"--{where}.attention has no effect with --{where}.encoder {self.encoder}: leave it out"]
        return []

    def encodes(self, domains: str) -> bool:
        """Whether training encodes any image itself; domains: which images are regularised, as `SsrConfig.domains`."""
        return self.features != "cached_full" or (domains != "source" and self.mixed == "online")


def build_vit(shape: SamShape) -> nn.Module:
    """segment_anything's own image encoder of the given shape, with random weights: what ours is measured against."""
    # it imports torchvision, which takes seconds
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=shape.size,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.mlp_ratio,
        out_chans=shape.out,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_abs_pos=shape.absolute_positions,
        use_rel_pos=True,
        rel_pos_zero_init=True,
        window_size=shape.window,
        global_attn_indexes=shape.global_blocks,
    )


class FrozenEncoder(nn.Module):
    """A frozen encoder with its input resize: images [B, 3, H, W] -> features [B, h, w, D], without gradient.

    Args:
        encoder: maps [B, 3, S, S] to [B, D, h, w].
        size: S; None passes the images as they are.
        standardise: zero mean, unit variance per channel over the batch.
    """

    def __init__(self, encoder: nn.Module, size: int | None, standardise: bool) -> None:
        super().__init__()
        self.encoder, self.size, self.standardise = encoder.eval(), size, standardise
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the encoder stands; the CPU if it has no parameters."""
        return next((p.device for p in self.encoder.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters; float32 if it has none."""
        return next((p.dtype for p in self.encoder.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """A frozen encoder never leaves eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised -> features [B, h, w, D] (channels last)."""
        return self.finish(self.encode(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised -> the encoder's own output [B, D, h, w], each image by itself."""
        images = images.contiguous()  # one layout, so that an image's features do not depend on where it comes from
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = resize_frozen(images, (self.size, self.size))
        features: Tensor = self.encoder(images.to(self.dtype))
        return features

    @torch.no_grad()
    def finish(self, features: Tensor) -> Tensor:
        """The encoder's output [B, D, h, w] of a whole batch -> what is aligned to, dense [B, h, w, D]."""
        return alignment_target(features, self.standardise)

    @torch.no_grad()
    def channels(self) -> int:
        """D, measured on one blank image."""
        size = self.size or 64
        return int(self.encoder(torch.zeros(1, 3, size, size, device=self.device)).shape[1])


def resize_frozen(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation, align_corners False, of maps [B, C, h, w] without a gradient.

    Not F.interpolate, which on a GPU takes a slow way where kernels must be deterministic; its forward kernel is.
    """
    resized: Tensor = torch.ops.aten.upsample_bilinear2d(maps, size, False)
    return resized


def alignment_target(features: Tensor, standardise: bool) -> Tensor:
    """An encoder's features [B, D, h, w] of a whole batch -> what is aligned to, dense [B, h, w, D].

    Args:
        features: without gradient.
        standardise: zero mean, unit variance per channel over the batch.
    """
    features = features.permute(0, 2, 3, 1)
    if standardise:
        std, mean = torch.std_mean(features.to(torch.float32), dim=(0, 1, 2), keepdim=True, correction=0)
        features = ((features - mean) / (std + 1e-6)).to(features.dtype)
    return features.contiguous()  # the kernels take rows; the encoder's convolutions end in planes


def build_sam(config: SamConfig) -> FrozenEncoder:
    """Build the frozen encoder that the options describe.

    Raises:
        UserError: the checkpoint is missing, of another model or has a wrong hash; the function cannot be imported.
    """
    if ":" in config.encoder:
        return FrozenEncoder(_custom(config.encoder), config.input_size, config.standardise)
    shape = SHAPES["small" if config.encoder == "untrained" else config.encoder]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SamEncoder(shape, config.attention)
    if config.encoder != "untrained":
        path = SMALL_WEIGHTS if config.encoder == "small" else Path(config.checkpoint)
        _load(encoder, path, config.encoder)
    if config.input_size is not None:
        encoder.resize(config.input_size)
    size = config.input_size or shape.size
    return FrozenEncoder(encoder, size if shape.absolute_positions else None, config.standardise)


def _custom(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        build: Callable[[], nn.Module] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--sam.encoder {name} cannot be imported ({error}): give package.module:function") from error
    encoder = build()
    if not isinstance(encoder, nn.Module):
        raise UserError(f"--sam.encoder {name} returned a {type(encoder).__name__}: it must return an nn.Module")
    return encoder


def published_digest(path: Path, option: str) -> str | None:
    """The sha256 of a file that is named like one segment-anything publishes; None for other names and no file.

    Raises:
        UserError: it is not that file.
    """
    if path.name not in KNOWN_FILES or not path.is_file():
        return None
    digest = sha256(path)
    if digest != KNOWN_FILES[path.name]:
        raise UserError(
            f"{option} {path} is damaged: its sha256 is {digest[:12]}..., "
            f"segment-anything's is {KNOWN_FILES[path.name][:12]}...; download it again"
        )
    return digest


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _load(encoder: nn.Module, path: Path, name: str) -> None:
    """Load `image_encoder.*` (segment-anything's files) or bare keys (ours) strictly."""
    published_digest(path, "--sam.checkpoint")
    tensors = read_tensors(path)
    prefix = "image_encoder."
    if any(key.startswith(prefix) for key in tensors):
        tensors = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    wanted = encoder.state_dict()
    for key, value in wanted.items():
        found = tensors.get(key)
        if found is None or found.shape != value.shape:
            shape = "absent" if found is None else str(tuple(found.shape))
            raise UserError(
                f"--sam.checkpoint {path} is not a {name} encoder: {key} should be {tuple(value.shape)} and is "
                f"{shape}; choose --sam.encoder to match the file"
            )
    encoder.load_state_dict({key: tensors[key].to(torch.float32) for key in wanted})
