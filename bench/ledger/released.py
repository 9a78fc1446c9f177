"""A step as the released DAFormer loop takes it, in our own words and code: the ledger's starting point.

Written from the description in recipe.md (section 4): eager PyTorch, three backward passes, an average and an optimiser
that go parameter by parameter, attention that keeps its maps, depthwise convolutions on planes, numbers read by the
host. The networks are ours with these parts put back. It is counted on fake tensors, and only shapes matter.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ledger.counting import Ledger
from ssr_fast.data.augment import normalise_batch, strong_augment
from ssr_fast.data.torch_loader import Batch
from ssr_fast.engine.optim import OptimConfig, build_optimizer
from ssr_fast.models import heads, mit
from ssr_fast.models.segmentor import Segmentor
from ssr_kernels import counter


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
    maps = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1)


def _block(self: mit.Block, x: Tensor, factors: Tensor | None = None) -> Tensor:
    """Stochastic depth drawn in each branch."""
    x = x + _drop_path(self.attn(self.norm1(x)), self.training)
    return x + _drop_path(self.mlp(self.norm2(x)), self.training)


def _drop_path(x: Tensor, training: bool, keep: float = 0.9) -> Tensor:
    if not training:
        return x
    return x.div(keep) * (keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype)).floor()


FOREACH = "foreach average, fused AdamW"
ONE_BACKWARD = "distance in the source's backward"
ATTENTION = "attention without maps"
DEPTHWISE = "depthwise kernels on rows"
DEPTH = "stochastic depth drawn at once"
LEVERS = (FOREACH, ONE_BACKWARD, ATTENTION, DEPTHWISE, DEPTH)
"""What can be put right in the loop one after another, before the step as a whole is another one."""

_PARTS: dict[str, tuple[tuple[object, str, object], ...]] = {
    ATTENTION: ((F, "scaled_dot_product_attention", _attention),),
    DEPTHWISE: (
        (mit, "dwconv_gelu", _dwconv_gelu),
        (heads, "dwconv_dilated", _dwconv_dilated),
        (heads, "resize", _resize),
    ),
    DEPTH: ((mit.Block, "forward", _block),),
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
def autocast() -> Iterator[None]:
    """bfloat16 autocast with CUDA's list of operators that stay in float32."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(x: Tensor, *rest: Any, **how: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return function(x.float(), *rest, **how)

        return wrapped

    kept = [(F, "layer_norm"), (F, "interpolate"), (F, "cross_entropy"), (torch.Tensor, "softmax"), (torch, "softmax")]
    with contextlib.ExitStack() as stack:
        for owner, name in kept:
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


class ReleasedStep:
    """The loop's nets and its step.

    Args:
        student: the network that is trained.
        build: makes another of the same kind (teacher, frozen backbone).
        levers: those of LEVERS that are pulled.
    """

    def __init__(self, student: Segmentor, build: Callable[[], Segmentor], levers: Collection[str] = ()) -> None:
        self.levers = levers
        self.student, self.teacher, self.frozen = student.train(), build().train(), build().backbone.eval()
        for net in (self.teacher, self.frozen):
            net.requires_grad_(False)
        parts = {"backbone": student.backbone, "head": student.decode_head}
        self.optimizer = build_optimizer(parts, OptimConfig())
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in student.parameters()}

    def nets(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return self.student, self.teacher, self.frozen

    def __call__(self, ledger: Ledger, batch: Batch) -> None:
        """One step."""
        self._follow(0.999)
        for parameter in self.student.parameters():
            parameter.grad = None
        source = normalise_batch(batch.source_image).contiguous()
        with ledger.saving():
            output = self.student(source)
            loss = self._loss(output.logits, batch.source_label, None)
        self._log(loss)
        if ONE_BACKWARD not in self.levers:
            ledger.backward(loss, retain_graph=True)
        with ledger.saving():
            distance = self._distance(output.features[-1], source, batch.source_label)
        self._log(distance)
        ledger.backward(distance if ONE_BACKWARD not in self.levers else loss + distance)
        mixed, label, weight = self._mix(batch, source)
        with ledger.saving():
            loss = self._loss(self.student(mixed).logits, label, weight)
        self._log(loss)
        ledger.backward(loss)
        self._adamw()

    def _follow(self, alpha: float) -> None:
        """The teacher's average, parameter by parameter."""
        if FOREACH in self.levers:
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - alpha)
            return
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data[:] = alpha * mine[:].data[:] + (1 - alpha) * theirs[:].data[:]

    def _loss(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """Cross-entropy of the upsampled logits, and the accuracy that the loop logs."""
        maps = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(maps, label.long(), ignore_index=255, reduction="none")
        loss = loss if weight is None else loss * weight
        right = maps.topk(1, dim=1)[1].eq(label.long()[:, None])
        self._log(right[label[:, None] != 255].float().sum())
        return loss.mean()

    def _log(self, value: Tensor) -> None:
        """A number for the log, read at once."""
        value.detach().mean().item()

    def _distance(self, feature: Tensor, source: Tensor, label: Tensor) -> Tensor:
        """The feature distance on things, chosen by a mask."""
        with torch.no_grad():
            anchor = self.frozen(source)[-1].detach()
        things = (label[:, None] == torch.arange(8, dtype=torch.uint8).view(1, -1, 1, 1)).float()
        share = F.adaptive_avg_pool2d(things, (feature.shape[2], feature.shape[3]))
        distance = torch.norm(feature - anchor, dim=1, p=2)
        return 0.005 * distance[share.amax(1) >= 0.75].mean()

    @torch.no_grad()
    def _mix(self, batch: Batch, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pseudo-labels, classes pasted image by image, the mixed image augmented."""
        target = normalise_batch(batch.target_image).contiguous()
        maps = F.interpolate(self.teacher(target).logits, size=target.shape[2:], mode="bilinear", align_corners=False)
        confidence, pseudo = torch.softmax(maps, dim=1).max(dim=1)
        share = (confidence.ge(0.968).long() == 1).sum().item() / pseudo.numel()
        weight = share * torch.ones(pseudo.shape)
        weight[:, :15, :] = 0
        weight[:, -120:, :] = 0
        images, labels, weights = [], [], []
        for number in range(len(target)):
            classes = torch.unique(batch.source_label[number])
            chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2]]
            mask = (batch.source_label[number][None] == chosen[:, None, None]).sum(0)
            image = mask * source[number] + (1 - mask) * target[number]
            key = counter.fold(torch.zeros((), dtype=torch.int64), number)
            images.append(strong_augment(image[None], key, 0.2, 0.8, 0.5))
            labels.append((mask * batch.source_label[number] + (1 - mask) * pseudo[number])[None])
            weights.append((mask * torch.ones_like(weight[number]) + (1 - mask) * weight[number])[None])
        return torch.cat(images), torch.cat(labels), torch.cat(weights)

    @torch.no_grad()
    def _adamw(self) -> None:
        """AdamW, parameter by parameter."""
        if FOREACH in self.levers:
            self.optimizer.step()
            return
        for parameter, (first, second) in self.moments.items():
            grad = parameter.grad
            if grad is None:
                continue
            parameter.mul_(1 - 6e-7)
            first.mul_(0.9).add_(grad, alpha=0.1)
            second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            parameter.addcdiv_(first, second.sqrt().div_(0.5).add_(1e-8), value=-6e-5)
