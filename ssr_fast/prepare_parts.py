"""What the commands of `python -m ssr_fast.prepare` that make a store have in common."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssr_fast.data.class_stats import STATS_FILE, read_rcs_files
from ssr_fast.data.index import Index
from ssr_fast.data.layouts import Layout
from ssr_fast.errors import UserError


def tell(message: str) -> None:
    """One line that is not the result."""
    print(message, file=sys.stderr)


def compare_stats(index: Index) -> str:
    """Whether DAFormer's class statistics in the data set's folder agree with its labels, in a sentence."""
    try:
        read_rcs_files(index.layout.root, index)
    except UserError as error:
        return f"{error} (it is not used: labels are counted)"
    return f"{STATS_FILE} agrees with the labels"


def check_place(out: Path | None, layout: Layout, images: Iterable[Path]) -> None:
    """The files of a store must not lie among the images, where the next look at the data set would take them for some.

    Raises:
        UserError: they would.
    """
    if out is None:
        return
    for top in {layout.root / image.relative_to(layout.root).parts[0] for image in images}:
        if out.resolve().is_relative_to(top.resolve()):
            raise UserError(f"--out {out} lies among the images in {top}; give a folder beside them")


def shard(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size: the options, else what torchrun says, else 0 and 1.

    Raises:
        UserError: one without the other, or no legal numbers.
    """
    if (rank is None) != (world is None):
        raise UserError("--rank and --world must be given together; leave both out for a single process")
    if rank is not None and world is not None:
        where = f"--rank {rank} --world {world}"
    else:
        where = f"RANK={environment.get('RANK', '')} WORLD_SIZE={environment.get('WORLD_SIZE', '')}"
        try:
            rank, world = int(environment.get("RANK") or 0), int(environment.get("WORLD_SIZE") or 1)
        except ValueError as error:
            raise UserError(f"{where} are no numbers; unset them, or give --rank and --world") from error
    if not 0 <= rank < world:
        raise UserError(f"{where} names no shard; the rank must lie in 0 .. world - 1")
    return rank, world


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's number on its machine, as torchrun says; else 0."""
    value = environment.get("LOCAL_RANK", "0")
    return int(value) if value.isdecimal() else 0


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """A line on stderr with images a second; takes a message, which stays above it, and how many images are done."""
    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=total, rate="")
        started, done = time.perf_counter(), 0

        def show(message: str, images: int = 1) -> None:
            nonlocal done
            done += images
            bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):.1f} images/s")
            if message:
                tell(message)

        yield show
