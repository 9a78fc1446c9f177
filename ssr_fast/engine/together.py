"""A run of one process or many from its beginning to its end: they meet, work, and fall or finish together."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

from ssr_fast.engine.guard import StopSignal
from ssr_fast.engine.parallel import GROUPED, ParallelConfig
from ssr_fast.engine.ranks import Ranks, first, is_common, is_told_elsewhere, join
from ssr_fast.engine.run_config import RunConfig, pick_device
from ssr_fast.engine.watch import At, Watch
from ssr_fast.errors import UserError

TOGETHER = timedelta(seconds=30)
"""How long a rank waits, at its end, for the others to get to the same mistake."""
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
    ranks = join(device.type, group=parallel.mode in GROUPED)
    try:
        with (
            # around all: torchrun sends SIGTERM to those that are left, and they still have to say why
            StopSignal() if ranks.world > 1 else contextlib.nullcontext() as stop,
            Watch(ranks, timeout=parallel.hang_timeout, resume=f"--resume {run.dir}") as watch,
        ):
            try:
                result = work(ranks, watch.at, stop)
            except Exception as error:
                if not is_common(error):
                    other = watch.explain(error)
                    if other is not None:
                        raise other from error
                    watch.failed(_sentence(error))
                raise
    except Exception as error:
        if is_common(error):
            with contextlib.suppress(RuntimeError):  # a rank that dies meanwhile changes nothing about the mistake
                ranks.barrier(TOGETHER)  # behind the watch, which would miss a rank that ends before it
        told = _as_told(error, ranks)
        if told is error:
            raise
        raise told from error
    ranks.close()
    return result


def _as_told(error: Exception, ranks: Ranks) -> Exception:
    """An error as this rank tells it: a user's mistake with its number, and nothing where another rank tells it."""
    if is_told_elsewhere(error):
        return UserError("")
    text = str(error)
    if not isinstance(error, UserError) or ranks.world == 1 or text.startswith("rank "):
        return error
    return UserError("\n".join(f"rank {ranks.rank}: {line}" for line in text.splitlines()))


def _sentence(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
