"""Reads torch checkpoint files as tensors and plain data, and executes nothing that they name.

A pickle is a program: it may name any function and have it called. Training checkpoints of the mmcv family hold
arbitrary objects beside their tensors, so refusing every such file would refuse the files that users have. Here every
name in the file that is not on a list of a few becomes an inert object: it can be called, filled and nested, does
nothing, and is dropped.
"""

import os
import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80\x02"  # torch's older container: several protocol-2 pickles in a row, then the raw storages


class Inert:
    """Stands for anything that a file names and that is not a tensor: accepts what a pickle does to it, ignores it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """A list's items, one."""

    def extend(self, items: Any) -> None:
        """A list's items, several."""

    def add(self, item: Any) -> None:
        """A set's items."""


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor over a storage of the file; hooks and other extras are left out.

    Raises:
        pickle.UnpicklingError: the tensor reaches beyond its storage (torch would enlarge it with garbage).
    """
    untyped, dtype = storage._untyped_storage, storage.dtype
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
    if min((offset, *size, *stride)) < 0 or reach * dtype.itemsize > untyped.nbytes():
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} lies outside of its storage")
    return torch.empty((0,), dtype=dtype).set_(untyped, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    """A parameter is read as its tensor."""
    return data.detach() if isinstance(data, Tensor) else Inert()


class _Allowed:
    """A function that a file may call. A fresh one each time, and closed: a pickle can also change what it is given."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the file tries to change a function")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


def _storage_only(load: Callable[[Any], Any], reference: Any) -> Any:
    """Resolve a reference to a storage; torch's other kind, the source text of a module, can make it write a file."""
    if not isinstance(reference, tuple) or not reference or reference[0] not in ("storage", b"storage"):
        raise pickle.UnpicklingError("the file refers to something else than a storage")
    return load(reference)


class Unpickler(pickle.Unpickler):
    """Tensors, ordered dicts and what pickle itself can write (numbers, text, lists, dicts); the rest is Inert.

    torch.load derives from this class and adds the storage types, which are markers, not functions.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":  # torch sets it once the reader exists
            value = partial(_storage_only, value)
        super().__setattr__(name, value)

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for; never an import."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        function = _FUNCTIONS.get((module, name))
        return Inert if function is None else _Allowed(function)


def _load(file: Any, **options: Any) -> Any:
    return Unpickler(file, **options).load()


_INERT_PICKLE = SimpleNamespace(__name__="inert_pickle", Unpickler=Unpickler, load=_load)


def load_torch(path: Path) -> Any:
    """The object that torch.save wrote, with tensors on the CPU and everything unknown as Inert.

    Args:
        path: a file that begins with ZIP_MAGIC (it is mapped: tensors that nobody uses are never read) or PICKLE_MAGIC.

    Raises:
        Exception: of many types, when the file is damaged or is no such file.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    # torch.load hands these two kinds of archive to readers of their own, which obey the file
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(os.fspath(path)).get_all_records():
        raise pickle.UnpicklingError("it is a TorchScript program, not a checkpoint")
    if not is_zip and tarfile.is_tarfile(path):
        raise pickle.UnpicklingError("it is a tar archive, not a checkpoint")
    return torch.load(
        path,
        map_location="cpu",
        pickle_module=_INERT_PICKLE,
        weights_only=False,  # torch's own restricted reader refuses the whole file where this one drops an object
        mmap=is_zip,
    )
