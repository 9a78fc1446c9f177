"""What a CUDA graph does to a step, on a CPU: its operators recorded once and run again, arguments and memory as then.

A number that the host computed and a branch that it took stay what they were at the recording; only what lies in
tensors can change. A step that replays right here has nothing that a graph would freeze.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def record(work: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """`engine.graphs.Capture` for a CPU; unlike a GPU's it also does the work once: the caller undoes that."""
    recording = _Recording()
    with recording:
        terms = work()
    return recording.replay, terms


class _Recording(TorchDispatchMode):
    """Every dispatched operator inside, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._outside: set[int] = set()  # storages that were there before
        self._inside: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if _storage(tensor) not in self._inside:
                self._outside.add(_storage(tensor))
        result = func(*args, **kwargs)
        results = _tensors(result)
        for tensor in results:
            if _storage(tensor) not in self._outside:
                self._inside[_storage(tensor)] = tensor
        self._calls.append((func, args, kwargs, [tensor.detach() for tensor in results]))  # unsqueeze_ may follow
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run it again in the same memory, in which nothing of the last run may be read: it holds NaN."""
        for tensor in self._inside.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        for func, args, kwargs, results in self._calls:
            again = _tensors(func(*args, **kwargs))
            for kept, fresh in zip(results, again, strict=True):
                if _storage(kept) != _storage(fresh) and not func.overloadpacket.__name__.startswith("empty"):
                    kept.copy_(fresh)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
