"""segment-anything's encoder with random weights, ours with the same, and what an operator returned at most."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssr_fast.models.sam import SHAPES, SamShape, build_vit
from ssr_fast.models.sam_encoder import SamEncoder

SMALL = SHAPES["small"]
STRUCTURE = SamShape(128, 16, 32, 4, 4, 4.0, 16, 3, (1, 3))
"""SAM's: absolute positions, windows that need padding, global blocks in between and at the end."""
CASES = {
    "trained size": (SMALL, (192, 192)),
    "not square, interpolated tables": (SMALL, (96, 192)),
    "windows with padding": (SMALL, (104, 72)),
    "smaller than a window": (SMALL, (16, 24)),
    "one token": (SMALL, (8, 8)),
    "SAM's structure": (STRUCTURE, (128, 128)),
    "heads of 20": (SamShape(64, 16, 40, 2, 2, 4.0, 8, 3, (1,)), (64, 64)),
}


def random_encoder(shape: SamShape, seed: int = 0) -> nn.Module:
    """segment-anything's encoder, frozen, with random positions too, which it initialises with zeros."""
    torch.manual_seed(seed)
    encoder = build_vit(shape).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return encoder


def ours(encoder: nn.Module, shape: SamShape, form: str = "low_rank") -> SamEncoder:
    """Our encoder with the weights and in the type of another."""
    found = SamEncoder(shape, form).eval().requires_grad_(False)
    found.load_state_dict(encoder.state_dict())
    return found.to(next(encoder.parameters()).dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in float64."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result
