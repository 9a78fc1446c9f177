"""Counts what dispatched operators do, on fake tensors: nothing is computed, so full size fits anywhere."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = ("prim.", "aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.alias", "aten.sym_")
"""Operators that move nothing: memory is handed out, or seen in another shape (views are recognised as such)."""

SYNCS = ("aten._local_scalar_dense", "aten._unique2", "aten.nonzero", "aten.masked_select")
"""Operators for which the host waits: a number is read, or a shape depends on data."""

OUR_LAUNCHES = {
    "dwconv_gelu_backward": 2,
    "dwconv_dilated_backward": 3,
    "align_forward": 5,
    "align_backward": 7,
    "segloss_forward": 2,
    "pseudo_label": 2,
    "contrast_forward": 3,
    "contrast_backward": 2,
}
"""Kernels of an operator of this project, where they are several: each counts."""

FOUND = 8
"""Elements of a result whose number depends on data: for instance the classes in an image."""


@dataclass
class Counts:
    """One step of a recipe.

    Attributes:
        operators: dispatched operators that do work, kernels of our own operators one by one.
        host_syncs: see SYNCS; indices by a mask, and tensors of constants that are copied to the device.
        backwards: calls of the autograd engine.
        flops: of products and convolutions, two for a multiplication with its addition; those inside align and contrast
            are left out.
        bytes_moved: every operand and every result of every operator once.
        bytes_saved: everything that is kept for a backward pass in the step, each storage once, parameters left out.
        bytes_held: the most of it at one time.
        names: how often each operator was dispatched.
    """

    operators: int = 0
    host_syncs: int = 0
    backwards: int = 0
    flops: int = 0
    bytes_moved: int = 0
    bytes_saved: int = 0
    bytes_held: int = 0
    names: Counter[str] = field(default_factory=Counter)


class Ledger(TorchDispatchMode):
    """Counts into `counts` whatever is dispatched inside, and answers for the device where its data are asked for.

    Args:
        nets: whose parameters are not activations.
    """

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.counts = Counts()
        self._parameters = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
        self._held: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        waits = name.startswith(SYNCS) or _by_mask(name, args)
        constant = name.startswith("aten.lift_fresh")  # of the host's; a single number is an argument of the kernel
        self.counts.host_syncs += waits or (constant and args[0].ndim > 0)
        result = _answer(name, args) if waits else func(*args, **kwargs)
        if name.startswith(FREE) or getattr(func, "is_view", False) or constant:
            return result
        short = func.overloadpacket.__name__
        self.counts.names[short] += 1
        self.counts.operators += OUR_LAUNCHES.get(short, 1)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                self.counts.bytes_moved += tensor.numel() * tensor.element_size()
        self.counts.flops += _flops(func, short, args, kwargs, result)
        return result

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is kept inside for backward passes is counted, and the most at once by `backward`."""

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._parameters and storage._cdata not in self._held:
                self._held[storage._cdata] = storage
                self.counts.bytes_saved += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """One backward pass, after which what it needed is free unless the graph is retained."""
        self.counts.backwards += 1
        held = sum(storage.nbytes() for storage in self._held.values())
        self.counts.bytes_held = max(self.counts.bytes_held, held)
        if not retain_graph:
            self._held.clear()
        loss.backward(retain_graph=retain_graph)


def _by_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask, so that the result's size depends on data."""
    if not name.startswith("aten.index.Tensor"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _answer(name: str, args: Any) -> Any:
    """What the device would say."""
    if name.startswith("aten._local_scalar_dense"):
        return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
    found = args[0].new_empty(FOUND)
    if name.startswith("aten._unique2"):
        return found, args[0].new_empty(0), args[0].new_empty(0)
    if name.startswith("aten.nonzero"):
        return args[0].new_empty((FOUND, args[0].ndim), dtype=torch.int64)
    return found


def _flops(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Operations of products and convolutions; of everything else 0."""
    if name.startswith("dwconv"):
        return _depthwise(name, args)
    if name.startswith("_scaled_dot_product"):
        q, k = (args[0], args[1]) if "backward" not in name else (args[1], args[2])
        products = 5 if "backward" in name else 2
        return 2 * products * math.prod(q.shape[:3]) * k.shape[2] * q.shape[3]
    if name in ("convolution", "convolution_backward"):
        return _convolution(name, args, result)
    counted: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=result))


def _convolution(name: str, args: Any, result: Any) -> int:
    """Of a convolution in groups too, which flop_registry takes for a full one."""
    weight = args[1] if name == "convolution" else args[2]
    out = result if name == "convolution" else args[0]
    products = 1 if name == "convolution" else sum(args[10][:2])
    return 2 * products * int(out.numel()) * math.prod(weight.shape[1:])


def _depthwise(name: str, args: Any) -> int:
    """Nine multiplications a number forward; backward the gradients of map and filter, and the convolution again."""
    if name == "dwconv_gelu_forward":
        return 18 * int(args[0].numel())
    if name == "dwconv_gelu_backward":
        return 3 * 18 * int(args[1].numel())
    if name == "dwconv_dilated_forward":
        return 18 * int(args[0].numel()) * len(args[1])
    return 2 * 18 * int(args[1].numel()) * len(args[2])
