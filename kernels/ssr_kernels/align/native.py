"""The compiled passes of the Gram form: ctypes calls into ssr_cpu (float32, float64) and ssr_cuda (bfloat16, float16).

B batch, h w fine grid of a stage, C its channels, hs ws grid of the target, P = C + PAD columns of a table. A is the
accumulation dtype: float64 for float64 features, else float32. Everything is allocated by the caller.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, library
from .forms import PAD

MAX_STAGES = 8
"""Stages of one call: they are the parameters of one launch (kMaxStages of csrc/align.h)."""
PATCH = 8
"""A tile is PATCH x PATCH pixels of the fine grid (kPatch)."""
CUDA_CHANNELS = 16
"""What the channels of a stage must be a multiple of on CUDA (kTile of csrc/align.cu)."""
CUDA_MAX_CHANNELS = 240
"""The most channels of a stage on CUDA (kMaxChannels)."""
ALIGNMENT = 16
"""Bytes of a load on CUDA (kVector)."""

_DTYPES = {
    "ssr_cpu": {torch.float32: 0, torch.float64: 1},
    "ssr_cuda": {torch.bfloat16: 2, torch.float16: 3},
}
_VALID_KINDS = {None: 0, torch.uint8: 1, torch.float32: 2, torch.float64: 3}
_DEVICES = {"ssr_cpu": "cpu", "ssr_cuda": "cuda"}
_POINTERS = {
    "ssr_align_gram_rows": (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),  # rows, total, partial
    "ssr_align_gram_dx": (*[ctypes.c_void_p] * 3, ctypes.c_int64),  # grad, scale, rows, total
    "ssr_align_gram_adjoint": (*[ctypes.c_void_p] * 3, ctypes.c_int64),
}
"""Types of the arguments that follow the sizes, without the stream."""
_CPU_ERRORS = {1: "invalid argument", 2: "out of memory"}


@dataclass(frozen=True)
class Stage:
    """One stage of a call.

    Args:
        x: [B, h, w, C] features.
        valid: [B, h, w] weight of each pixel, uint8 or A, or None: 1; of all stages or of none.
        tokens: [B*hs*ws, P], A: T W; T.b; five dot products of neighbouring tokens (see csrc/align.h).
        gram: [C+1, P], A: W^T W, W^T b and |b|^2. gram_adjoint reads neither table: they may be None.
        row0: where the stage's rows start in `rows`.
        tile0: where its tiles start in `partial`.
        index: its entry of `scale`.
        dx: [B, h, w, C], x's dtype; gram_dx writes it.
        y: [B*hs*ws, P], A; gram_adjoint writes its columns 0..C.
    """

    x: Tensor
    valid: Tensor | None
    tokens: Tensor | None
    gram: Tensor | None
    row0: int
    tile0: int
    index: int
    dx: Tensor | None = None
    y: Tensor | None = None


def tiles(batch: int, h: int, w: int) -> int:
    """Tiles of a stage: entries of `partial` that gram_rows writes."""
    return batch * -(-h // PATCH) * -(-w // PATCH)


def gram_rows(stages: Sequence[Stage], hs: int, ws: int, rows: Tensor, partial: Tensor) -> None:
    """Cosine and inverse norms of each row, and the loss partials of each tile.

    Args:
        stages: at least one.
        hs, ws: grid of the target.
        rows: [3, total], A, written: cos, 1/max(|p|, eps), 1/max(|t|, eps).
        partial: [tiles, 2], A, written: sum valid (1 - cos) and sum valid of each 8x8 patch of each stage.

    Raises:
        ValueError: a call that the library does not support; the message holds every reason.
        OSError: the library cannot be loaded.
        RuntimeError: the library or CUDA refused; the message is theirs.
    """
    name = _library_name(stages)
    _check(name, stages, hs, ws, {"rows": rows, "partial": partial, **_named(stages, "tokens", "gram")})
    _check_rows(stages, rows)
    need = max(stage.tile0 + tiles(*stage.x.shape[:3]) for stage in stages)
    if partial.dim() != 2 or partial.shape[0] < need or partial.shape[1] != 2:
        raise ValueError(f"partial must have the shape [tiles, 2] with at least {need} tiles: {list(partial.shape)}")
    pointers = (rows.data_ptr(), rows.shape[1], partial.data_ptr())
    _call(name, "ssr_align_gram_rows", stages, hs, ws, pointers)


def gram_dx(stages: Sequence[Stage], hs: int, ws: int, grad: Tensor, scale: Tensor, rows: Tensor) -> None:
    """Gradient of the features, into each stage's dx.

    Args:
        stages: at least one, all with dx.
        hs, ws: grid of the target.
        grad: scalar, A: gradient of the loss.
        scale: [at least the greatest index + 1], A: share of a stage's loss / its sum of valid.
        rows: [3, total], A: what gram_rows wrote.

    Raises:
        ValueError, OSError, RuntimeError: see gram_rows.
    """
    _backward("ssr_align_gram_dx", ("tokens", "gram", "dx"), stages, hs, ws, grad, scale, rows)


def gram_adjoint(stages: Sequence[Stage], hs: int, ws: int, grad: Tensor, scale: Tensor, rows: Tensor) -> None:
    """Adjoint resampling of r x and of r, r = -grad scale valid / (|p| |t|), into columns 0..C of each stage's y.

    Args:
        stages: at least one, all with y.
        hs, ws, grad, scale, rows: see gram_dx.

    Raises:
        ValueError, OSError, RuntimeError: see gram_rows.
    """
    _backward("ssr_align_gram_adjoint", ("y",), stages, hs, ws, grad, scale, rows)


def not_supported_reasons(name: str, features: Sequence[Tensor], hs: int, ws: int) -> list[str]:
    """Why a library cannot run the Gram form on these features, a sentence each; of none: on this machine at all.

    Args:
        name: "ssr_cpu" or "ssr_cuda".
        features: [B, h, w, C] a stage.
        hs, ws: grid of the target.
    """
    against = list(library.reasons(name))
    device = _DEVICES[name]
    if len(features) > MAX_STAGES:
        against.append(f"more than {MAX_STAGES} stages ({len(features)})")
    for index, x in enumerate(features):
        stage = f"stage {index}"
        if x.device.type != device:
            against.append(f"{stage} is on {x.device}, not on {device}")
        if x.dtype not in _DTYPES[name]:
            names = " or ".join(str(dtype) for dtype in _DTYPES[name])
            against.append(f"{stage} has the dtype {x.dtype}, not {names}")
        if not x.is_contiguous():
            against.append(f"{stage} is not contiguous")
        if name == "ssr_cuda":
            against += _cuda_reasons(stage, x, hs, ws)
    if name == "ssr_cuda" and features and features[0].is_cuda and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(features[0].device)
        if major < 8:
            against.append(f"the GPU has compute capability {major}.{minor}, less than 8.0")
    return against


def _cuda_reasons(stage: str, x: Tensor, hs: int, ws: int) -> list[str]:
    against = []
    _, h, w, channels = x.shape
    if channels % CUDA_CHANNELS or not 0 < channels <= CUDA_MAX_CHANNELS:
        against.append(f"{stage} has {channels} channels, not a multiple of {CUDA_CHANNELS} up to {CUDA_MAX_CHANNELS}")
    if h < hs or w < ws:
        against.append(f"{stage} has the grid {h}x{w}, coarser than the target's {hs}x{ws}")
    if x.data_ptr() % ALIGNMENT:
        against.append(f"{stage} does not start at a multiple of {ALIGNMENT} bytes")
    return against


class _Stage(ctypes.Structure):
    """struct SsrAlignStage of csrc/align.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "valid", "tokens", "gram", "dx", "y")),
        *((name, ctypes.c_int64) for name in ("row0", "tile0")),
        *((name, ctypes.c_int32) for name in ("h", "w", "channels", "index")),
    ]


def _library_name(stages: Sequence[Stage]) -> str:
    if not stages:
        raise ValueError("stages must have at least one stage")
    return "ssr_cuda" if stages[0].x.is_cuda else "ssr_cpu"


def _named(stages: Sequence[Stage], *names: str) -> dict[str, Tensor | None]:
    """The tensors of each stage that a call touches besides x and valid, by name."""
    return {f"stages[{i}].{name}": getattr(stage, name) for i, stage in enumerate(stages) for name in names}


def _backward(
    function: str,
    touched: tuple[str, ...],
    stages: Sequence[Stage],
    hs: int,
    ws: int,
    grad: Tensor,
    scale: Tensor,
    rows: Tensor,
) -> None:
    name = _library_name(stages)
    _check(name, stages, hs, ws, {"grad": grad, "scale": scale, "rows": rows, **_named(stages, *touched)})
    _check_rows(stages, rows)
    if grad.numel() != 1:
        raise ValueError(f"grad must be a scalar: {list(grad.shape)}")
    need = max(stage.index for stage in stages) + 1
    if scale.dim() != 1 or scale.shape[0] < need:
        raise ValueError(f"scale must have one dimension with at least {need} entries: {list(scale.shape)}")
    pointers = (grad.data_ptr(), scale.data_ptr(), rows.data_ptr(), rows.shape[1])
    _call(name, function, stages, hs, ws, pointers)


def _check(name: str, stages: Sequence[Stage], hs: int, ws: int, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError with every reason unless the library can read and write all that it is given."""
    features = [stage.x for stage in stages]
    missing = library.reasons(name)  # which library.load will raise
    against = [reason for reason in not_supported_reasons(name, features, hs, ws) if reason not in missing]
    first = stages[0].x
    dtype = checks.accumulation_dtype(first)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, stage in enumerate(stages):
        batch, h, w, channels = stage.x.shape
        if stage.x.dtype != first.dtype or batch != first.shape[0]:
            against.append(f"stages[{index}].x has another dtype or batch than stages[0].x")
        columns, prefix = channels + PAD, f"stages[{index}]."
        shapes[prefix + "tokens"] = shapes[prefix + "y"] = (batch * hs * ws, columns)
        shapes[prefix + "gram"], shapes[prefix + "dx"] = (channels + 1, columns), (batch, h, w, channels)
        against += _valid_reasons(prefix + "valid", stage.valid, stages[0].valid, stage.x)
    for key, tensor in tensors.items():
        if tensor is None:
            against.append(f"{key} is missing")
            continue
        wanted = first.dtype if key.endswith(".dx") else dtype
        against += _tensor_reasons(key, tensor, wanted, first.device, name)
        if key in shapes and tuple(tensor.shape) != shapes[key]:
            against.append(f"{key} has the shape {list(tensor.shape)}, not {list(shapes[key])}")
    if against:
        raise ValueError("; ".join(against))


def _tensor_reasons(key: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, name: str) -> list[str]:
    against = []
    if tensor.dtype != dtype or tensor.device != device:
        against.append(f"{key} is {tensor.dtype} on {tensor.device}, not {dtype} on {device}")
    if not tensor.is_contiguous():
        against.append(f"{key} is not contiguous")
    vectors = key.endswith((".tokens", ".gram", ".dx", ".y"))
    if vectors and name == "ssr_cuda" and tensor.data_ptr() % ALIGNMENT:
        against.append(f"{key} does not start at a multiple of {ALIGNMENT} bytes")
    return against


def _valid_reasons(key: str, valid: Tensor | None, first: Tensor | None, x: Tensor) -> list[str]:
    if valid is None or first is None:
        return [] if valid is first else [f"{key} must be a tensor for all stages or None for all"]
    dtypes = (torch.uint8, checks.accumulation_dtype(x))
    if valid.dtype not in dtypes or valid.dtype != first.dtype:
        return [f"{key} must be uint8 or {dtypes[1]}, the same for all stages (it is {valid.dtype})"]
    if valid.shape != x.shape[:3] or valid.device != x.device or not valid.is_contiguous():
        return [f"{key} must be contiguous, on {x.device}, with the shape {list(x.shape[:3])}"]
    return []


def _check_rows(stages: Sequence[Stage], rows: Tensor) -> None:
    need = max(stage.row0 + stage.x.shape[:3].numel() for stage in stages)
    if rows.dim() != 2 or rows.shape[0] != 3 or rows.shape[1] < need:
        raise ValueError(f"rows must have the shape [3, total] with a total of at least {need}: {list(rows.shape)}")


def _describe(stage: Stage) -> _Stage:
    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    _, h, w, channels = stage.x.shape
    tensors = (stage.x, stage.valid, stage.tokens, stage.gram, stage.dx, stage.y)
    return _Stage(*map(pointer, tensors), stage.row0, stage.tile0, h, w, channels, stage.index)


def _call(name: str, function: str, stages: Sequence[Stage], hs: int, ws: int, pointers: tuple[int, ...]) -> None:
    entry = getattr(library.load(name), function)
    if entry.argtypes is None:
        entry.argtypes = [ctypes.POINTER(_Stage), *[ctypes.c_int] * 6, *_POINTERS[function], ctypes.c_void_p]
        entry.restype = ctypes.c_int
    first = stages[0]
    kind = _VALID_KINDS[None if first.valid is None else first.valid.dtype]
    array = (_Stage * len(stages))(*map(_describe, stages))
    arguments = (array, len(stages), first.x.shape[0], hs, ws, _DTYPES[name][first.x.dtype], kind, *pointers)
    if first.x.is_cuda:
        with torch.cuda.device(first.x.device):
            code = entry(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        code = entry(*arguments, None)
    if code:
        raise RuntimeError(f"{function} failed with code {code}: {_message(name, code)}")


def _message(name: str, code: int) -> str:
    if name == "ssr_cpu":
        return _CPU_ERRORS.get(code, "unknown error")
    describe = library.load(name).ssr_cuda_error
    describe.argtypes, describe.restype = [ctypes.c_int], ctypes.c_char_p
    return describe(code).decode()
