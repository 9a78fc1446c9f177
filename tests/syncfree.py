"""A mode under which nothing may wait for the device or take a shape from its data."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_FORBIDDEN = {
    aten._local_scalar_dense: "reads a number back to the host (.item(), bool(tensor), float(tensor))",
    aten.equal: "reads an answer back to the host",
    aten.allclose: "reads an answer back to the host",
    aten.nonzero: "has a shape that depends on data",
    aten._unique2: "has a shape that depends on data",
    aten.unique_dim: "has a shape that depends on data",
    aten.unique_consecutive: "has a shape that depends on data",
    aten.masked_select: "has a shape that depends on data",
    aten.bincount: "has a shape that depends on data",
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class HostSyncError(AssertionError):
    """A step did what would make the host wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Context in which host syncs and data-dependent shapes raise HostSyncError, backward included.

    On the CPU it also refuses what would be a sync on a GPU only (.cpu(), .numpy(), .tolist()). On a GPU the backward
    runs on another thread that no mode sees: there use torch.cuda.set_sync_debug_mode("error") as well.
    """

    def __enter__(self) -> "NoHostSync":
        self._reads = _NoReads()
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._reads.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _FORBIDDEN:
            raise HostSyncError(f"{func}: {_FORBIDDEN[packet]}")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSyncError(f"{func}: has a shape that depends on data (give output_size)")
        if packet in _INDEXING and any(_is_mask(index) for index in args[1]):
            raise HostSyncError(f"{func}: indexing with a boolean tensor has a shape that depends on data")
        if packet is aten._to_copy and _leaves_the_device(args[0], kwargs):
            raise HostSyncError(f"{func}: copies from the device to the host")
        return func(*args, **kwargs)


class _NoReads(TorchFunctionMode):
    """Refuses the calls that read a CPU tensor's memory, or make a tensor of the host's, unseen by the dispatcher."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise HostSyncError(f"{func.__name__}: copies from the device to the host")
        if func in (torch.tensor, torch.as_tensor):
            raise HostSyncError(f"torch.{func.__name__}: copies from the host to the device, and waits for it")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _leaves_the_device(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu" and tensor.device.type != "cpu"
