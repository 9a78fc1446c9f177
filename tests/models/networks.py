"""Small networks and comparisons that the model tests share."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor


def make_network(head: str = "segformer", backbone: str = "mit_tiny", class_count: int = 4, seed: int = 0) -> Segmentor:
    """A network in evaluation mode in which every tensor has values of its own, so that a swap of two shows."""
    config = ModelConfig(backbone=backbone, head=head, channels=32)
    segmentor = build_segmentor(config, class_count, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in segmentor.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return segmentor.eval()


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """The same names, shapes, types and bits."""
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name
