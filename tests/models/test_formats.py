"""Names of the formats that users have, and the way between them."""

import pytest
import torch
from torch import Tensor

from ssr_fast.errors import UserError
from ssr_fast.models.formats import FORMATS, convert, describe_backbone, detect_format, infer_config
from ssr_fast.models.mit import MIT, MixTransformer
from ssr_fast.models.noise import Noise

from .networks import assert_equal, make_network


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be reported, but: {line}")


@pytest.mark.parametrize("head", ["daformer", "segformer"])
def test_native_and_daformer_keep_the_whole_network(head: str) -> None:
    native = make_network(head).state_dict()
    there = convert(native, "native", "daformer", silent)
    assert all(name.startswith(("model.backbone.", "model.decode_head.")) for name in there)
    assert detect_format(there) == "daformer"
    assert_equal(convert(there, "daformer", "native", silent), native)


def test_hf_keeps_a_segformer_network() -> None:
    native = make_network("segformer").state_dict()
    there = convert(native, "native", "hf", silent)
    assert detect_format(there) == "hf"
    assert_equal(convert(there, "hf", "native", silent), native)
    bare = {name.removeprefix("segformer."): x for name, x in there.items()}
    assert detect_format(bare) == "hf"
    assert_equal(convert(bare, "hf", "native", silent), native)


@pytest.mark.parametrize("target", ["original", "mmseg", "hf"])
def test_backbone_formats_keep_the_backbone_and_say_so(target: str) -> None:
    native = make_network("daformer").state_dict()
    lines: list[str] = []
    there = convert(native, "native", target, lines.append)
    assert len(lines) == 1 and target in lines[0] and "only the backbone" in lines[0]
    assert detect_format(there) == target
    backbone = {name: x for name, x in native.items() if name.startswith("backbone.")}
    assert_equal(convert(there, target, "native", silent), backbone)


def test_every_pair_of_formats_agrees_on_the_backbone() -> None:
    native = {k: x for k, x in make_network().state_dict().items() if k.startswith("backbone.")}
    stored = {name: convert(native, "native", name, silent) for name in FORMATS}
    for source in FORMATS:
        for target in FORMATS:
            assert_equal(convert(stored[source], source, target, silent), stored[target])


def test_mmseg_names_and_shapes() -> None:
    """The names of mmsegmentation 1.x's MixVisionTransformer, written down from its modules."""
    native = make_network().state_dict()
    there = convert(native, "native", "mmseg", lambda line: None)
    expected = {}
    for index in range(4):
        names = ["0.projection.weight", "0.projection.bias", "0.norm.weight", "0.norm.bias", "2.weight", "2.bias"]
        block = ["norm1", "attn.attn.out_proj", "norm2", "ffn.layers.0", "ffn.layers.1", "ffn.layers.4"]
        block += ["attn.sr", "attn.norm"] if index < 3 else []
        names += [f"1.0.{name}.{kind}" for name in block for kind in ("weight", "bias")]
        names += ["1.0.attn.attn.in_proj_weight", "1.0.attn.attn.in_proj_bias"]
        expected.update(dict.fromkeys(f"layers.{index}.{name}" for name in names))
    assert set(there) == set(expected)
    assert there["layers.1.1.0.ffn.layers.0.weight"].shape == (128, 32, 1, 1)
    assert there["layers.1.1.0.ffn.layers.4.weight"].shape == (32, 128, 1, 1)
    q, kv = native["backbone.block2.0.attn.q.weight"], native["backbone.block2.0.attn.kv.weight"]
    assert torch.equal(there["layers.1.1.0.attn.attn.in_proj_weight"], torch.cat([q, kv[:32], kv[32:]]))
    assert_equal(
        convert({f"backbone.{k}": x for k, x in there.items()}, "mmseg", "mmseg", silent),
        there,
    )


def test_the_imagenet_classifier_is_left_out() -> None:
    native = {k: x for k, x in make_network().state_dict().items() if k.startswith("backbone.")}
    flat = convert(native, "native", "original", silent)
    flat |= {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    assert_equal(convert(flat, "original", "native", silent), native)


def training_checkpoint(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Student, and beside it what the DAFormer family saves, with other values."""
    tensors = {f"model.{name}": x for name, x in native.items()}
    for prefix in ("ema_model.", "imnet_model."):
        tensors |= {prefix + name: x + 1 for name, x in native.items()}
    tensors["predictor.model.image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 8)
    tensors["embedding_layer.0.proj.weight"] = torch.zeros(16, 256)
    tensors["fusion_layer.3.kv.weight"] = torch.zeros(256, 128)
    return tensors


def test_the_student_is_taken() -> None:
    native = make_network("daformer").state_dict()
    assert_equal(convert(training_checkpoint(native), "daformer", "native", silent), native)


def test_hrda_gives_its_inner_head_and_says_so() -> None:
    native = make_network("daformer").state_dict()
    hrda = {}
    for name, tensor in native.items():
        hrda["model." + name.replace("decode_head.", "decode_head.head.")] = tensor
        if name.startswith("decode_head."):
            hrda["model." + name.replace("decode_head.", "decode_head.scale_attention.")] = tensor + 1
    lines: list[str] = []
    assert_equal(convert(hrda, "daformer", "native", lines.append), native)
    assert len(lines) == 1 and "HRDA" in lines[0] and "scale attention" in lines[0]


def test_nvidias_unused_classifier_is_left_out() -> None:
    native = make_network("segformer").state_dict()
    nvidia = native | {
        "decode_head.conv_seg.weight": torch.zeros(4, 128, 1, 1),
        "decode_head.conv_seg.bias": torch.ones(4),
    }
    assert detect_format(nvidia) == "native"
    assert_equal(convert(nvidia, "native", "native", silent), native)


def test_daformers_segformer_head_fuses_the_other_way_round() -> None:
    native = make_network("segformer").state_dict()
    there = convert(native, "native", "daformer", silent)
    assert "model.decode_head.linear_c.0.proj.weight" in there
    ours, theirs = (x[f"{p}decode_head.linear_fuse.conv.weight"] for x, p in ((native, ""), (there, "model.")))
    first_stage = torch.randn(32)  # ours reads the first stage's 32 channels last, theirs first
    torch.testing.assert_close(ours[:, 96:, 0, 0] @ first_stage, theirs[:, :32, 0, 0] @ first_stage)


def test_unknown_tensors_are_refused_with_their_names() -> None:
    resnet = {"conv1.weight": torch.zeros(1), "bn1.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"some\.pth holds no MiT network.*conv1\.weight, bn1\.weight"):
        detect_format(resnet, "some.pth")
    teacher_only = {"ema_model.backbone.patch_embed1.proj.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="ema_model"):
        detect_format(teacher_only)


def test_unknown_formats_are_our_fault() -> None:
    native = make_network().state_dict()
    with pytest.raises(ValueError, match="tensorflow"):
        convert(native, "native", "tensorflow")
    with pytest.raises(ValueError, match="tensorflow"):
        convert(native, "tensorflow", "native")


@pytest.mark.parametrize("name", sorted(MIT))
def test_backbones_are_recognised(name: str) -> None:
    with torch.device("meta"):
        backbone = MixTransformer(MIT[name], 0.0, Noise())
    assert describe_backbone(backbone.state_dict()) == name


def test_an_unknown_backbone_is_described() -> None:
    native = make_network().state_dict()
    wide = {name: x for name, x in native.items() if ".block2." not in name}
    assert "16/32/64/128 channels and 1/0/1/1 blocks" in describe_backbone(
        {name.removeprefix("backbone."): x for name, x in wide.items()}
    )
    with pytest.raises(UserError, match="1/0/1/1 blocks, which is none of"):
        infer_config(wide, "x.pth")


def test_config_is_inferred_from_tensors() -> None:
    for head in ("daformer", "segformer"):
        config, count = infer_config(make_network(head, class_count=7).state_dict(), "x.pth")
        assert (config.backbone, config.head, config.channels, count) == ("mit_tiny", head, 32, 7)


def test_mmsegs_own_head_is_refused() -> None:
    native = make_network().state_dict()
    mmseg = convert(native, "native", "mmseg", lambda line: None)
    mmseg = {f"backbone.{name}": x for name, x in mmseg.items()}
    mmseg |= {"decode_head.convs.0.conv.weight": torch.zeros(32, 16, 1, 1)}
    mmseg |= {"decode_head.conv_seg.weight": torch.zeros(4, 32, 1, 1)}
    with pytest.raises(UserError, match="mmsegmentation 1.x's own SegFormer head.*--model.weights"):
        infer_config(convert(mmseg, "mmseg", "native", silent), "x.pth")
    headless = {name: x for name, x in native.items() if name.startswith("backbone.")}
    with pytest.raises(UserError, match="mit_tiny without a decode head"):
        infer_config(headless, "x.pth")
