"""Projection + cosine alignment: how far each student stage is from a frozen encoder's features.

B batch, h w feature pixels of a stage, C its channels, hs ws D grid and channels of the target.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..registry import Op
from .backends import BACKENDS

ALIGN = Op("align", BACKENDS)


def align_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    valid: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean cosine distance of the projected features x W^T + b and the target, resampled bilinearly to x's grid.

    p = x W^T + b; t = bilinear(target, (h, w)), align_corners False; cos = p.t / (max(|p|, 1e-8) max(|t|, 1e-8));
    loss = sum valid (1 - cos) / sum valid. If nothing is valid the loss is 0 and so is every gradient.

    Three numbers a row are kept for the backward pass, which is not differentiable itself. Under torch.autocast x,
    weight and bias are cast to its dtype; sums are float32.

    Args:
        x: [B, h, w, C] student features, floating point.
        weight: [D, C], x's dtype.
        bias: [D], x's dtype, or None.
        target: [B, hs, ws, D] frozen features, any floating dtype; it receives no gradient.
        valid: [B, h, w] non-negative weight of each pixel (bool, integer or floating point), without gradient; None: 1.
        backend: see registry.Op.choose.

    Returns:
        scalar, float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    _check_target(target)
    (x,), (weight,), (bias,) = _autocast(target, [x], [weight], [bias])
    _check_stage(("x", "weight", "bias", "valid"), x, weight, bias, valid, target)
    masks = None if valid is None else [valid]
    return _run(backend, [x], [weight], [bias], target, masks, [1.0])


def align_stages(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    stage_weights: Sequence[float],
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of align_loss over the stages of a backbone, in one call.

    Args:
        features: [B, h, w, C] a stage; grids and channels differ from stage to stage.
        weights: [D, C] a stage.
        biases: [D] or None a stage.
        target: [B, hs, ws, D], common to all stages; it receives no gradient.
        valid: [B, h, w] a stage, or None.
        stage_weights: factor of each stage's loss.
        backend: see registry.Op.choose.

    Returns:
        scalar, float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: an argument of a wrong shape, device or dtype, or a sequence of a wrong length, by name.
        BackendError: the backend that was asked for cannot run this call.
    """
    count = len(features)
    if count == 0:
        raise ValueError("features must have at least one stage")
    lengths = {"weights": weights, "biases": biases, "stage_weights": stage_weights}
    for name, sequence in {**lengths, **({} if valid is None else {"valid": valid})}.items():
        if len(sequence) != count:
            raise ValueError(f"{name} must have one entry a stage, {count} (it has {len(sequence)})")
    _check_target(target)
    features, weights, biases = _autocast(target, features, weights, biases)
    for index in range(count):
        names = (f"features[{index}]", f"weights[{index}]", f"biases[{index}]", f"valid[{index}]")
        mask = None if valid is None else valid[index]
        _check_stage(names, features[index], weights[index], biases[index], mask, target)
    return _run(backend, features, weights, biases, target, valid, stage_weights)


def _autocast(
    target: Tensor, features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Under torch.autocast: the operands in its dtype. Every reduction stays in float32."""
    dtype = checks.autocast_dtype(target)
    if dtype is None:
        return features, weights, biases
    cast = [None if bias is None else bias.to(dtype) for bias in biases]
    return [x.to(dtype) for x in features], [weight.to(dtype) for weight in weights], cast


def _run(
    backend: str | None,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    valid: Sequence[Tensor] | None,
    stage_weights: Sequence[float],
) -> Tensor:
    tensors = (target, *features, *weights, *(bias for bias in biases if bias is not None), *(valid or ()))
    chosen = ALIGN.choose(backend, tensors)
    loss: Tensor = chosen.run(features, weights, biases, target, valid, stage_weights)
    return loss


def _check_target(target: Tensor) -> None:
    checks.shape("target", target, "[B, hs, ws, D]", (None, None, None, None))
    checks.floating("target", target)


def _check_stage(
    names: tuple[str, str, str, str],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    target: Tensor,
) -> None:
    """Check one stage; `names` are what the errors call (x, weight, bias, valid)."""
    x_name, weight_name, bias_name, valid_name = names
    width = target.shape[3]
    checks.shape(x_name, x, "[B, h, w, C]", (target.shape[0], None, None, None))
    checks.floating(x_name, x)
    checks.same_device("target", target, x_name, x)
    checks.shape(weight_name, weight, "[D, C]", (width, x.shape[3]))
    checks.same_dtype(weight_name, weight, x_name, x)
    checks.same_device(weight_name, weight, x_name, x)
    if bias is not None:
        checks.shape(bias_name, bias, "[D]", (width,))
        checks.same_dtype(bias_name, bias, x_name, x)
        checks.same_device(bias_name, bias, x_name, x)
    if valid is not None:
        checks.shape(valid_name, valid, "[B, h, w]", tuple(x.shape[:3]))
        checks.same_device(valid_name, valid, x_name, x)
