"""The Gram form of align in PyTorch, float64, straight from the definition of its tables and outputs; calls to test.

B batch, h w fine grid, C channels, hs ws D grid and channels of the target, P = C + 8. The resampling is a matrix
[h*w, hs*ws] whose taps are computed in the dtype that the library computes them in, as ATen does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_kernels.align import native

EPS = 1e-8


def axis(fine: int, coarse: int, dtype: torch.dtype) -> Tensor:
    """[fine, coarse] float64: the weight of each coarse index in each fine one, align_corners False."""
    position = torch.arange(fine, dtype=dtype)
    scale = torch.tensor(coarse, dtype=dtype) / torch.tensor(fine, dtype=dtype)
    source = ((position + 0.5) * scale - 0.5).clamp_min(0)
    low = source.long().clamp_max(coarse - 1)
    high = (low + 1).clamp_max(coarse - 1)
    weight = (source - low).double()
    out = torch.zeros(fine, coarse, dtype=torch.float64)
    rows = torch.arange(fine)
    out[rows, low] += 1 - weight
    out[rows, high] += weight
    return out


def resampling(h: int, w: int, hs: int, ws: int, dtype: torch.dtype) -> Tensor:
    """[h*w, hs*ws] float64."""
    return torch.kron(axis(h, hs, dtype), axis(w, ws, dtype))


def tables(weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tokens [B*hs*ws, P] and gram [C+1, P], with NaN where nothing is defined.

    Args:
        weight: [D, C]; bias: [D]; target: [B, hs, ws, D]; all float64.
        dtype: A, that of the tables.
    """
    batch, hs, ws, _ = target.shape
    channels = weight.shape[1]
    tokens = torch.full((batch, hs, ws, channels + 8), float("nan"), dtype=torch.float64)
    tokens[..., :channels] = target @ weight
    tokens[..., channels] = target @ bias
    padded = torch.nn.functional.pad(target, (0, 0, 0, 1, 0, 1))
    here, right = padded[:, :-1, :-1], padded[:, :-1, 1:]
    lower, diagonal = padded[:, 1:, :-1], padded[:, 1:, 1:]
    pairs = ((here, here), (here, right), (here, lower), (here, diagonal), (right, lower))
    for column, (a, b) in enumerate(pairs, channels + 1):
        tokens[..., column] = (a * b).sum(dim=3)
    gram = torch.full((channels + 1, channels + 8), float("nan"), dtype=torch.float64)
    gram[:channels, :channels] = weight.T @ weight
    gram[:channels, channels] = gram[channels, :channels] = weight.T @ bias
    gram[channels, channels] = bias @ bias
    return tokens.reshape(-1, channels + 8).to(dtype), gram.to(dtype)


@dataclass
class Expected:
    """What the passes must write for one stage, float64."""

    rows: Tensor  # [3, B*h*w]
    partial: Tensor  # [tiles, 2]
    dx: Tensor  # [B, h, w, C]
    y: Tensor  # [B*hs*ws, C+1]


def expected(stage: native.Stage, target: Tensor, upstream: float, taps: torch.dtype) -> Expected:
    """The outputs of one stage.

    Args:
        stage: its x, valid, tokens and gram are read, and the tables' columns up to C only.
        target: [B, hs, ws, D] float64, for |t|^2.
        upstream: -grad * scale[index].
        taps: dtype in which the library computes the taps.
    """
    hs, ws = target.shape[1:3]
    batch, h, w, channels = stage.x.shape
    x, gram = stage.x.double().reshape(batch, h * w, channels), stage.gram.double()
    matrix = resampling(h, w, hs, ws, taps)
    tokens = stage.tokens.double().reshape(batch, hs * ws, channels + 8)
    interpolated = matrix @ tokens[..., : channels + 1]  # [B, h*w, C+1]
    a, u, beta = gram[:channels, :channels], gram[channels, :channels], gram[channels, channels]
    product = x @ a + u
    q = (x * (product + u)).sum(dim=2) + beta
    pt = (x * interpolated[..., :channels]).sum(dim=2) + interpolated[..., channels]
    tt = (matrix @ target.reshape(batch, hs * ws, -1)).square().sum(dim=2)
    ip, it = (1 / square.clamp_min(0).sqrt().clamp_min(EPS) for square in (q, tt))
    cos = pt * ip * it
    valid = torch.ones_like(cos) if stage.valid is None else stage.valid.double().reshape(batch, h * w)
    k = torch.where(q.clamp_min(0).sqrt() > EPS, cos * ip * ip, 0)
    r = upstream * valid * ip * it
    dx = (upstream * valid)[..., None] * ((ip * it)[..., None] * interpolated[..., :channels] - k[..., None] * product)
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
    y = matrix.T @ (r[..., None] * with_one)
    rows = torch.stack([cos, ip, it]).reshape(3, -1)
    partial = _patches(torch.stack([valid * (1 - cos), valid]).reshape(2, batch, h, w))
    return Expected(rows, partial, dx.reshape(batch, h, w, channels), y.reshape(-1, channels + 1))


def _patches(maps: Tensor) -> Tensor:
    """[2, B, h, w] -> sums of 8x8 patches [tiles, 2]."""
    _, _, h, w = maps.shape
    padded = torch.nn.functional.pad(maps, (0, -w % 8, 0, -h % 8))
    sums = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).sum(dim=(3, 5))  # [2, B, patches, patches]
    return sums.flatten(1).T


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite for a NaN."""
    error = float((out.double() - reference).norm() / reference.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def guarded(tensor: Tensor) -> Tensor:
    """The same values between two stretches of NaN."""
    guard = 64
    buffer = torch.full((tensor.numel() + 2 * guard,), float("nan"), dtype=tensor.dtype)
    buffer[guard:-guard] = tensor.flatten()
    return buffer[guard:-guard].view(tensor.shape)


def make(case, dtype, valid=None, bias=True, empty_image=None, size=1.0):
    """What run() takes, every output NaN, and the target [B, hs, ws, D].

    Args:
        case: (batch, (hs, ws), D, [(h, w, C) of each stage]).
        valid: makes a mask of (shape, A), or None.
        empty_image: whose target is 0.
        size: of the weights.
    """
    batch, (hs, ws), width, sizes = case
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.randn(batch, hs, ws, width, dtype=torch.float64) + 0.3
    if empty_image is not None:
        target[empty_image] = 0
    stages, row0, tile0 = [], 3, 1  # neither starts at 0: what stands before must stay as it is
    for index, (h, w, channels) in enumerate(sizes):
        x = guarded(torch.randn(batch, h, w, channels, dtype=torch.float64).to(dtype))
        weight = torch.randn(width, channels, dtype=torch.float64) * (size / channels**0.5)
        shift = torch.randn(width, dtype=torch.float64) if bias else torch.zeros(width, dtype=torch.float64)
        tokens, gram = map(guarded, tables(weight, shift, target, accumulation))
        mask = None if valid is None else valid(x.shape[:3], accumulation)
        dx, y = torch.full_like(x, float("nan")), torch.full_like(tokens, float("nan"))
        stages.append(native.Stage(x, mask, tokens, gram, row0, tile0, len(sizes) - 1 - index, dx, y))
        row0, tile0 = row0 + batch * h * w, tile0 + native.tiles(batch, h, w)
    rows = torch.full((3, row0 + 2), float("nan"), dtype=accumulation)
    partial = torch.full((tile0 + 1, 2), float("nan"), dtype=accumulation)
    grad = torch.tensor(0.7, dtype=accumulation)
    scale = torch.rand(len(sizes), dtype=accumulation) + 0.5
    return (stages, hs, ws, rows, partial, grad, scale), target


def run(stages, hs, ws, rows, partial, grad, scale):
    native.gram_rows(stages, hs, ws, rows, partial)
    native.gram_dx(stages, hs, ws, grad, scale, rows)
    native.gram_adjoint(stages, hs, ws, grad, scale, rows)


def check(call, target, tolerance, taps):
    """Every output of every stage, and that nothing else was written."""
    stages, _, _, rows, partial, grad, scale = call
    row, tile = stages[0].row0, stages[0].tile0
    assert rows[:, :row].isnan().all() and partial[:tile].isnan().all()
    for stage in stages:
        upstream = -float(grad) * float(scale[stage.index])
        want = expected(stage, target, upstream, taps)
        count, tiles = want.rows.shape[1], want.partial.shape[0]
        channels = stage.x.shape[3]
        found = {
            "cos": (rows[0, row : row + count], want.rows[0]),
            "1/|p|": (rows[1, row : row + count], want.rows[1]),
            "1/|t|": (rows[2, row : row + count], want.rows[2]),
            "loss": (partial[tile : tile + tiles, 0], want.partial[:, 0]),
            "mass": (partial[tile : tile + tiles, 1], want.partial[:, 1]),
            "dx": (stage.dx, want.dx),
            "y": (stage.y[:, :channels], want.y[:, :channels]),
            "mass of y": (stage.y[:, channels], want.y[:, channels]),
        }
        errors = {name: relative_error(*pair) for name, pair in found.items()}
        assert all(error < tolerance.get(name, tolerance[""]) for name, error in errors.items()), errors
        assert stage.y[:, channels + 1 :].isnan().all()
        row, tile = row + count, tile + tiles
    assert rows[:, row:].isnan().all() and partial[tile:].isnan().all()


def bytes_mask(shape, dtype):
    return (torch.rand(shape) < 0.6).to(torch.uint8)


def float_mask(shape, dtype):
    return torch.rand(shape, dtype=dtype) * (torch.rand(shape) < 0.6)


def empty_mask(shape, dtype):
    return torch.zeros(shape, dtype=torch.uint8)
