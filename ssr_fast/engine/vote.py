"""A stop that all ranks make at the same step, whichever of them was asked for it."""

import signal

import torch
import torch.distributed as dist

from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.ranks import Ranks


class Vote:
    """Asks all ranks, again and again, whether one of them has received a signal.

    Every rank must call as often as the others. The answer is that of the call before: it has arrived by now, so nobody
    waits for it, and it is the same on every rank.

    Args:
        stop: this rank's signals.
        ranks: who votes.
    """

    def __init__(self, stop: StopSignal, ranks: Ranks) -> None:
        self._stop, self._ranks = stop, ranks
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self) -> str | None:
        """The name of a signal that a rank had received by the call before (a process alone: by now), or None."""
        if self._ranks.world == 1:
            return self._stop.requested
        former = self._asked
        number = signal.Signals[self._stop.requested].value if self._stop.requested else 0
        flag = torch.tensor(number, dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        assert work is not None
        self._asked = flag, work
        if former is None:
            return None
        former[1].wait()
        return signal.Signals(int(former[0])).name if int(former[0]) else None

    def close(self) -> None:
        """Wait for the last answer, which nobody wants any more."""
        if self._asked is not None:
            self._asked[1].wait()
            self._asked = None
