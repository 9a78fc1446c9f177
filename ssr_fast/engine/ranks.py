"""The processes that train together, as one of them sees it: who it is, and what they tell each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssr_fast.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for another one in a collective: the watch (engine/watch.py) decides what is too long."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`.

    Attributes:
        rank: its number.
        world: how many train together.
        local: its number on its machine, which is that of its GPU.
        control: a group on the CPU, of all ranks, for Python objects and flags; None for a process alone.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the run directory and speaks for all."""
        return self.rank == 0

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its result, or raise its error, on every rank.

        Args:
            action: its result, or the error that it raises, is pickled.
        """
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise self.common(outcome[1])
        result: T = outcome[0]
        return result

    def first_then_others(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, and then on the others, which find the files that it has made."""
        made: list[T] = []
        self.on_first(lambda: made.append(action()))
        return made[0] if made else action()

    def common(self, error: Exception) -> Exception:
        """An error that every rank raises at this place; marked: only rank 0 tells it, and they end together."""
        error.common = True  # type: ignore[attr-defined]
        if not self.first:
            error.told_elsewhere = True  # type: ignore[attr-defined]
        return error

    def mean_(self, values: Tensor) -> None:
        """Replace a tensor by its mean over the ranks, on its device and without waiting for it."""
        if self.world > 1:
            dist.all_reduce(values)
            values.div_(self.world)

    def sum_(self, values: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(values)

    def max_(self, values: Tensor) -> None:
        """Replace a tensor by its largest value over the ranks."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)

    def barrier(self, patience: timedelta = PATIENCE) -> None:
        """Wait for every rank.

        Raises:
            RuntimeError: one has died, or has not come in time.
        """
        if self.control is not None:
            dist.monitored_barrier(self.control, timeout=patience)

    def close(self) -> None:
        """Leave the other ranks; the last thing that a process does with them."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_common(error: BaseException) -> bool:
    """Whether every rank raises it, see Ranks.common."""
    return getattr(error, "common", False)


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether rank 0 tells it."""
    return getattr(error, "told_elsewhere", False)


def launched() -> int:
    """Number of processes that torchrun (or whoever sets WORLD_SIZE) has started; 1 without it.

    Raises:
        UserError: the variable is no number of processes.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE must be a number of processes (it is {text!r}): start them with torchrun")
    return int(text)


def first() -> bool:
    """Whether this process speaks for its machine before the processes have met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def join(device_type: str, group: bool = False) -> Ranks:
    """Meet the other processes that torchrun has started, by the variables that it sets; alone without it.

    Args:
        device_type: "cuda" (they talk by NCCL, each with the GPU of its local rank) or "cpu" (gloo).
        group: make a process group for a process alone too, as DistributedDataParallel and fully_shard need one.

    Raises:
        UserError: a variable is missing, or there are more processes on this machine than GPUs.
    """
    if launched() == 1:
        if group:
            backend = "nccl" if device_type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Ranks()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {launched()} and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: "
            "start the processes with torchrun, which sets them"
        )
    local = int(os.environ["LOCAL_RANK"])
    gpu = None
    if device_type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own (there are {torch.cuda.device_count()}): "
                f"give torchrun --nproc-per-node {max(1, torch.cuda.device_count())}"
            )
        gpu = torch.device("cuda", local)
        torch.cuda.set_device(gpu)
        # else NCCL ends the processes that are left when one dies, before they can say which
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=PATIENCE)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), local, control)
