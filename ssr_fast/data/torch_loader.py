"""The torch loader: reads, crops and flips the samples that the plan names, in worker processes.

B batch, H W pixels of the crop.
"""

import contextlib
import signal
from collections.abc import Generator, Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ssr_fast.data.batch import Batch, batch_of
from ssr_fast.data.samples import StepSamples
from ssr_fast.data.workers import LoaderProcesses, begin_worker, quiet_start
from ssr_fast.errors import UserError


class StepDataset(StepSamples, Dataset[Batch]):
    """Item `step` is the batch of that step for one rank; arguments as of StepSamples."""

    def __getitem__(self, step: int) -> Batch:
        plan = self.views(step)
        domains = [self.source(view) for view in plan.source], [self.target(view) for view in plan.target]
        stacked = {  # default_collate writes straight into memory that a worker shares with the training process
            name: default_collate([torch.from_numpy(view[name]) for view in views])
            for views in domains
            for name in (views[0] if views else ())
        }
        return batch_of(stacked, self.plan.crop)


class _Reported(Dataset[Batch | UserError]):
    """Hands a user's error to the training process as it is: the DataLoader would wrap it in a worker's traceback."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.dataset[step]
        except UserError as error:
            return error


def _start_worker(worker: int) -> None:
    """In a worker, before its first sample."""
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # PyTorch's handlers print a guess; the parent says it in its own words
    begin_worker()


def load_steps(
    dataset: StepDataset, first: int, last: int, workers: int, pin: bool, prefetch: int = 4
) -> Generator[Batch, None, None]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers.

    Closing the generator ends the workers. A batch comes from a worker in one write of less than the 4 KB that a pipe
    takes whole (its tensors lie in shared memory), so a killed one never leaves half a batch to wait for.

    Raises:
        UserError: a sample cannot be read.
        LoaderDied: a worker ended by itself; it is found when the next batch is asked for.
    """
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Reported(dataset),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # else each loader draws from the global one, and a resumed run has more of them
        worker_init_fn=_start_worker,
        prefetch_factor=prefetch if workers else None,
        # named, because a process of side_by_side would start them by its fork server, for which all must be pickled,
        # and because a forked one begins with the signals blocked that quiet_start blocks
        multiprocessing_context="fork" if workers else None,
    )
    if workers == 0:
        yield from map(_raised, loader)
        return
    with quiet_start(), _one_opencv_thread():
        batches: Any = iter(loader)
    processes = LoaderProcesses(batches._workers)
    try:
        for _ in range(first, last):  # and no further: workers that die with their work done are of no interest
            yield _raised(processes.wait_for(batches.__next__))
    finally:
        processes.end(batches._shutdown_workers)


@contextlib.contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Workers that are forked inside resize with one thread each: they are as many as the cores. To say so in a worker
    would hang it, for it waits there for threads that were not forked with it."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _raised(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
