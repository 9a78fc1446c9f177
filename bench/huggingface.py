"""The released loop on transformers' Segformer: what a user has who takes the backbone from there.

The backbones of student, teacher and feature distance are transformers' SegformerModel with our weights, under our
DAFormer head in its released form. The loop is the released one (three backward passes, the average parameter by
parameter), but for what a user of today gets without asking: transformers' default attention (PyTorch's, without maps)
and torch.optim.AdamW. Two settings make it the same function as ours, at no cost: LayerNorm's eps is MiT's 1e-6 in
blocks and stages, where transformers has 1e-5, and its stochastic depth takes its numbers from the loop's draws.
B images, C channels, h w feature pixels.
"""

import re
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from bench.released import ATTENTION, ReleasedStep
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.methods.self_training import SelfTraining
from ssr_fast.models.formats import from_native
from ssr_fast.models.mit import NORM_EPS, MixTransformer
from ssr_fast.models.segmentor import Segmentor
from ssr_fast.models.weights import hf_config

ORIGINAL_EPS = re.compile(r"layernorm_(before|after)$|stages\.\d\.layer_norm$")
"""LayerNorms of blocks and stages, whose eps MiT's authors have set."""


class TransformersBackbone(nn.Module):
    """transformers' SegformerModel in place of a network's backbone, with its weights.

    Args:
        segmentor: whose sizes and stochastic depth are taken.
        backbone: whose weights are taken.
    """

    def __init__(self, segmentor: Segmentor, backbone: MixTransformer) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        entries = {k: v for k, v in hf_config(segmentor, {}).items() if k not in ("architectures", "model_type")}
        native = {f"backbone.{name}": tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
        read: Any = SegformerModel.from_pretrained(  # the net, and what it found
            None, config=SegformerConfig(**entries), state_dict=from_native(native, "hf"), output_loading_info=True
        )
        net, loaded = read
        if any(loaded.values()):
            raise ValueError(f"transformers' Segformer has other parameters than a MiT: {loaded}")
        for name, module in net.named_modules():
            if ORIGINAL_EPS.search(name):
                module.eps = NORM_EPS
        self.net = net.to(next(backbone.parameters()).device)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> four [B, C, h, w]."""
        return list(self.net(images, output_hidden_states=True).hidden_states)

    def drop_paths(self) -> list[nn.Module | None]:
        """The stochastic depth of each block, which both of its branches go through; None where nothing is dropped."""
        layers = [module for name, module in self.net.named_modules() if re.search(r"stages\.\d\.blocks\.\d+$", name)]
        return [None if isinstance(layer.drop_path, nn.Identity) else layer.drop_path for layer in layers]


class TransformersStep(ReleasedStep):
    """The loop; arguments as of ReleasedStep."""

    def __init__(self, method: SelfTraining, optim: OptimConfig, steps: int) -> None:
        nets: list[Any] = [method.student, method.teacher.net]
        made = [TransformersBackbone(net, net.backbone) for net in nets]
        if method.reference is not None:
            reference = TransformersBackbone(method.student, method.reference)  # type: ignore[arg-type]
            method.reference = reference.eval().requires_grad_(False)
        for net, backbone in zip(nets, made, strict=True):
            net.backbone = backbone
        made[1].requires_grad_(False)
        super().__init__(method, optim, steps, (ATTENTION,))
        groups = [
            {key: group[key] for key in ("params", "lr_factor", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)

    def _replace(self) -> None:
        """Stochastic depth and dropout draw as the loop does; the teacher's are off."""
        vars(self.student.decode_head.dropout)["forward"] = self._dropped_channels
        student, teacher = self.student.backbone, self.teacher.backbone
        assert isinstance(student, TransformersBackbone) and isinstance(teacher, TransformersBackbone)
        for layer in teacher.drop_paths():
            if layer is not None:
                layer.drop_prob = 0.0  # type: ignore[assignment]
        for number, layer in enumerate(student.drop_paths()):
            if layer is not None:
                vars(layer)["forward"] = partial(self._drop_path_of, layer, number, count())

    def _drop_path_of(self, layer: Any, number: int, calls: "count[int]", x: Tensor) -> Tensor:
        """transformers' own rule on [B, h * w, C]; a block calls it for its attention, then for its MLP."""
        keep, branch = 1.0 - layer.drop_prob, 2 * number + next(calls) % 2
        return x.div(keep) * (keep + self.draws.branch(branch)[:, 0]).floor().to(x.dtype)

    @torch.no_grad()
    def _adamw(self, rate: float) -> None:
        """torch.optim.AdamW as it comes."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        self.optimizer.step()
