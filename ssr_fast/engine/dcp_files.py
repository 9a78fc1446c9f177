"""torch.distributed.checkpoint (DCP), with its sharp edges off: what it writes, what it unpickles, what it lets pass.

DCP keeps its index, `.metadata`, as a pickle, and copies a tensor of another dtype into place without a word.
"""

import errno
import logging
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from ssr_fast.engine.manifest import read_manifest
from ssr_fast.engine.tensor_bytes import write_tensor
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


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors in host memory, complete when this returns; of a sharded one (DTensor) this rank's part.

    Raises:
        RuntimeError, MemoryError: there is not enough memory.
    """
    # not pinned: the stager forgets after each call what it has pinned, so every save would lock all its memory anew
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copies: Any = stager.stage(dict(tensors))
    return dict(copies)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes and syncs the tensors; sharded ones (DTensor) by the ranks that hold them, equal ones once.

    Raises:
        OSError: a rank could not write; raised on every rank.
    """
    try:
        _quiet()
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        raise _first_failure(failure, group) from failure


def load_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Copies the saved tensors into the given ones, which `misfit` has checked.

    Raises:
        OSError: a rank could not read; raised on every rank.
    """
    try:
        _quiet()
        dcp.load(dict(tensors), storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        raise _first_failure(failure, group) from failure


def _quiet() -> None:
    """No warning that a process alone is alone, and no records for debugging, of which there are two a tensor."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for name in filter(lambda name: name.endswith("dcp_logger"), [*logging.root.manager.loggerDict]):
        logging.getLogger(name).setLevel(logging.WARNING)


def _first_failure(failure: CheckpointException, group: dist.ProcessGroup | None) -> BaseException:
    """The error itself: DCP's own exception is no Exception and would pass every handler."""
    rank, (error, _) = min(failure.failures.items())
    if isinstance(error, OSError) and group is not None:
        return OSError(error.errno, f"rank {rank}: {error.strerror or error}")
    return error


def check_complete(folder: Path) -> None:
    """Sees that the files of all ranks are in the folder.

    Raises:
        OSError: one is not, so that rank wrote into a folder of its own.
    """
    index = _Reader(folder).read_metadata()
    absent = sorted(
        {info.relative_path for info in index.storage_data.values() if not (folder / info.relative_path).exists()}
    )
    if absent:
        raise OSError(errno.ENOENT, f"{absent[0]} of another rank is not there: all ranks must share one folder")


def open_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optional: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """Compares a checkpoint with the state that it is to be loaded into.

    Returns:
        its manifest; those of the tensors that it has; and a sentence if it cannot be loaded, else None.
    """
    try:
        saved = saved_tensors(path)
        problem = misfit(tensors, saved, optional)
        if problem is not None:
            problem = (
                f"the checkpoint {path} is of another model or method: {problem}; "
                "resume with the options of the run that saved it, or start in a new run directory"
            )
        return read_manifest(path), {name: tensor for name, tensor in tensors.items() if name in saved}, problem
    except UserError as error:
        return {}, {}, str(error)
    except OSError as error:
        return {}, {}, f"the checkpoint {path} cannot be read ({error.strerror or error}): all ranks must see it"


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors below a dotted prefix of the state, whatever the number of ranks that saved them.

    Raises:
        UserError: the index asks for anything but the description of tensors.
    """
    saved = saved_tensors(path)
    tensors = {
        name: torch.empty(there.size, dtype=there.properties.dtype)
        for name, there in saved.items()
        if name.startswith(f"{prefix}.")
    }
    load_tensors(path, tensors, None)
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


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
    """The same file a rank, quicker, and says what went wrong: torch's stream writer hides the system's error."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return self._write_file(f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}", plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise OSError(cause.errno, cause.strerror) from error

    def _write_file(
        self, name: str, plan: dcp.SavePlan, planner: dcp.SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """A rank's tensors, one behind another."""
        written = []
        with open(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                tensor = tensor.detach().cpu()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # without what its storage holds beside it
                offset = stream.tell()
                write_tensor(stream, tensor)
                length = stream.tell() - offset
                written.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
            stream.flush()
            os.fsync(stream.fileno())
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(written)
        return future

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
