"""`cached_full`: the frozen encoder on whole, un-augmented images, each by itself.

A definition of its own, not a faster `online`: the encoder sees the image once, as a whole, without augmentation, and
training cuts the result. H W pixels, h w tokens, D channels.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssr_fast.data.augment import normalise_batch
from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.images import BadFile
from ssr_fast.data.stores import Recipe
from ssr_fast.errors import UserError
from ssr_fast.models.sam import SHAPES, SMALL_WEIGHTS, FrozenEncoder, SamConfig, build_sam, published_digest, sha256

GENERATOR = "cached_full"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_FORMAT = 1  # to be raised whenever the same options give other features
_PROBES = (64, 512)  # sides of the blank images that show how many pixels a token of an encoder of one's own has


class MapEncoder:
    """Features of a whole image, and where they lie.

    SAM's encoders see the image as segment-anything does: its longest side resized to theirs, padded to the square; the
    tokens that hold nothing of the image are left out. The small encoder sees the image as it is, and one of your own
    as `FrozenEncoder` would.

    Args:
        encoder: the encoder on its device, in the precision that it computes in.
        stride: pixels of its input a token.
        pads: resize the longest side to `encoder.size` and pad, as segment-anything does.
    """

    def __init__(self, encoder: FrozenEncoder, stride: int, pads: bool) -> None:
        self.encoder, self.stride, self.pads = encoder, stride, pads

    def __call__(self, path: Path, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Geometry]:
        """RGB uint8 [H, W, 3] -> features float32 [h, w, D] and their geometry; the path is for errors.

        Raises:
            BadFile: the encoder cannot take the image.
            UserError: the device has not enough memory.
        """
        height, width = image.shape[:2]
        if self.pads:
            assert self.encoder.size is not None
            image = longest_side(image, self.encoder.size)
        elif self.encoder.size is None and min(height, width) < self.stride:
            raise BadFile(path, f"is smaller than a token ({width}x{height} pixels)", "remove it")
        seen = (image.shape[1], image.shape[0])
        if not self.pads and self.encoder.size is not None:
            seen = (self.encoder.size, self.encoder.size)
        pixels = normalise_batch(torch.from_numpy(image)[None].to(self.encoder.device))  # [1, 3, H, W]
        if self.pads:
            pixels = F.pad(pixels, (0, self.encoder.size - seen[0], 0, self.encoder.size - seen[1]))
        try:
            features = self.encoder.encode(pixels)[0].permute(1, 2, 0)  # [h, w, D]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{pixels.device} has not enough memory to encode {path}: give --precision bf16 or --device cpu"
            ) from error
        return self._valid(path, features, seen), Geometry((width, height), seen, self.stride)

    def _valid(self, path: Path, features: Tensor, seen: tuple[int, int]) -> NDArray[np.float32]:
        """The tokens that hold some of the image."""
        whole = [-(-side // self.stride) for side in (seen[1], seen[0])]
        if self.pads:
            features = features[: whole[0], : whole[1]]
        found = list(features.shape[:2])
        if any(count not in (n, side // self.stride) for count, n, side in zip(found, whole, seen[::-1], strict=True)):
            problem = f"gets {found[1]}x{found[0]} tokens where {self.stride} pixels a token make {whole[1]}x{whole[0]}"
            raise BadFile(path, problem, "take an encoder whose tokens lie on a regular grid, or --sam.features online")
        return features.to(torch.float32).cpu().contiguous().numpy()


def longest_side(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] -> its longest side `size` pixels long, as segment-anything's ResizeLongestSide."""
    height, width = image.shape[:2]
    scale = size * 1.0 / max(height, width)
    new = int(width * scale + 0.5), int(height * scale + 0.5)
    return np.array(Image.fromarray(image).resize((max(1, new[0]), max(1, new[1])), Image.Resampling.BILINEAR))


def build_map_encoder(config: SamConfig, device: torch.device, precision: str) -> MapEncoder:
    """The encoder that the options describe, for whole images.

    Raises:
        UserError: as `build_sam`, or an encoder whose tokens are no whole number of pixels.
    """
    frozen = build_sam(config).to(device, PRECISIONS[precision])
    if ":" in config.encoder:
        return MapEncoder(frozen, _probed_stride(frozen, config), pads=False)
    shape = SHAPES["small" if config.encoder == "untrained" else config.encoder]
    return MapEncoder(frozen, shape.patch, pads=shape.absolute_positions)


def recipe(config: SamConfig, dtype: str, precision: str) -> Recipe:
    """What a store's features depend on.

    Args:
        config: the encoder.
        dtype: of the stored values, one of data.features.DTYPES.
        precision: that the encoder computes in, one of PRECISIONS.

    Raises:
        UserError: the checkpoint is missing or damaged, or the encoder cannot be built.
    """
    options = {**_identity(config), "weights_sha256": weights_digest(config), "dtype": dtype, "precision": precision}
    return Recipe(GENERATOR, {**options, "format": _FORMAT})


def weights_digest(config: SamConfig) -> str:
    """The sha256 of the encoder's weights: of their file, or of the tensors of an encoder without one.

    Raises:
        UserError: the file is missing or is not the one its name says; the encoder cannot be built.
    """
    if config.encoder == "small":
        return sha256(SMALL_WEIGHTS)
    if config.encoder.startswith("vit_"):
        path = Path(config.checkpoint).expanduser()
        if not path.is_file():
            raise UserError(f"--sam.checkpoint {path} does not exist; give the file that segment-anything publishes")
        return published_digest(path, "--sam.checkpoint") or sha256(path)
    digest = hashlib.sha256()
    for name, tensor in sorted(build_sam(config).encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_recipe(found: Recipe, config: SamConfig, option: str, with_weights: bool) -> None:
    """That a store's features are of the encoder that the run names.

    Args:
        found: the store's recipe.
        config: the run's encoder.
        option: that names the store, for errors.
        with_weights: compare the weights too: the run encodes some images itself, and must not mix two encoders.

    Raises:
        UserError: they are not.
    """
    if found.generator != GENERATOR or found.options.get("format") != _FORMAT:
        raise UserError(
            f"--{option} is a store of {found}, which is not what this version keeps; make it anew with --overwrite"
        )
    for name, wanted in _identity(config).items():
        if found.options.get(name) != wanted:
            raise UserError(
                f"--{option} holds features of the {name} {found.options.get(name)} and the run's is {wanted}; "
                f"{_cure(name, found.options.get(name), config)}, or give another store"
            )
    if with_weights and found.options.get("weights_sha256") != weights_digest(config):
        raise UserError(
            f"--{option} holds features of other weights than {config.checkpoint or config.encoder}, which encodes the "
            f"mixed images; give the weights that the store was made with, or --sam.mixed composed"
        )


def _cure(name: str, stored: Any, config: SamConfig) -> str:
    """What makes the run's encoder the one of a store."""
    if name == "encoder":
        return f"give --sam.encoder {stored}"
    default = _identity(dataclasses.replace(config, input_size=None))["size"]
    return "leave --sam.input_size out" if stored == default else f"give --sam.input_size {stored}"


def _identity(config: SamConfig) -> dict[str, str | int | None]:
    """Encoder and the side of the square that it sees; None: images as they are."""
    if ":" in config.encoder:
        return {"encoder": config.encoder, "size": config.input_size}
    shape = SHAPES["small" if config.encoder == "untrained" else config.encoder]
    return {"encoder": config.encoder, "size": (config.input_size or shape.size) if shape.absolute_positions else None}


def _probed_stride(encoder: FrozenEncoder, config: SamConfig) -> int:
    """Pixels a token of an encoder of one's own, measured on blank images.

    Raises:
        UserError: it is no whole number, or not the same in both directions.
    """
    sides = [encoder.size] if encoder.size is not None else list(_PROBES)
    grids = []
    for side in sides:
        blank = torch.zeros(1, 3, side, side, device=encoder.device)
        grids.append(tuple(encoder.encode(blank).shape[-2:]))
    side, rows, columns = sides[-1], *grids[-1]
    if len(sides) > 1:
        side, rows, columns = side - sides[0], rows - grids[0][0], columns - grids[0][1]
    if rows != columns or rows < 1 or side % rows:
        seen = " and ".join(f"{g[1]}x{g[0]} tokens for {s}x{s} pixels" for s, g in zip(sides, grids, strict=True))
        raise UserError(
            f"--sam.encoder {config.encoder} gives {seen}, no whole number of pixels a token, which cached_full needs; "
            f"give another --sam.input_size, or train with --sam.features online"
        )
    return side // rows
