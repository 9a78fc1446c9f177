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


class StochasticDepth(nn.Module):
    """Stochastic depth of a whole network: branch i of each sample is kept with probability 1 - rates[i] and scaled by
    1 / (1 - rates[i]). All branches are drawn at once: one by one they are thousands of operators in a step.

    Args:
        rates: probability of dropping of each branch, in [0, 1); branch i has the noise's stream i.
        noise: the network's noise.
    """

    rate: Tensor
    kept: Tensor

    def __init__(self, rates: Sequence[float], noise: Noise) -> None:
        super().__init__()
        self.rates, self.noise = tuple(rates), noise
        self.register_buffer("rate", torch.tensor(self.rates)[:, None], persistent=False)
        self.register_buffer("kept", torch.tensor([1.0 - rate for rate in self.rates])[:, None], persistent=False)
        self.active = any(rate > 0 for rate in self.rates)

    def disable(self) -> None:
        """Keep every branch from now on, in training too."""
        self.active = False

    def forward(self, batch: int, dtype: torch.dtype) -> Tensor | None:
        """The branches' factors [branches, batch]; None where every branch is kept as it is."""
        if not self.active or not self.training:
            return None
        keep = counter.uniform_streams(self.noise.key, len(self.rates), batch) >= self.rate
        return (keep.to(self.kept.dtype) / self.kept).to(dtype)


class ChannelDropout(nn.Module):
    """Dropout2d: whole channels are dropped with probability p, the others scaled by 1 / (1 - p)."""

    def __init__(self, p: float, noise: Noise, stream: int) -> None:
        super().__init__()
        self.p, self.noise, self.stream = p, noise, stream

    def disable(self) -> None:
        """Keep every channel from now on, in training too."""
        self.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        if self.p == 0.0 or not self.training:
            return x
        keep = self.noise.uniform(self.stream, (x.shape[0], x.shape[1], 1, 1)) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))
