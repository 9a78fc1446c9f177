"""Counter-based noise for stochastic layers: drop path and dropout without a generator's hidden state."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssr_kernels import counter


class Noise(nn.Module):
    """The key that every stochastic layer of one network shares; the training method writes it once a step.

    The key is a non-persistent buffer: it follows the network to its device and is not part of a checkpoint,
    because it is a function of (seed, step, rank).
    """

    key: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def uniform(self, stream: int, shape: Sequence[int]) -> Tensor:
        """float32 uniforms in [0, 1) of `shape`, a pure function of (key, stream, position)."""
        return counter.uniform(self.key, stream, shape)


class DropPath(nn.Module):
    """Stochastic depth: the branch of each sample is kept with probability 1 - p and scaled by 1 / (1 - p).

    Args:
        p: probability of dropping, in [0, 1).
        noise: the network's noise.
        stream: this layer's number in the network.
    """

    def __init__(self, p: float, noise: Noise, stream: int) -> None:
        super().__init__()
        self.p, self.noise, self.stream = p, noise, stream

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if self.p == 0.0 or not self.training:
            return x
        keep = self.noise.uniform(self.stream, (x.shape[0],) + (1,) * (x.ndim - 1)) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))


class ChannelDropout(nn.Module):
    """Dropout2d: whole channels are dropped with probability p, the others scaled by 1 / (1 - p)."""

    def __init__(self, p: float, noise: Noise, stream: int) -> None:
        super().__init__()
        self.p, self.noise, self.stream = p, noise, stream

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        if self.p == 0.0 or not self.training:
            return x
        keep = self.noise.uniform(self.stream, (x.shape[0], x.shape[1], 1, 1)) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))
