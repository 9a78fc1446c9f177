"""The alignment loss and its gradients in closed form, in PyTorch: what the backends "reference" and "cpp" run.

Two forms of one stage. The direct form computes p = x W^T + b a row. The Gram form, for grids finer than the target's,
uses that resampling commutes with the projection: p.t = x . interp(T W) + interp(T b) and |p|^2 = x.(A x) + 2 u.x +
beta with A = W^T W, u = W^T b, beta = |b|^2, so that nothing of D channels exists a fine row. Either keeps three
numbers a row for the backward pass: cos, 1 / |p| and 1 / |t|, each norm bounded below by EPS.

B batch, h w feature pixels of a stage, C its channels, N = B h w its rows, hs ws D grid and channels of the target T,
P = C + PAD columns of a table (tokens, gram, y: see the functions that make them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from .reference import EPS, resample

PAD = 8
"""Columns of a table beyond its C (kExtra of csrc/align.h): T b (or u), five products of neighbours, unused ones."""

GRAM_CHANNELS = 256
"""From this many channels on the direct form is the cheaper one on any grid."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One alignment point of a grouped call, and where its rows stand among those of all."""

    x: Tensor  # [B, h, w, C]
    weight: Tensor  # [D, C]
    bias: Tensor | None  # [D]
    valid: Tensor | None  # [B, h, w]
    index: int
    row0: int

    @property
    def count(self) -> int:
        """N."""
        return self.x.shape[0] * self.x.shape[1] * self.x.shape[2]

    def of(self, rows: Tensor) -> Tensor:
        """The columns of `rows` [..., sum of N] that are this stage's."""
        return rows[..., self.row0 : self.row0 + self.count]


class GramSteps(Protocol):
    """The three passes over the fine rows that the Gram form needs; see TorchSteps for what each computes."""

    def rows(self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor) -> None:
        """Write the stage's part of `rows` [3, sum of N]."""

    def dx(
        self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor, grad: Tensor, scale: Tensor
    ) -> Tensor:
        """Gradient of the features, [B, h, w, C] in x's dtype."""

    def adjoint(self, stage: Stage, target: Tensor, rows: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """y [B hs ws, P]: for each token the sum over the rows it touches of tap weight * a / (|p| |t|) * [x, 1]."""


def split(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    valid: Sequence[Tensor] | None,
) -> list[Stage]:
    """The stages of a grouped call."""
    stages: list[Stage] = []
    row0 = 0
    for index, x in enumerate(features):
        mask = None if valid is None else valid[index]
        stages.append(Stage(x, weights[index], biases[index], mask, index, row0))
        row0 += stages[-1].count
    return stages


def takes_gram(x_shape: Sequence[int], target_shape: Sequence[int]) -> bool:
    """Whether a stage of shape [B, h, w, C] takes the Gram form: a grid finer than the target's and few channels."""
    (h, w, channels), (hs, ws) = x_shape[1:4], target_shape[1:3]
    return h >= hs and w >= ws and h * w > hs * ws and channels < GRAM_CHANNELS


def forward(
    stages: Sequence[Stage], target: Tensor, shares: Sequence[float], steps: GramSteps
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, rows and scale of a grouped call.

    Args:
        stages: the alignment points.
        target: [B, hs, ws, D].
        shares: factor of each stage's loss.
        steps: who runs the Gram form's passes.

    Returns:
        loss: scalar, sum of share * sum valid (1 - cos) / sum valid.
        rows: [3, sum of N], cos, 1 / |p| and 1 / |t| of every row.
        scale: [stages], share / sum valid, 0 where nothing is valid.
    """
    dtype = checks.accumulation_dtype(stages[0].x)
    rows = target.new_empty((3, sum(stage.count for stage in stages)), dtype=dtype)
    losses, scales = [], []
    for stage, share in zip(stages, shares, strict=True):
        if not stage.count:
            losses.append(rows.new_zeros(()))
            scales.append(rows.new_zeros(()))
            continue
        if takes_gram(stage.x.shape, target.shape):
            tokens = token_table(stage, target, with_products=True)
            steps.rows(stage, target, tokens, gram_table(stage), rows)
        else:
            _direct_rows(stage, target, stage.of(rows))
        distance = 1 - stage.of(rows)[0]
        mask = torch.ones_like(distance) if stage.valid is None else stage.valid.reshape(-1).to(dtype)
        total = mask.sum()
        scales.append(torch.where(total > 0, share / total, 0.0))
        losses.append((distance * mask).sum() * scales[-1])
    return torch.stack(losses).sum(), rows, torch.stack(scales)


def backward(
    grad: Tensor,
    stages: Sequence[Stage],
    target: Tensor,
    rows: Tensor,
    scale: Tensor,
    wanted: Sequence[bool],
    steps: GramSteps,
) -> list[Tensor]:
    """The gradients that are wanted, in the order of `wanted`.

    Args:
        grad: scalar, gradient of the loss.
        stages: as in forward.
        target: as in forward.
        rows: forward's.
        scale: forward's.
        wanted: three flags a stage: of its features, weight and bias (False without bias).
        steps: as in forward.
    """
    gradients: list[Tensor] = []
    for stage in stages:
        flags = wanted[3 * stage.index : 3 * stage.index + 3]
        if not any(flags):
            continue
        if not stage.count:
            parts = (stage.x, stage.weight, stage.bias)
            gradients += [torch.zeros_like(t) for t, flag in zip(parts, flags, strict=True) if flag and t is not None]
            continue
        if takes_gram(stage.x.shape, target.shape):
            found = _gram_backward(grad, stage, target, rows, scale, steps, flags)
        else:
            found = _direct_backward(grad, stage, target, rows, scale, flags)
        gradients += [g for g, flag in zip(found, flags, strict=True) if flag]
    return gradients


def row_gradient(stage: Stage, grad: Tensor, scale: Tensor) -> Tensor:
    """a [N]: the gradient of each row's cosine, -grad * scale * valid."""
    a = (-grad.to(scale.dtype) * scale[stage.index]).expand(stage.count)
    return a if stage.valid is None else a * stage.valid.reshape(-1).to(scale.dtype)


def row_factors(rows: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """r = a / (|p| |t|) and k = a cos / |p|^2, [N] each: the gradient of p is r t - k p.

    A norm under EPS counts as EPS, a constant: there k is 0.
    """
    cos, inverse_p, inverse_t = rows
    clamped = inverse_p >= 1 / EPS
    return a * inverse_p * inverse_t, torch.where(clamped, 0.0, a * cos * inverse_p * inverse_p)


def token_table(stage: Stage, target: Tensor, with_products: bool) -> Tensor:
    """tokens [B hs ws, P]: T W, T b, and the products of a token with itself, its right, lower and lower right
    neighbour, and of its right with its lower neighbour (0 outside the grid; all 0 without `with_products`)."""
    channels, dtype = stage.x.shape[3], checks.accumulation_dtype(stage.x)
    b, hs, ws, _ = target.shape
    t = target.to(dtype)  # [B, hs, ws, D]
    table = t.new_zeros((b, hs, ws, channels + PAD))
    table[..., :channels] = t @ stage.weight.to(dtype)
    if stage.bias is not None:
        table[..., channels] = t @ stage.bias.to(dtype)
    if with_products:
        right, down = t[:, :, 1:], t[:, 1:]
        table[..., channels + 1] = (t * t).sum(dim=3)
        table[:, :, :-1, channels + 2] = (t[:, :, :-1] * right).sum(dim=3)
        table[:, :-1, :, channels + 3] = (t[:, :-1] * down).sum(dim=3)
        table[:, :-1, :-1, channels + 4] = (t[:, :-1, :-1] * t[:, 1:, 1:]).sum(dim=3)
        table[:, :-1, :-1, channels + 5] = (t[:, :-1, 1:] * t[:, 1:, :-1]).sum(dim=3)
    return table.view(b * hs * ws, channels + PAD)


def gram_table(stage: Stage) -> Tensor:
    """gram [C + 1, P]: W^T W, with u = W^T b as its last row and as column C, and |b|^2 at their crossing."""
    channels, dtype = stage.x.shape[3], checks.accumulation_dtype(stage.x)
    weight = stage.weight.to(dtype)
    bias = weight.new_zeros(weight.shape[0]) if stage.bias is None else stage.bias.to(dtype)
    extended = torch.cat([weight, bias[:, None]], dim=1)  # [D, C + 1]
    table = weight.new_zeros((channels + 1, channels + PAD))
    table[:, : channels + 1] = extended.t() @ extended
    return table


class TorchSteps:
    """GramSteps in PyTorch."""

    def rows(self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor) -> None:
        """See GramSteps."""
        channels = stage.x.shape[3]
        x = stage.x.flatten(0, 2).to(rows.dtype)
        tw = _on_grid(tokens[:, : channels + 1], stage, target)  # [N, C + 1]
        pt = (x * tw[:, :-1]).sum(dim=1) + tw[:, -1]
        q = (x * (x @ gram[:channels, :channels] + 2 * gram[channels, :channels])).sum(dim=1) + gram[channels, channels]
        _finish(pt, q, _squared_norms(stage, target, tokens), stage.of(rows))

    def dx(
        self, stage: Stage, target: Tensor, tokens: Tensor, gram: Tensor, rows: Tensor, grad: Tensor, scale: Tensor
    ) -> Tensor:
        """See GramSteps."""
        channels = stage.x.shape[3]
        x = stage.x.flatten(0, 2).to(rows.dtype)
        r, k = row_factors(stage.of(rows), row_gradient(stage, grad, scale))
        tw = _on_grid(tokens[:, :channels], stage, target)
        dx = r[:, None] * tw - k[:, None] * (x @ gram[:channels, :channels] + gram[channels, :channels])
        return dx.to(stage.x.dtype).view(stage.x.shape)

    def adjoint(self, stage: Stage, target: Tensor, rows: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """See GramSteps."""
        (b, h, w, channels), (hs, ws) = stage.x.shape, target.shape[1:3]
        r, _ = row_factors(stage.of(rows), row_gradient(stage, grad, scale))
        weighted = rows.new_zeros((b, h, w, channels + PAD))
        weighted[..., :channels] = r.view(b, h, w, 1) * stage.x.to(rows.dtype)
        weighted[..., channels] = r.view(b, h, w)
        vertical = resampling_matrix(h, hs, rows).t() @ weighted.view(b, h, -1)  # [B, hs, w P]
        y = resampling_matrix(w, ws, rows).t() @ vertical.view(b, hs, w, -1)  # [B, hs, ws, P]
        return y.reshape(b * hs * ws, channels + PAD)


def resampling_matrix(fine: int, coarse: int, like: Tensor) -> Tensor:
    """[fine, coarse]: the bilinear weights (align_corners False) of the `coarse` samples in each of `fine` ones."""
    low, weight = _taps(fine, coarse, like)
    columns = torch.arange(coarse, device=like.device)
    high = (low + 1).clamp_max(coarse - 1)
    return (columns == low[:, None]) * (1 - weight[:, None]) + (columns == high[:, None]) * weight[:, None]


def _taps(fine: int, coarse: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower sample and weight of the upper one, [fine] each, as ATen has them; weight 0 where there is no upper."""
    position = (torch.arange(fine, dtype=like.dtype, device=like.device) + 0.5) * (coarse / fine) - 0.5
    position = position.clamp_min(0)
    low = position.floor().clamp_max(coarse - 1)
    return low.long(), torch.where(low < coarse - 1, position - low, 0.0)


def _on_grid(tokens: Tensor, stage: Stage, target: Tensor) -> Tensor:
    """Columns of a token table resampled to the stage's grid: [B hs ws, K] -> [N, K]."""
    b, hs, ws, _ = target.shape
    return resample(tokens.view(b, hs, ws, -1), stage.x.shape[1], stage.x.shape[2]).reshape(stage.count, -1)


def _squared_norms(stage: Stage, target: Tensor, tokens: Tensor) -> Tensor:
    """|t|^2 [N] of the resampled target, from the products of neighbouring tokens."""
    (b, h, w, channels), (hs, ws) = stage.x.shape, target.shape[1:3]
    products = tokens.view(b, hs, ws, -1)[..., channels + 1 : channels + 6]
    y0, fy = _taps(h, hs, tokens)
    x0, fx = _taps(w, ws, tokens)
    y1, x1 = (y0 + 1).clamp_max(hs - 1), (x0 + 1).clamp_max(ws - 1)
    top, bottom, left, right = 1 - fy[:, None], fy[:, None], 1 - fx, fx

    def at(y: Tensor, x: Tensor, which: int) -> Tensor:
        return products[:, y[:, None], x, which]  # [B, h, w]

    squares = (top * left) ** 2 * at(y0, x0, 0) + (top * right) ** 2 * at(y0, x1, 0)
    squares = squares + (bottom * left) ** 2 * at(y1, x0, 0) + (bottom * right) ** 2 * at(y1, x1, 0)
    across = left * right * (top**2 * at(y0, x0, 1) + bottom**2 * at(y1, x0, 1))
    across = across + top * bottom * (left**2 * at(y0, x0, 2) + right**2 * at(y0, x1, 2))
    across = across + top * bottom * left * right * (at(y0, x0, 3) + at(y0, x0, 4))
    return (squares + 2 * across).reshape(-1)


def _finish(pt: Tensor, pp: Tensor, tt: Tensor, rows: Tensor) -> None:
    """cos, 1 / |p| and 1 / |t| of p.t, |p|^2 and |t|^2 into `rows` [3, N]; rounding may make a square negative."""
    inverse_p = 1 / pp.clamp_min(0).sqrt().clamp_min(EPS)
    inverse_t = 1 / tt.clamp_min(0).sqrt().clamp_min(EPS)
    rows[0], rows[1], rows[2] = pt * inverse_p * inverse_t, inverse_p, inverse_t


def _project(stage: Stage, dtype: torch.dtype) -> Tensor:
    """p [N, D] in the accumulation dtype."""
    p = stage.x.flatten(0, 2).to(dtype) @ stage.weight.to(dtype).t()
    return p if stage.bias is None else p + stage.bias.to(dtype)


def _direct_target(stage: Stage, target: Tensor, dtype: torch.dtype) -> Tensor:
    """t [N, D] in the accumulation dtype."""
    return resample(target.to(dtype), stage.x.shape[1], stage.x.shape[2]).reshape(stage.count, -1)


def _direct_rows(stage: Stage, target: Tensor, rows: Tensor) -> None:
    p, t = _project(stage, rows.dtype), _direct_target(stage, target, rows.dtype)
    _finish((p * t).sum(dim=1), (p * p).sum(dim=1), (t * t).sum(dim=1), rows)


def _direct_backward(
    grad: Tensor, stage: Stage, target: Tensor, rows: Tensor, scale: Tensor, flags: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dX, dW, db; an empty tensor where a flag is off."""
    r, k = row_factors(stage.of(rows), row_gradient(stage, grad, scale))
    p, t = _project(stage, rows.dtype), _direct_target(stage, target, rows.dtype)
    dp = r[:, None] * t - k[:, None] * p  # [N, D]
    none = rows.new_empty(0)
    x = stage.x.flatten(0, 2)
    return (
        (dp @ stage.weight.to(dp.dtype)).to(x.dtype).view(stage.x.shape) if flags[0] else none,
        (dp.t() @ x.to(dp.dtype)).to(x.dtype) if flags[1] else none,
        dp.sum(dim=0).to(x.dtype) if flags[2] else none,
    )


def _gram_backward(
    grad: Tensor, stage: Stage, target: Tensor, rows: Tensor, scale: Tensor, steps: GramSteps, flags: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dX, dW, db; an empty tensor where a flag is off.

    With x' = [x, 1] and W' = [W, b]: [dW, db] = T^T y - W' S, y the adjoint resampling of r x' and S = sum k x' x'^T.
    """
    none, channels, dtype = rows.new_empty(0), stage.x.shape[3], rows.dtype
    dx = none
    if flags[0]:
        tokens = token_table(stage, target, with_products=False)
        dx = steps.dx(stage, target, tokens, gram_table(stage), rows, grad, scale)
    if not (flags[1] or flags[2]):
        return dx, none, none
    _, k = row_factors(stage.of(rows), row_gradient(stage, grad, scale))
    x = stage.x.flatten(0, 2).to(dtype)
    extended = torch.cat([x, x.new_ones(stage.count, 1)], dim=1)  # [N, C + 1]
    moments = extended.t() @ (k[:, None] * extended)  # [C + 1, C + 1]
    y = steps.adjoint(stage, target, rows, grad, scale)[:, : channels + 1]
    dw = target.reshape(-1, target.shape[3]).to(dtype).t() @ y  # [D, C + 1]
    dw = dw - stage.weight.to(dtype) @ moments[:channels]
    if stage.bias is not None:
        dw = dw - stage.bias.to(dtype)[:, None] * moments[channels]
    kind = stage.x.dtype
    return dx, dw[:, :channels].to(kind).contiguous(), dw[:, channels].to(kind).contiguous()
