"""Contrastive loss over rows: a row's own group and its own class attract it, other classes repel it.

n rows, D their width.
"""

from math import inf

import torch
from torch import Tensor

from .. import checks
from ..registry import Op
from .loss_backends import BACKENDS

CONTRAST_LOSS = Op("contrast_loss", BACKENDS)


def contrast_loss(
    embedding: Tensor, group: Tensor, klass: Tensor, temperature: float, *, backend: str | None = None
) -> Tensor:
    """Multi-positive InfoNCE: mean over the counted rows of lse_i - (mean over the positives p of row i of s_ip).

    s_ij = e_i.e_j / temperature, where e = x / |x| of each row; a row whose norm is at most 1e-12 counts as 0 and gets
    no gradient. lse_i is the log of the sum of exp(s_ij) over the positives and the negatives j of row i, itself left
    out. j is positive to i if their groups are equal, or if their classes are equal and known; it is negative if both
    classes are known and neither classes nor groups are equal; else it is no partner. A row without a positive or
    without a negative counts 0 and leaves the mean; where no row counts the loss is 0 and so is every gradient.

    Three numbers a row are kept for the backward pass, which is not differentiable itself; no n x n matrix is. Under
    torch.autocast the embedding is cast to its dtype; sums are float32.

    Args:
        embedding: [n, D] rows, floating point, normalised inside; norms from 1e-12 to 1e18 in float32 and bfloat16.
        group: [n] integers below 2^31, such as the segment a pixel was taken from; negative: a row of padding, that
            pairs with nothing (its embedding must still be finite).
        klass: [n] integers below 2^31; negative: unknown.
        temperature: positive.
        backend: see registry.Op.choose.

    Returns:
        scalar, float32 (float64 for a float64 embedding); group and klass get no gradient.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device, dtype or value, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    checks.shape("embedding", embedding, "[n, D]", (None, None))
    checks.floating("embedding", embedding)
    for name, ids in (("group", group), ("klass", klass)):
        checks.shape(name, ids, "[n]", (embedding.shape[0],))
        checks.integer(name, ids)
        checks.same_device(name, ids, "embedding", embedding)
    if not 0 < temperature < inf:
        raise ValueError(f"temperature must be a positive number (it is {temperature})")
    tensors = (_autocast(embedding), group.to(torch.int32), klass.to(torch.int32))
    loss: Tensor = CONTRAST_LOSS.choose(backend, tensors).run(*tensors, temperature)
    return loss


def _autocast(embedding: Tensor) -> Tensor:
    """Under torch.autocast: the embedding in its dtype. Every reduction stays in float32."""
    dtype = checks.autocast_dtype(embedding)
    return embedding if dtype is None else embedding.to(dtype)
