"""Where the released loop's random decisions come from: the host's generator, or the numbers that our step draws.

B images of a pass, C channels, K classes.
"""

from typing import Protocol

import torch
from torch import Tensor

from ssr_fast.methods.method import step_key
from ssr_fast.methods.self_training import SelfTraining
from ssr_kernels import counter


class Draws(Protocol):
    """The random decisions of one step; uniform numbers are float32 in [0, 1), on the method's device."""

    def begin(self, method: SelfTraining, step: int) -> None:
        """What follows is of this step."""

    def enter(self, part: int, batch: int) -> None:
        """What follows is of the student's pass over the source (0) or the mixed images (1), `batch` of them."""

    def branch(self, number: int) -> Tensor:
        """[B, 1, 1, 1]: which images keep a branch of a block."""

    def branches(self, count: int) -> Tensor:
        """[count, B]: the same for all branches at once."""

    def channels(self, stream: int, count: int) -> Tensor:
        """[B, C, 1, 1]: which channels are kept in front of the classifier."""

    def classes(self, image: int, images: int, present: Tensor) -> Tensor:
        """Those of the classes [n] present in image number `image` of `images` that are pasted."""

    def augmentation(self) -> Tensor:
        """int64 scalar: the key of strong_augment."""


class HostDraws:
    """As the released loop draws: from torch's generator, each decision when it is needed."""

    def begin(self, method: SelfTraining, step: int) -> None:
        self.device = method.key.device

    def enter(self, part: int, batch: int) -> None:
        self.batch = batch

    def branch(self, number: int) -> Tensor:
        return torch.rand((self.batch, 1, 1, 1), device=self.device)

    def branches(self, count: int) -> Tensor:
        return torch.rand((count, self.batch), device=self.device)

    def channels(self, stream: int, count: int) -> Tensor:
        return torch.rand((self.batch, count, 1, 1), device=self.device)

    def classes(self, image: int, images: int, present: Tensor) -> Tensor:
        return present[torch.randperm(len(present), device=self.device)[: (len(present) + 1) // 2]]

    def augmentation(self) -> Tensor:
        return torch.randint(2**32, (), device=self.device)


class CounterDraws:
    """The numbers that our step draws for the same seed, step and rank: both loops then see the same step.

    Ours takes source and mixed images in one pass, so that the mixed ones' numbers follow the source's.
    """

    def begin(self, method: SelfTraining, step: int) -> None:
        key = step_key(method.seed, step, 0)
        self.class_count = method.class_count
        self.noise, self.mixing = (torch.full_like(method.key, counter.fold(key, stream)) for stream in (1, 2))

    def enter(self, part: int, batch: int) -> None:
        self.total, self.rows = 2 * batch, slice(part * batch, (part + 1) * batch)

    def branch(self, number: int) -> Tensor:
        return counter.uniform(self.noise, number, (self.total, 1, 1, 1))[self.rows]

    def branches(self, count: int) -> Tensor:
        return counter.uniform_streams(self.noise, count, self.total)[:, self.rows]

    def channels(self, stream: int, count: int) -> Tensor:
        return counter.uniform(self.noise, stream, (self.total, count, 1, 1))[self.rows]

    def classes(self, image: int, images: int, present: Tensor) -> Tensor:
        present = present[present < self.class_count]  # ignored pixels are never pasted
        score = counter.uniform(counter.fold(self.mixing, 1), 0, (images, 256))[image]
        order = score[present.to(torch.int64)].argsort(stable=True)
        return present[order[: (len(present) + 1) // 2]]

    def augmentation(self) -> Tensor:
        return counter.fold(self.mixing, 2)
