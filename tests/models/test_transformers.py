"""The same weights give the same numbers here and in Hugging Face transformers."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ssr_fast.models.segmentor import ModelConfig, build_segmentor
from ssr_fast.models.weights import load_backbone, load_model, save_hf

from .networks import make_network, relative_error

transformers = pytest.importorskip("transformers", reason="the [dev] extra brings transformers, the reference here")

TOLERANCE = 1e-5


def original_eps(model: nn.Module, blocks: int) -> nn.Module:
    """transformers computes every LayerNorm with eps 1e-5; the weights were trained with 1e-6 in blocks and stages."""
    changed = 0
    for name, module in model.named_modules():
        if re.search(r"layernorm_(before|after)$|stages\.\d\.layer_norm$", name):
            assert isinstance(module, nn.LayerNorm)
            module.eps = 1e-6
            changed += 1
    assert changed == 2 * blocks + 4
    return model.eval()


@pytest.mark.parametrize(("backbone", "blocks", "size"), [("mit_b0", 8, (75, 101)), ("mit_b5", 52, (64, 96))])
@torch.no_grad()
def test_backbone_features(backbone: str, blocks: int, size: tuple[int, int], tmp_path: Path) -> None:
    network = make_network("daformer", backbone)
    save_hf(tmp_path, network, {}, report=lambda line: None)
    theirs = original_eps(transformers.SegformerModel.from_pretrained(tmp_path), blocks)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = theirs(images, output_hidden_states=True).hidden_states
    assert len(expected) == 4
    errors = [relative_error(a, b) for a, b in zip(network.features(images), expected, strict=True)]
    print(backbone, errors)
    assert max(errors) < TOLERANCE


@torch.no_grad()
def test_segmentation_logits_read_back_from_disk(tmp_path: Path) -> None:
    network = make_network("segformer", "mit_b0", class_count=5)
    names = ["road", "sky", "car", "pole", "person"]
    save_hf(tmp_path, network, {"classes": {"names": names, "colors": [[0, 0, 0]] * 5}})
    model, info = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [model.config.id2label[index] for index in range(5)] == names
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    ours = network(images).logits
    unchanged = relative_error(model.eval()(images).logits, ours)
    error = relative_error(original_eps(model, 8)(images).logits, ours)
    print("logits:", error, "with transformers' own eps:", unchanged)
    assert error < TOLERANCE and unchanged < 1e-2


@torch.no_grad()
def test_a_network_that_transformers_wrote(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(decoder_hidden_size=64, num_labels=6)
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(config)
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.config.backbone, loaded.config.channels, loaded.segmentor.class_count) == ("mit_b0", 64, 6)
    # in float64: the offsets above cost float32 digits, whichever way the head's sums are ordered
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = original_eps(theirs.double(), 8)(images).logits
    loaded.segmentor.double()
    assert relative_error(loaded.segmentor(images).logits, expected) < 1e-9


@torch.no_grad()
def test_an_imagenet_classifier_that_transformers_wrote(tmp_path: Path) -> None:
    theirs = transformers.SegformerForImageClassification(transformers.SegformerConfig(num_labels=10))
    theirs.save_pretrained(tmp_path)
    network = build_segmentor(ModelConfig(backbone="mit_b0", channels=32), class_count=3).eval()
    assert load_backbone(network, tmp_path) == "hf"
    images = torch.randn(1, 3, 64, 64)
    original_eps(theirs, 8)
    expected = theirs.segformer(images).last_hidden_state
    assert relative_error(network.features(images)[3], expected) < TOLERANCE
