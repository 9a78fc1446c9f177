"""The attention of the nets that a step runs, by choice: what this machine can run is found out before training.

The MiTs have PyTorch's or xformers', the frozen SAM one of the forms in models/sam_forms.py.

Why one would choose xformers: it takes tokens as [B, N, heads, size], so nothing is transposed, and it chooses a kernel
by itself. Version 0.0.35 tries FlashAttention-3 first (a GPU of compute capability 8.0 to 9.0 such as an H100, half
precision, heads of 64 and more in the backward pass) where the package flash_attn_3 is installed, which it no longer
brings along; then FlashAttention-2 (the package flash_attn's, else PyTorch's), then PyTorch's CUTLASS kernel, the one
for float32. PyTorch 2.11's scaled_dot_product_attention has FlashAttention-2, the CUTLASS kernel and cuDNN's. No speed
of either has been measured here.

Known of repeatability, read and not run: nothing in the forward pass depends on an order. The backward passes of
FlashAttention-2 and -3 add up dq in any order and are marked as not deterministic by xformers, and CUTLASS's does so
where it splits the keys: gradients may differ in their last bits. Under torch.use_deterministic_algorithms(True), as a
step is unless --run.deterministic is false, xformers passes over the first two and CUTLASS splits nothing, and
PyTorch's own attention adds up in order.
Which kernel runs is decided in Python from shapes, types and the device and no tensor is read, as the capture of a
CUDA graph demands.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ssr_fast.engine.precision import computed_dtype
from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method
from ssr_fast.models.mit import MIT, Attention
from ssr_fast.models.sam import SHAPES, SamConfig
from ssr_fast.models.sam_forms import make_layout, pick_form

ATTENTIONS = ("sdpa", "xformers")

Trial = Callable[[Any, int, int, torch.dtype, torch.device], None]
"""(xformers' attention, heads, size, dtype, device): makes the calls to be judged."""


def check_attention(name: str, backbone: str, precision: str, device: torch.device) -> None:
    """Whether this machine can run the attention that --run.attention names.

    Args:
        name: one of ATTENTIONS.
        backbone: a name in MIT.
        precision: as pick_precision gives it.

    Raises:
        UserError: it cannot; xformers' own reasons.
    """
    if name == "xformers":
        _require(xformers_problem(head_shapes(backbone), computed_dtype(precision), device))


def check_sam_attention(sam: SamConfig, precision: str, device: torch.device, compiled: bool) -> None:
    """Whether this machine can run the form of attention that --sam.attention names; low_rank and mask run anywhere.

    Args:
        precision: as pick_precision gives it.
        compiled: --run.compile_blocks.

    Raises:
        UserError: it cannot, with the reasons; flex is compiled to find out, which takes seconds.
    """
    if sam.attention in ("low_rank", "mask"):
        return
    shape, dtype = SHAPES["small" if sam.encoder == "untrained" else sam.encoder], computed_dtype(precision)
    heads, size = shape.heads, shape.width // shape.heads
    if sam.attention == "xformers":
        problem = xformers_problem([(heads, size)], dtype, device, try_out_biased)
    else:
        problem = flex_problem(heads, size, dtype, device, compiled)
    if problem is not None:
        raise UserError(f"--sam.attention {sam.attention} cannot be used: {problem}: give --sam.attention low_rank")


def flex_problem(heads: int, size: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> str | None:
    """Why FlexAttention cannot be generated for such heads here, or None: tried out.

    Args:
        compiled: as part of a compiled block.
    """
    if compiled and device.type == "cpu":  # of PyTorch 2.11: "... should be in kernel_group.args.input_buffers"
        return "PyTorch's code generator for the CPU cannot place FlexAttention in a compiled block"
    try:
        _try_out_form("flex", heads, size, dtype, device)
    except Exception as error:  # torch.compile hands on whatever a compiler, or the lack of one, raises
        kind = str(dtype).removeprefix("torch.")
        return f"FlexAttention cannot be compiled for {kind} heads of {size} on {device} ({_first_line(str(error))})"
    return None


def apply_attention(method: Method, name: str) -> None:
    """Give every MiT that the step of a method runs the attention of an option's value; after apply_precision.

    Where the step runs on working copies, the float32 networks that they follow are only evaluated, and stay as they
    are. Nothing of it is saved: the choice belongs to the machine and not to the model.

    Raises:
        UserError: this machine cannot run it.
    """
    if name != "xformers":
        return
    running = [m for m in method.modules() if isinstance(m, Attention) and m.q.weight.dtype == method.dtype]
    shapes = {(module.heads, module.q.out_features // module.heads) for module in running}
    _require(xformers_problem(sorted(shapes), method.dtype, running[0].q.weight.device))
    for module in running:
        module.attend = importlib.import_module("xformers.ops").memory_efficient_attention


def head_shapes(backbone: str) -> list[tuple[int, int]]:
    """(number of heads, size of a head) of a backbone's stages."""
    shape = MIT[backbone]
    return [(heads, dim // heads) for dim, heads in zip(shape.dims, shape.heads, strict=True)]


def xformers_problem(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device, trial: Trial | None = None
) -> str | None:
    """Why xformers cannot be the attention of such heads, or None: tried out.

    Args:
        shapes: as of head_shapes.
        dtype, device: of the activations.
        trial: makes the calls; unset: those of a MiT's block, forward and backward.
    """
    if importlib.util.find_spec("xformers") is None:
        here = "" if device.type == "cuda" else ", and it has no operator for a CPU"
        return f"xformers is not installed{here}"
    try:
        attend = importlib.import_module("xformers.ops").memory_efficient_attention
    except Exception as error:  # whatever a package that was built for another PyTorch raises
        return f"xformers cannot be imported ({type(error).__name__}: {_one_line(str(error))})"
    for heads, size in shapes:
        try:
            (trial or _try_out)(attend, heads, size, dtype, device)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            kind = str(dtype).removeprefix("torch.")
            reasons = _operators(str(error)) or _one_line(str(error))
            return f"xformers has no operator for {kind} heads of {size} on {device}: {_built_for()}{reasons}"
    return None


def _require(problem: str | None) -> None:
    if problem is not None:
        raise UserError(f"--run.attention xformers cannot be used: {problem}: give --run.attention sdpa")


def _try_out(attend: Any, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """The calls that a block makes, on a few tokens laid out as Attention has them."""
    q = torch.zeros(1, 64, heads, size, dtype=dtype, device=device, requires_grad=True)
    kv = torch.zeros(1, 16, 2, heads, size, dtype=dtype, device=device, requires_grad=True)
    out: Tensor = attend(q, *kv.unbind(2))
    out.sum().backward()
    attend(q.detach(), *kv.detach().unbind(2))


def try_out_biased(attend: Any, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """The call that a block of SAM makes."""
    _try_out_form("xformers", heads, size, dtype, device)


@torch.no_grad()
def _try_out_form(form: str, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """A form of SAM's attention on one window."""
    layout = make_layout(14, 14, 14, size, dtype, device)
    query = torch.zeros(1, 196, heads, size + layout.one_hot.shape[1], dtype=dtype, device=device)
    k, v = torch.zeros(1, 196, 2, heads, size, dtype=dtype, device=device).unbind(2)
    pick_form(form)(query, k, v, layout)


def _operators(message: str) -> str:
    """xformers' reasons against each operator that it has tried, on one line; empty for another kind of message."""
    found: list[str] = []
    for line in message.splitlines():
        title = re.fullmatch(r"`(.+)` is not supported because:", line.strip())
        if title:
            found.append(f"{title[1]}: ")
        elif found:
            found[-1] += ("" if found[-1].endswith(": ") else ", ") + line.strip()
    return "; ".join(found)


def _built_for() -> str:
    """What xformers says of compiled code that it could not load, in front of the reasons that follow from it."""
    try:
        error = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception
    except (ImportError, AttributeError):
        return ""
    if error is None:
        return ""
    wheels = f"https://download.pytorch.org/whl/cu{(torch.version.cuda or '').replace('.', '')}"
    return f"{_one_line(str(error).partition('Please reinstall')[0])} (its wheels for this PyTorch: {wheels}); "


def _first_line(text: str) -> str:
    """The first line that says something."""
    return next((_one_line(line) for line in text.splitlines() if line.strip()), "no message")


def _one_line(text: str) -> str:
    return " ".join(text.split())
