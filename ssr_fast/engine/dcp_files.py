"""torch.distributed.checkpoint (DCP), with its sharp edges off: what it writes, what it unpickles, what it lets pass.

DCP keeps its index, `.metadata`, as a pickle, and copies a tensor of another dtype into place without a word.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ssr_fast.errors import UserError

# every class that an index of plain and sharded tensors holds
_INDEX_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
}


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes and syncs the tensors; sharded ones (DTensor) by the ranks that hold them, equal ones once.

    Raises:
        OSError: a rank could not write; raised on every rank.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        # DCP's own exception is no Exception and would pass every handler
        raise next(iter(failure.failures.values()))[0] from failure


def load_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Copies the saved tensors into the given ones, which `misfit` has checked."""
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        raise next(iter(failure.failures.values()))[0] from failure


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of each saved tensor, by path.

    Raises:
        UserError: the index asks for anything but the description of tensors.
    """
    return _Reader(folder).read_metadata().state_dict_metadata  # type: ignore[return-value]


def is_optional(name: str, optional: Sequence[str]) -> bool:
    """Whether a dotted path is one of, or stands below one of, the optional prefixes."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in optional)


def misfit(
    tensors: Mapping[str, Tensor], saved: Mapping[str, TensorStorageMetadata], optional: Sequence[str]
) -> str | None:
    """Says how the state at hand and a checkpoint differ (the first tensor, and how many others), or None."""
    problems = []
    for name, tensor in tensors.items():
        if name in saved:
            there = saved[name]
            if there.size != tensor.shape:
                problems.append(f"{name} has shape {list(there.size)} there and {list(tensor.shape)} here")
            elif there.properties.dtype != tensor.dtype:
                problems.append(f"{name} is {there.properties.dtype} there and {tensor.dtype} here")
        elif not is_optional(name, optional):
            problems.append(f"it lacks {name}, of shape {list(tensor.shape)} here")
    for name, there in saved.items():
        if name not in tensors and not is_optional(name, optional):
            problems.append(f"it holds {name}, of shape {list(there.size)}, which does not exist here")
    if not problems:
        return None
    others = len(problems) - 1
    return problems[0] + (f" (and {others} more such tensor{'s' if others > 1 else ''})" if others else "")


class _Writer(dcp.FileSystemWriter):
    """Says what went wrong: torch's stream writer hides the system's error behind one of its own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise OSError(cause.errno, cause.strerror) from error

    def storage_meta(self) -> StorageMeta:
        """Without the temporary folder's name, which means nothing once the checkpoint has its own."""
        return StorageMeta(save_id=self.save_id)


class _Reader(dcp.FileSystemReader):
    """Reads the index without running what a forged one asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as stream:
            return _IndexUnpickler(stream, Path(self.path)).load()


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], folder: Path) -> None:
        super().__init__(stream)
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise UserError(
            f"the checkpoint {self._folder} is not one of ssr_fast's: its .metadata asks for {module}.{name}, "
            "which may run code; do not use it, resume from a checkpoint whose origin is known"
        )
