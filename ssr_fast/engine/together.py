"""A run of one process or many from its beginning to its end: they meet, work, and fall or finish together."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.parallel import ParallelConfig
from ssr_fast.engine.ranks import Ranks, first, join
from ssr_fast.engine.run_config import RunConfig, pick_device
from ssr_fast.engine.watch import At, Watch
from ssr_fast.errors import UserError

T = TypeVar("T")
Work = Callable[[Ranks, At, StopSignal | None], T]


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Around what every process of a machine finds before they have met: the first one tells the user's mistake."""
    try:
        yield
    except UserError as error:
        if first():
            raise
        raise UserError("") from error


def together(run: RunConfig, parallel: ParallelConfig, work: Work[T]) -> T:
    """Meet the other processes, if there are any, and do the work under watch.

    Args:
        run, parallel: the run's options.
        work: (ranks, told what the main thread is about to do, the signals to this process if it listens already) ->
            result.

    Returns:
        what `work` returned.

    Raises:
        UserError: a mistake of the user, or another process has died or failed; with the number of this rank in front,
            and empty where another rank tells it.
    """
    with told_once():
        device = pick_device(run.device)
    ranks = join(device.type, group=parallel.mode in ("ddp", "fsdp", "hsdp"))
    with (
        # around all: torchrun sends SIGTERM to those that are left, and they still have to say why
        StopSignal() if ranks.world > 1 else contextlib.nullcontext() as stop,
        Watch(ranks, timeout=parallel.hang_timeout, resume=f"--resume {run.dir}") as watch,
    ):
        try:
            result = work(ranks, watch.at, stop)
        except Exception as error:
            common = getattr(error, "common", False)
            if common:
                ranks.barrier()  # none is left alone while it still gets there
            if getattr(error, "told_elsewhere", False):
                raise UserError("") from error
            other = watch.explain(error) if not common else None
            if other is not None:
                raise other from error
            if not common:
                watch.failed(_sentence(error))
            if isinstance(error, UserError) and ranks.world > 1:
                raise UserError("\n".join(f"rank {ranks.rank}: {line}" for line in str(error).splitlines())) from error
            raise
    ranks.close()
    return result


def _sentence(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
