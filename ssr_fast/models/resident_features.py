"""A data set's stored features in the memory of a device, and views cut there as data/feature_map.py cuts them.

B views, T tokens, D channels, h w tokens of a view.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssr_fast.errors import UserError


class ResidentFeatures(nn.Module):
    """Cuts views out of features that stay where they are.

    Args:
        values: int8 or float16 [T, D].
        scales: float32 [T, 1], what the values of a token are multiplied with; None for float16.
        rows: h.

    Raises:
        UserError: `device` has not enough free memory.
    """

    values: Tensor
    scales: Tensor | None

    def __init__(
        self, values: NDArray[Any], scales: NDArray[np.float32] | None, rows: int, device: torch.device
    ) -> None:
        super().__init__()
        size = values.nbytes + (0 if scales is None else scales.nbytes)
        if device.type == "cuda" and size > (free := torch.cuda.mem_get_info(device)[0]):
            raise UserError(
                f"--sam.resident wants {size / 1e9:.1f} GB on {device}, with {free / 1e9:.1f} GB free: leave it out"
            )
        self.rows = rows
        self.register_buffer("values", torch.from_numpy(values).to(device), persistent=False)
        self.register_buffer(
            "scales", None if scales is None else torch.from_numpy(scales).to(device), persistent=False
        )

    @torch.no_grad()
    def forward(self, places: Tensor) -> Tensor:
        """places float64 [B, h + w, 3], see Residents.places -> float32 [B, D, h, w], channels-last in memory."""
        down, across = places.split([self.rows, places.shape[1] - self.rows], dim=1)
        token = [down[:, :, None, row] + across[:, None, :, column] for row in (0, 1) for column in (0, 1)]
        above_left, above_right, below_left, below_right = (self._tokens(one.to(torch.int64)) for one in token)
        lower = down[:, :, None, 2:].to(torch.float32)  # [B, h, 1, 1]
        right = across[:, None, :, 2:].to(torch.float32)
        lefts = above_left * (1 - lower) + below_left * lower
        rights = above_right * (1 - lower) + below_right * lower
        return (lefts * (1 - right) + rights * right).permute(0, 3, 1, 2)

    def _tokens(self, index: Tensor) -> Tensor:
        """int64 [B, h, w] -> float32 [B, h, w, D]."""
        flat = index.flatten()
        found = self.values.index_select(0, flat).to(torch.float32)
        if self.scales is not None:
            found = found * self.scales.index_select(0, flat)
        return found.view(*index.shape, -1)
