"""A step as the released DAFormer loop takes it, in our own words and code: where the ledger and `bench step` start.

Written from the description in recipe.md (section 4): eager PyTorch, three backward passes, an average and an optimiser
that go parameter by parameter, attention that keeps its maps, depthwise convolutions on planes, numbers read by the
host. The networks are ours with these parts put back. Given the same random numbers (bench.draws) it computes what
SelfTraining and TrainStep compute, up to rounding. B batch, C channels, K classes, H W pixels, h w feature pixels.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.draws import Draws, HostDraws
from ssr_fast.data.augment import normalise_batch, strong_augment
from ssr_fast.data.batch import Batch
from ssr_fast.data.labels import IGNORE
from ssr_fast.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from ssr_fast.methods.self_training import SelfTraining
from ssr_fast.models import heads, mit
from ssr_fast.models.segmentor import SegmentorOutput

COVERED = 0.75
"""Share of a feature pixel that one thing class must cover, for the feature distance."""


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its maps are kept for the backward pass."""
    attended = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attended @ v


def _dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tokens to planes, the convolution, planes to tokens, GELU."""
    maps = x.permute(0, 3, 1, 2).contiguous()
    maps = F.conv2d(maps, weight, bias, padding=1, groups=maps.shape[1])
    return F.gelu(maps.permute(0, 2, 3, 1).contiguous())


def _dwconv_dilated(x: Tensor, weights: list[Tensor], dilations: tuple[int, ...]) -> list[Tensor]:
    maps = x.permute(0, 3, 1, 2).contiguous()
    groups = maps.shape[1]
    outs = [
        F.conv2d(maps, w, None, padding=d, dilation=d, groups=groups) for w, d in zip(weights, dilations, strict=True)
    ]
    return [out.permute(0, 2, 3, 1) for out in outs]


def _resize(x: Tensor, size: Any) -> Tensor:
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    maps = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1)


def _segformer(self: heads.SegFormerHead, features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Four embeddings resized, concatenated and mixed by one 1x1 convolution."""
    size, parts = features[0].shape[2:], []
    for stage in range(len(features), 0, -1):
        embedded = getattr(self, f"linear_c{stage}")(features[stage - 1].permute(0, 2, 3, 1))
        parts.append(_resize(embedded, size))
    fused = self.linear_fuse(torch.cat(parts, dim=3).permute(0, 3, 1, 2))
    return fused, self.linear_pred(self.dropout(fused))


def _norm_relu(self: heads.SplitBatchNorm2d, x: Tensor, mixer: Tensor | None) -> Tensor:
    """What comes out is kept too."""
    out = F.relu(self(x), inplace=True)
    return out if mixer is None else F.conv2d(out, mixer)


FOREACH = "foreach average, fused AdamW"
ONE_BACKWARD = "distance in the source's backward"
ATTENTION = "attention without maps"
DEPTHWISE = "depthwise kernels on rows"
DEPTH = "stochastic depth drawn at once"
LEVERS = (FOREACH, ONE_BACKWARD, ATTENTION, DEPTHWISE, DEPTH)
"""What can be put right in the loop one after another, before the step as a whole is another one."""

_PARTS: dict[str, tuple[tuple[object, str, object], ...]] = {
    "the step as a whole": ((heads.SplitBatchNorm2d, "followed_by_relu", _norm_relu),),
    ATTENTION: ((F, "scaled_dot_product_attention", _attention),),
    DEPTHWISE: (
        (mit, "dwconv_gelu", _dwconv_gelu),
        (heads, "dwconv_dilated", _dwconv_dilated),
        (heads, "resize", _resize),
        (heads.SegFormerHead, "forward", _segformer),
    ),
}


@contextlib.contextmanager
def parts(levers: Collection[str] = ()) -> Iterator[None]:
    """The released parts in place of ours, but for those that `levers` have put right."""
    with contextlib.ExitStack() as stack:
        for lever, replaced in _PARTS.items():
            for owner, name, part in replaced if lever not in levers else ():
                stack.enter_context(patch.object(owner, name, part))
        yield


@contextlib.contextmanager
def autocast(device_type: str = "cpu") -> Iterator[None]:
    """bfloat16 autocast; on the CPU with CUDA's list of operators that stay in float32."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(x: Tensor, *rest: Any, **how: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return function(x.float(), *rest, **how)

        return wrapped

    kept = [(F, "layer_norm"), (F, "interpolate"), (F, "cross_entropy"), (torch.Tensor, "softmax"), (torch, "softmax")]
    with contextlib.ExitStack() as stack:
        for owner, name in kept if device_type == "cpu" else ():
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        stack.enter_context(torch.autocast(device_type, torch.bfloat16))
        yield


class Autograd(Protocol):
    """Who sees the backward passes."""

    def saving(self) -> AbstractContextManager[None]:
        """What is computed inside is kept for a backward pass."""

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """One backward pass."""


class Eager:
    """Nobody looks."""

    def saving(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        loss.backward(retain_graph=retain_graph)


class ReleasedStep:
    """The loop's nets and its step.

    Args:
        method: whose nets, options and seed are taken; the nets' blocks are replaced, so it is of no other use later.
        optim: the optimiser's options.
        steps: the run's number of steps, for the schedule.
        levers: those of LEVERS that are pulled.

    Raises:
        ValueError: options that the released loop does not have: clipping, or steps before pseudo-labels are used.
    """

    def __init__(self, method: SelfTraining, optim: OptimConfig, steps: int, levers: Collection[str] = ()) -> None:
        if optim.clip_norm > 0 or method.config.start_step > 0:
            raise ValueError("the released loop knows neither optim.clip_norm nor self_training.start_step")
        self.method, self.optim, self.steps, self.levers = method.train(), optim, steps, levers
        self.student, self.teacher, self.reference = method.student, method.teacher.net, method.reference
        self.optimizer = build_optimizer(method.trainable(), optim)
        self.draws: Draws = HostDraws()
        self.autograd: Autograd = Eager()
        self.class_weight = method.class_weight[: method.class_count]
        self.updates = 0
        self._replace()

    def _replace(self) -> None:
        """The student's noise as the released networks draw it, or where that is put right all branches at once."""
        depth, dropout = self.student.backbone.stochastic_depth, self.student.decode_head.dropout
        vars(dropout)["forward"] = self._dropped_channels
        if DEPTH in self.levers:
            vars(depth)["forward"] = self._factors
            return
        rates = depth.rates if depth.active else [0.0] * len(depth.rates)
        depth.disable()
        for number, block in enumerate(self.student.backbone.blocks()):
            vars(block)["forward"] = partial(self._block, block, number, rates[2 * number])

    def nets(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return tuple(self.method.children())

    def __call__(self, batch: Batch, step: int) -> dict[str, float]:
        """Step number `step`, counted from 0; the terms of the log, read by the host."""
        with parts(self.levers):
            return self._step(batch, step)

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        autograd, terms = self.autograd, {}
        self.draws.begin(self.method, step)
        self._follow(step)
        self.optimizer.zero_grad()
        source = normalise_batch(batch.source_image).contiguous()
        self.draws.enter(0, len(source))
        with autograd.saving():
            output = self.student(source)
            loss = self._loss(output.logits, batch.source_label, None)
            terms["loss/source"] = self._log(loss)
            loss = self._regularised(loss, output, source, terms)
        if self.reference is not None:
            if ONE_BACKWARD not in self.levers:
                autograd.backward(loss, retain_graph=True)
            with autograd.saving():
                distance = self._distance(output.features[-1], source, batch.source_label)
            terms["loss/feature_distance"] = self._log(distance)
            loss = distance if ONE_BACKWARD not in self.levers else loss + distance
        autograd.backward(loss)
        mixed, label, weight, terms["confident"] = self._mix(batch, source)
        self.draws.enter(1, len(mixed))
        with autograd.saving():
            output = self.student(mixed)
            loss = self._loss(output.logits, label, weight)
            terms["loss/mixed"] = self._log(loss)
            loss = self._regularised(loss, output, mixed, terms)
        autograd.backward(loss)
        self._adamw(learning_rate(step, self.optim, self.steps))
        return {"loss": sum(value for name, value in terms.items() if name.startswith("loss/")), **terms}

    def _regularised(self, loss: Tensor, output: SegmentorOutput, images: Tensor, terms: dict[str, float]) -> Tensor:
        """The loss of a pass over the source's or the mixed images, with what a subclass adds to it and to the log."""
        return loss

    def _block(self, block: mit.Block, number: int, rate: float, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """Stochastic depth drawn in each branch."""
        x = x + self._drop_path(block.attn(block.norm1(x)), 2 * number, 1.0 - rate)
        return x + self._drop_path(block.mlp(block.norm2(x)), 2 * number + 1, 1.0 - rate)

    def _drop_path(self, x: Tensor, branch: int, keep: float) -> Tensor:
        if keep == 1.0:
            return x
        return x.div(keep) * (keep + self.draws.branch(branch)).floor().to(x.dtype)

    def _factors(self, batch: int, dtype: torch.dtype) -> Tensor | None:
        """The factors of all branches [branches, B]."""
        depth = self.student.backbone.stochastic_depth
        if not depth.active:
            return None
        return ((self.draws.branches(len(depth.rates)) >= depth.rate).to(depth.kept.dtype) / depth.kept).to(dtype)

    def _dropped_channels(self, x: Tensor) -> Tensor:
        dropout = self.student.decode_head.dropout
        keep = self.draws.channels(dropout.stream, x.shape[1]) >= dropout.p
        return x * (keep.to(x.dtype) / (1.0 - dropout.p))

    def _follow(self, step: int) -> None:
        """The teacher's average, parameter by parameter."""
        teacher = self.method.teacher
        alpha = min(1.0 - 1.0 / (step + 1), teacher.momentum) if teacher.ramp else teacher.momentum
        if FOREACH in self.levers:
            torch._foreach_lerp_(
                [*self.teacher.parameters()], [p.detach() for p in self.student.parameters()], 1.0 - alpha
            )
            return
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data[:] = alpha * mine[:].data[:] + (1 - alpha) * theirs[:].data[:]

    def _loss(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """Cross-entropy of the upsampled logits, and the accuracy that the loop logs."""
        maps = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(maps, label.long(), self.class_weight, ignore_index=IGNORE, reduction="none")
        loss = loss if weight is None else loss * weight
        right = maps.topk(1, dim=1)[1].eq(label.long()[:, None])
        self._log(right[label[:, None] != IGNORE].float().sum())
        return loss.mean()

    def _log(self, value: Tensor) -> float:
        """A number for the log, read at once."""
        return float(value.detach().mean().item())

    def _distance(self, feature: Tensor, source: Tensor, label: Tensor) -> Tensor:
        """The feature distance on things, chosen by a mask; 0 where there are none."""
        assert self.reference is not None
        with torch.no_grad():
            anchor = self.reference(source)[-1].detach()
        things = (label[:, None] == self.method.things).float()
        share = F.adaptive_avg_pool2d(things, (feature.shape[2], feature.shape[3]))
        distance = torch.norm(feature - anchor, dim=1, p=2)
        chosen = distance[share.amax(1) >= COVERED]
        return self.method.config.feature_distance * (chosen.mean() if len(chosen) else chosen.sum())

    @torch.no_grad()
    def _mix(self, batch: Batch, source: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Pseudo-labels, classes pasted image by image, the mixed image augmented; and the confident share."""
        config, height = self.method.config, batch.source_label.shape[1]
        target = normalise_batch(batch.target_image).contiguous()
        maps = F.interpolate(self.teacher(target).logits, size=target.shape[2:], mode="bilinear", align_corners=False)
        confidence, pseudo = torch.softmax(maps, dim=1).max(dim=1)
        share = (confidence.ge(config.threshold).long() == 1).sum().item() / pseudo.numel()
        weight = share * batch.target_valid.float()
        weight[:, : round(config.ignore_top * height), :] = 0
        weight[:, height - round(config.ignore_bottom * height) :, :] = 0
        images, labels, weights, key = [], [], [], self.draws.augmentation()
        for number in range(len(target)):
            present = torch.unique(batch.source_label[number])
            chosen = self.draws.classes(number, len(target), present)
            mask = (batch.source_label[number][None] == chosen[:, None, None]).sum(0)
            image = mask * source[number] + (1 - mask) * target[number]
            augmented = strong_augment(
                image[None], key, config.jitter, config.jitter_probability, config.blur_probability
            )
            images.append(augmented)
            labels.append((mask * batch.source_label[number] + (1 - mask) * pseudo[number])[None])
            weights.append((mask * torch.ones_like(weight[number]) + (1 - mask) * weight[number])[None])
        return torch.cat(images), torch.cat(labels), torch.cat(weights), share

    @torch.no_grad()
    def _adamw(self, rate: float) -> None:
        """AdamW, parameter by parameter."""
        if FOREACH in self.levers:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            return
        self.updates += 1
        (b1, b2), eps = self.optim.betas, self.optimizer.defaults["eps"]
        root = math.sqrt(1 - b2**self.updates)
        for group in self.optimizer.param_groups:
            own = rate * group["lr_factor"]
            for parameter in group["params"]:
                grad, state = parameter.grad, self.optimizer.state[parameter]
                if grad is None:
                    continue
                parameter.mul_(1 - own * group["weight_decay"])
                first = state["exp_avg"].mul_(b1).add_(grad, alpha=1 - b1)
                second = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
                denominator = second.sqrt().div_(root).add_(eps)
                parameter.addcdiv_(first, denominator, value=-own / (1 - b1**self.updates))
