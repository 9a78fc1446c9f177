"""Checkpoints on disk: every format loads, every broken file is refused with its reason."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ssr_fast.errors import UserError
from ssr_fast.models import weights
from ssr_fast.models.formats import convert
from ssr_fast.models.mit import MIT, MixTransformer
from ssr_fast.models.noise import Noise
from ssr_fast.models.segmentor import Segmentor, build_segmentor
from ssr_fast.models.weights import load_backbone, load_model, read_tensors, save_hf, save_model

from .networks import assert_equal, make_network
from .test_formats import training_checkpoint

META: dict[str, Any] = {
    "classes": {"names": ["road", "sky", "car", "pole"], "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 255]]},
    "inference": {"mode": "whole"},
}


def five() -> dict[str, Any]:
    """Legal classes, one more than the network has."""
    return {"names": list("abcde"), "colors": [[index, 0, 0] for index in range(5)]}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as the file's name says: safetensors, or torch.save of a training checkpoint."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"meta": {"epoch": 1}, "state_dict": tensors}, path)
    return path


@pytest.fixture(scope="module")
def network() -> Segmentor:
    return make_network("daformer")


def test_model_round_trip(network: Segmentor, tmp_path: Path) -> None:
    save_model(tmp_path / "run", network, META)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        loaded = load_model(path)
        assert_equal(loaded.segmentor.state_dict(), network.state_dict())
        assert loaded.config == network.config and loaded.segmentor.class_count == 4
        assert loaded.classes == META["classes"] and loaded.meta == META
        assert not loaded.segmentor.training
    data = json.loads((tmp_path / "run" / "config.json").read_text())
    assert data["format"] == "ssr_fast-1" and data["class_count"] == 4 and data["model"]["backbone"] == "mit_tiny"


def test_a_lone_model_file_is_inferred(network: Segmentor, tmp_path: Path) -> None:
    save_model(tmp_path, network, META)
    (tmp_path / "config.json").unlink()
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.classes is None and loaded.config.head == "daformer"
    images = torch.randn(1, 3, 40, 56)
    assert torch.equal(loaded.segmentor(images).logits, network(images).logits)


def test_meta_must_not_hide_the_model(network: Segmentor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_count"):
        save_model(tmp_path, network, {"class_count": 3})


def test_a_failed_write_keeps_the_old_file(network: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, network, META)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.safetensors.torch, "save_file", half)
    with pytest.raises(UserError, match="model.safetensors cannot be written.*No space left"):
        save_model(tmp_path, make_network("daformer", seed=5), META)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_folder_that_cannot_be_made(network: Segmentor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        save_model(tmp_path / "file" / "run", network, META)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["native", "original", "hf", "mmseg", "daformer"])
def test_every_format_fills_a_backbone(name: str, suffix: str, network: Segmentor, tmp_path: Path) -> None:
    tensors = convert(network.state_dict(), "native", name, lambda line: None)
    if name == "original":
        tensors["head.weight"] = torch.zeros(1000, 128)
    path = write(tmp_path / f"weights{suffix}", tensors)
    for target in (make_network("segformer", seed=3), make_network("segformer", seed=3).backbone):
        assert load_backbone(target, path) == name
        backbone = target.backbone if isinstance(target, Segmentor) else target
        assert_equal(backbone.state_dict(), network.backbone.state_dict())


def test_loading_a_backbone_leaves_the_head(network: Segmentor, tmp_path: Path) -> None:
    target = make_network("daformer", seed=9)
    head = {name: x.clone() for name, x in target.decode_head.state_dict().items()}
    load_backbone(target, write(tmp_path / "w.pth", network.state_dict()))
    assert_equal(target.decode_head.state_dict(), head)


def test_half_precision_files_load(network: Segmentor, tmp_path: Path) -> None:
    half = {name: x.half() for name, x in network.backbone.state_dict().items()}
    target = make_network(seed=3)
    load_backbone(target, write(tmp_path / "w.safetensors", half))
    assert all(parameter.dtype == torch.float32 for parameter in target.parameters())
    assert torch.equal(target.state_dict()["backbone.norm1.weight"], half["norm1.weight"].float())


def test_a_training_checkpoint_gives_its_student_and_classes(network: Segmentor, tmp_path: Path) -> None:
    meta = {
        "CLASSES": tuple(META["classes"]["names"]),
        "PALETTE": [tuple(c) for c in META["classes"]["colors"]],
        "config": "x = 1",
    }
    state = training_checkpoint(dict(network.state_dict()))
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "iter_40000.pth")
    loaded = load_model(tmp_path / "iter_40000.pth")
    assert_equal(loaded.segmentor.state_dict(), network.state_dict())
    assert loaded.classes == META["classes"]


def test_mmengine_meta_and_unusable_meta(network: Segmentor, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    state = dict(network.state_dict())
    dataset = {"classes": META["classes"]["names"], "palette": META["classes"]["colors"]}
    torch.save({"meta": {"dataset_meta": dataset}, "state_dict": state}, path)
    assert load_model(path).classes == META["classes"]
    for bad in ({"CLASSES": ["a"], "PALETTE": [[0, 0, 0]]}, {"CLASSES": 3}, {"CLASSES": [1, 2, 3, 4]}, "text"):
        torch.save({"meta": bad, "state_dict": state}, path)
        assert load_model(path).classes is None


def test_ddp_prefix_is_removed(network: Segmentor, tmp_path: Path) -> None:
    state = {f"module.{name}": x for name, x in network.state_dict().items()}
    assert_equal(load_model(write(tmp_path / "c.pth", state)).segmentor.state_dict(), network.state_dict())


# --- files that must be refused ---


@pytest.mark.parametrize("name", ["c.pth", "legacy.pth", "model.safetensors"])
def test_truncated_files(name: str, network: Segmentor, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "legacy.pth":
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        write(path, dict(network.state_dict()))
    data = path.read_bytes()
    for share in (0.001, 0.3, 0.9, 0.9999):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=f"{name} cannot be read, it is truncated or damaged"):
            read_tensors(path)
    path.write_bytes(data)
    assert read_tensors(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    (tmp_path / "short.pth").write_bytes(b"PK")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    for name, reason in {
        "empty.pth": "is empty",
        "text.pth": "is not a checkpoint",
        "short.pth": "is not a checkpoint",
        "photo.png": "is not a checkpoint",
        "folder": "holds no model.safetensors or pytorch_model.bin",
        "missing.pth": "does not exist",
        "numbers.pth": "holds no tensors",
        "list.pth": "holds no tensors",
    }.items():
        for reader in (read_tensors, load_model):
            with pytest.raises(UserError, match=f"{name}.*{reason}|{reason}.*{name}|{name} {reason}"):
                reader(tmp_path / name)


def test_weights_of_another_backbone(tmp_path: Path) -> None:
    small = make_network(backbone="mit_b0").state_dict()
    path = write(tmp_path / "b0.pth", {k.removeprefix("backbone."): x for k, x in small.items() if "backbone." in k})
    with torch.device("meta"):
        target = MixTransformer(MIT["mit_b5"], 0.0, Noise())
    message = r"patch_embed1\.proj\.weight is \[32, 3, 7, 7\] in the file and \[64, 3, 7, 7\] in mit_b5.*like mit_b0"
    with pytest.raises(UserError, match=message):
        load_backbone(target, path)


def test_a_deeper_backbone_is_not_cut_off(network: Segmentor, tmp_path: Path) -> None:
    """B5's tensors contain all of B1's, with equal shapes."""
    deeper = dict(network.backbone.state_dict())
    third = {name: x for name, x in deeper.items() if name.startswith("block3.0.")}
    deeper |= {name.replace("block3.0.", "block3.1."): x.clone() for name, x in third.items()}
    with pytest.raises(UserError, match=r"mit_tiny has no block3\.1\.\S+; .*1/1/2/1 blocks"):
        load_backbone(make_network(), write(tmp_path / "w.safetensors", deeper))


def test_a_missing_tensor_is_named(network: Segmentor, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    del state["backbone.block2.0.mlp.fc2.bias"]
    path = write(tmp_path / "w.pth", state)
    with pytest.raises(UserError, match=r"w\.pth.*it has no block2\.0\.mlp\.fc2\.bias, which mit_tiny needs"):
        load_backbone(make_network(), path)
    with pytest.raises(UserError, match=r"it has no backbone\.block2\.0\.mlp\.fc2\.bias"):
        load_model(path)
    hf = convert(network.state_dict(), "native", "hf", lambda line: None)
    del hf["encoder.block.1.0.attention.self.value.weight"]
    with pytest.raises(UserError, match=r"it has no block2\.0\.attn\.kv\.weight"):
        load_backbone(make_network(), write(tmp_path / "hf.pth", hf))


def test_an_unknown_tensor_of_the_head_is_named(network: Segmentor, tmp_path: Path) -> None:
    state = network.state_dict() | {"decode_head.fuse_layer.image_pool.1.conv.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"has no decode_head\.fuse_layer\.image_pool"):
        load_model(write(tmp_path / "w.pth", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, network: Segmentor, tmp_path: Path) -> None:
    state = {name: x.clone() for name, x in network.state_dict().items()}
    state["backbone.block2.0.attn.kv.weight"][5, 3] = value
    path = write(tmp_path / "w.safetensors", state)
    for load in (load_model, lambda p: load_backbone(make_network(), p)):
        with pytest.raises(UserError, match=r"block2\.0\.attn\.kv\.weight is not finite"):
            load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "ssr_fast-9"}, "reads 'ssr_fast-1': update"),
        ({"class_count": 5, "classes": five()}, r"conv_seg\.weight is \[4, 32, 1, 1\] in the file and \[5, 32, 1, 1\]"),
        ({"class_count": "4"}, "class_count"),
        ({"model": []}, "lacks a legal model"),
        ({"model": {"backbone": "mit_b9"}}, "--model.backbone must be one of"),
        ({"model": {"colour": 1}}, "unknown entry model.colour"),
        ({"model": {"channels": "many"}}, "illegal model.channels"),
        ({"classes": {"names": ["a"], "colors": [[0, 0, 0]]}}, "classes must have 4 names"),
        ({"classes": {"names": ["a"] * 4, "colors": [1, 2, 3, 4]}}, "classes must have 4 names"),
    ],
)
def test_config_that_does_not_fit(change: dict[str, Any], reason: str, network: Segmentor, tmp_path: Path) -> None:
    save_model(tmp_path, network, META)
    data = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 3}', ""])
def test_config_that_is_not_json(content: str, network: Segmentor, tmp_path: Path) -> None:
    save_model(tmp_path, network, META)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path)


def test_save_hf_says_what_it_leaves_out(network: Segmentor, tmp_path: Path) -> None:
    lines: list[str] = []
    save_hf(tmp_path / "a", network, META, lines.append)
    assert len(lines) == 1 and "only the backbone" in lines[0]
    save_hf(tmp_path / "b", make_network("segformer"), META, lines.append)
    assert len(lines) == 1
    loaded = load_model(tmp_path / "b")
    assert_equal(loaded.segmentor.state_dict(), make_network("segformer").state_dict())
    assert loaded.classes == META["classes"] and loaded.config.head == "segformer"
    target = build_segmentor(loaded.config, 2)
    assert load_backbone(target, tmp_path / "a") == "hf"
    assert_equal(target.backbone.state_dict(), network.backbone.state_dict())
