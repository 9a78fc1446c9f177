"""SAM's automatic masks as segments: segment-anything's SamAutomaticMaskGenerator on its published checkpoints.

H W pixels, S segments. PyTorch and segment-anything are imported where they are used: the command line that only reads
the options here need not wait for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.segments import MAX_SEGMENTS, compact
from ssr_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import Sam

MODELS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
"""Width of the image encoder -> SAM's model."""


@dataclass(kw_only=True, frozen=True)
class SamMaskConfig:
    """How SAM's masks are drawn; the options of `prepare masks --generator sam`, named as segment-anything's own."""

    points_per_side: int = field(default=32, metadata={"help": "points along one side of the grid of prompts"})
    pred_iou_thresh: float = field(
        default=0.86,
        metadata={"help": "masks whose quality SAM itself predicts below this are left out"},
    )
    stability_score_thresh: float = field(
        default=0.92,
        metadata={"help": "masks that change with the cut-off by more than this allows are left out"},
    )
    crop_n_layers: int = field(
        default=1,
        metadata={"help": "0: the whole image only; 1: its four quarters too, which finds small things"},
    )
    crop_n_points_downscale_factor: int = field(
        default=1,
        metadata={"help": "points along one side of a crop: points_per_side divided by this, once for each layer"},
    )
    min_mask_region_area: int = field(
        default=100,
        metadata={"help": "holes and islands of a mask below this many pixels are removed"},
    )

    def problems(self) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        for name in ("points_per_side", "crop_n_points_downscale_factor"):
            if getattr(self, name) < 1:
                found.append(f"{_option(name)} must be at least 1 (it is {getattr(self, name)})")
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{_option(name)} must lie in [0, 1] (it is {getattr(self, name)})")
        for name in ("crop_n_layers", "min_mask_region_area"):
            if getattr(self, name) < 0:
                found.append(f"{_option(name)} must not be negative (it is {getattr(self, name)})")
        if not found and self.points_per_side // self.crop_n_points_downscale_factor**self.crop_n_layers < 1:
            found.append(
                f"--crop-n-points-downscale-factor {self.crop_n_points_downscale_factor} leaves no points in the "
                f"crops of layer {self.crop_n_layers}: it must be smaller, or --points-per-side larger"
            )
        return found


def checkpoint_digest(path: Path) -> str:
    """The sha256 of SAM's checkpoint, by which a store knows the weights that made it.

    Raises:
        UserError: there is no such file, or it has the name of a published one and is another.
    """
    from ssr_fast.models.sam import published_digest, sha256

    if not path.is_file():
        raise UserError(f"--sam-checkpoint {path} does not exist; give the file that segment-anything publishes")
    return published_digest(path, "--sam-checkpoint") or sha256(path)


def pick_device(name: str, local_rank: int) -> "torch.device":
    """The device of an option's value; auto and cuda are this process's GPU of its machine.

    Raises:
        UserError: no such device.
    """
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N (it is {name})")
    count = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    index = int(number) if number else local_rank % max(1, count)
    if index >= count:
        raise UserError(f"--device {name} asks for a GPU and PyTorch finds {count or 'none'}; give auto or another")
    return torch.device("cuda", index)


def load_sam(path: Path, model: str, device: "torch.device") -> "Sam":
    """SAM with its prompt encoder and mask decoder from segment-anything's file, tensors only.

    Args:
        path: the file.
        model: vit_b, vit_l, vit_h, or auto: as the file's tensors say.
        device: where it goes.

    Raises:
        UserError: the file is missing, damaged, no SAM, or of another model.
    """
    from segment_anything import sam_model_registry

    from ssr_fast.models.sam_attention import use_low_rank_attention
    from ssr_fast.models.weights import read_tensors

    tensors = read_tensors(path)
    if model == "auto":
        position = tensors.get("image_encoder.pos_embed")
        width = 0 if position is None else position.shape[-1]
        if width not in MODELS:
            raise UserError(
                f"--sam-checkpoint {path} is no SAM: image_encoder.pos_embed is "
                f"{'absent' if position is None else tuple(position.shape)}; give segment-anything's file"
            )
        model = MODELS[width]
    sam = sam_model_registry[model]()
    wanted = sam.state_dict()
    for key, value in wanted.items():
        found = tensors.get(key)
        if found is None or found.shape != value.shape:
            raise UserError(
                f"--sam-checkpoint {path} is not {model}: {key} should be {tuple(value.shape)} and is "
                f"{'absent' if found is None else tuple(found.shape)}; give --sam-model to match the file, or auto"
            )
    sam.load_state_dict({key: tensors[key] for key in wanted})
    use_low_rank_attention(sam.image_encoder)  # the same numbers without its attention maps
    return sam.to(device).eval()


class SamMasks:
    """Draws segments: RGB uint8 [H, W, 3] -> uint16 [H, W], 1..S from large to small, 0 where SAM finds none.

    Args:
        sam: from `load_sam`.
        config: the options.
        points_per_batch: prompts decoded at a time: speed and memory, not the result.
    """

    def __init__(self, sam: "Sam", config: SamMaskConfig, points_per_batch: int) -> None:
        self._generator = _generator(sam, config, points_per_batch)

    def __call__(self, path: Path, image: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """The segments of one image; its path plays no part."""
        from segment_anything.utils.amg import rle_to_mask

        # run lengths: hundreds of whole masks of a large image would take gigabytes
        found: list[dict[str, Any]] = self._generator.generate(image)
        masks = [(int(one["area"]), one["segmentation"]) for one in found]
        return paint([area for area, _ in masks], lambda k: rle_to_mask(masks[k][1]), image.shape[:2])


def paint(areas: Sequence[int], mask: Callable[[int], NDArray[np.bool_]], size: tuple[int, int]) -> NDArray[np.uint16]:
    """Masks over one another, large to small, so that the small ones stay visible.

    Args:
        areas: pixels of each mask; beyond 65535 masks the largest are painted.
        mask: number -> the mask, bool [H, W].
        size: (H, W).

    Returns:
        uint16 [H, W], 1..S in the order of painting without those that nothing is left of, 0 where no mask is.
    """
    order = sorted(range(len(areas)), key=lambda k: -areas[k])[:MAX_SEGMENTS]
    ids = np.zeros(size, np.uint16)
    for number, k in enumerate(order, 1):
        ids[mask(k)] = number
    return compact(ids)


def _generator(sam: "Sam", config: SamMaskConfig, points_per_batch: int) -> "SamAutomaticMaskGenerator":
    from segment_anything import SamAutomaticMaskGenerator

    class Generator(SamAutomaticMaskGenerator):
        """Takes images in which no crop has a mask: segment-anything fails on their list of crop boxes."""

        def _process_crop(self, *arguments: Any) -> Any:
            data = super()._process_crop(*arguments)
            data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4)
            return data

    return Generator(sam, points_per_batch=points_per_batch, output_mode="uncompressed_rle", **asdict(config))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
