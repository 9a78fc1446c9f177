"""The contrastive loss and its gradient in closed form, in PyTorch: what the backend "reference" runs.

Rows are taken in chunks, so that memory grows with n: of the n x n pairs only a chunk of rows exists at a time. Three
numbers a row are kept for the backward pass, which computes the pairs again.

n rows, D their width; e_i = x_i / |x_i|, s_ij = e_i.e_j / temperature.
"""

import torch
from torch import Tensor

from .. import checks
from .reference import EPS

CHUNK = 256
"""Rows whose pairs exist at a time: 10 bytes x CHUNK x n, and some temporary ones."""


def forward(
    embedding: Tensor, group: Tensor, klass: Tensor, temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, rows and scale.

    Args:
        embedding: [n, D].
        group: [n], negative: padding.
        klass: [n], negative: unknown.
        temperature: positive.
        chunk: rows whose pairs exist at a time.

    Returns:
        loss: scalar.
        rows: [3, n], of every row 1 / |x| (0 where the norm is at most EPS), lse (+inf where the row does not count,
            so that exp(s - lse) is 0) and 1 / number of positives (0 where it does not count).
        scale: scalar, 1 / max(1, number of counted rows).
    """
    n, dtype = embedding.shape[0], checks.accumulation_dtype(embedding)
    rows = embedding.new_empty((3, n), dtype=dtype)
    losses = embedding.new_empty(n, dtype=dtype)
    norms = torch.linalg.vector_norm(embedding, dim=1, dtype=dtype)
    rows[0] = torch.where(norms <= EPS, 0.0, 1 / norms)
    e = embedding.to(dtype) * rows[0][:, None]
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        s = e[part] @ e.t() / temperature  # [chunk, n]
        positive, paired = pairs(group, klass, part)
        positives, partners = positive.sum(dim=1, dtype=dtype), paired.sum(dim=1, dtype=dtype)
        counted = (positives > 0) & (partners > positives)
        mean = torch.where(positive, s, 0.0).sum(dim=1) / positives
        lse = s.masked_fill_(~paired, -torch.inf).logsumexp(dim=1)
        losses[part] = torch.where(counted, lse - mean, 0.0)
        rows[1, part] = torch.where(counted, lse, torch.inf)
        rows[2, part] = torch.where(counted, 1 / positives, 0.0)
    scale = 1 / (rows[2] > 0).sum().clamp_min(1).to(dtype)
    return losses.sum() * scale, rows, scale


def backward(
    grad: Tensor,
    embedding: Tensor,
    group: Tensor,
    klass: Tensor,
    rows: Tensor,
    scale: Tensor,
    temperature: float,
    chunk: int = CHUNK,
) -> Tensor:
    """Gradient of the embedding, [n, D] in its dtype.

    With p_ij = exp(s_ij - lse_i) over the pairs and q_i = 1 / number of positives, both 0 for a row that does not
    count: de_i = scale / temperature sum_j (p_ij + p_ji - [positive] (q_i + q_j)) e_j, for the relation of a pair is
    symmetric. Then dx_i = (de_i - e_i (e_i.de_i)) / |x_i|.

    Args:
        grad: scalar, gradient of the loss.
        embedding, group, klass, temperature, chunk: as in forward.
        rows, scale: forward's.
    """
    inverse, lse, share = rows
    e = embedding.to(rows.dtype) * inverse[:, None]
    gradient = torch.empty_like(e)
    for start in range(0, e.shape[0], chunk):
        part = slice(start, start + chunk)
        s = e[part] @ e.t() / temperature  # [chunk, n]
        positive, paired = pairs(group, klass, part)
        both = (s - lse[part, None]).exp_() + (s - lse).exp_()
        both.masked_fill_(~paired, 0.0)
        both -= torch.where(positive, share[part, None] + share, 0.0)
        gradient[part] = both @ e
    gradient *= grad.to(rows.dtype) * scale / temperature
    along = (e * gradient).sum(dim=1, keepdim=True)
    result = embedding.new_empty(embedding.shape)  # dense, whatever the strides of the embedding
    return result.copy_((gradient - e * along) * inverse[:, None])


def pairs(group: Tensor, klass: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which rows j are positive to row i of `part`, and which are positive or negative, [chunk, n] bool each."""
    present, known = group >= 0, klass >= 0
    may = present[part, None] & present
    place = torch.arange(len(group), device=group.device)
    may &= place[part, None] != place
    both_known = known[part, None] & known
    same_group = group[part, None] == group
    positive = same_group | (both_known & (klass[part, None] == klass))
    return may & positive, may & (same_group | both_known)
