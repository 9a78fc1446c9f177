"""The torch loader: reads, crops and flips the samples that the plan names, in worker processes.

B batch, H W pixels of the crop.
"""

import random
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ssr_fast.data.batch import Batch, batch_of
from ssr_fast.data.samples import StepSamples
from ssr_fast.errors import UserError


class StepDataset(StepSamples, Dataset[Batch]):
    """Item `step` is the batch of that step for one rank; arguments as of StepSamples."""

    def __getitem__(self, step: int) -> Batch:
        plan = self.views(step)
        domains = [self.source(view) for view in plan.source], [self.target(view) for view in plan.target]
        stacked = {
            name: torch.from_numpy(np.stack([view[name] for view in views]))
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
    """Workers leave stopping to the parent: a terminal's Ctrl-C reaches the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    random.seed(0)  # nothing may depend on a worker's own random state; a fixed one makes a violation reproducible


def load_steps(
    dataset: StepDataset, first: int, last: int, workers: int, pin: bool, prefetch: int = 4
) -> Iterator[Batch]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers."""
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Reported(dataset),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=prefetch if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
