"""SAM's automatic masks as segments: segment-anything's own generator on a small SAM with random weights."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from ssr_fast.errors import UserError
from ssr_fast.models import sam as sam_module
from ssr_fast.models import sam_masks
from ssr_fast.models.sam_attention import SamBlock
from ssr_fast.models.sam_masks import SamMaskConfig, SamMasks, checkpoint_digest, load_sam, paint, pick_device
from ssr_fast.prepare import main
from tests.data.builders import assert_sentence, picture, save

WIDTH, SIZE = 32, 128
CPU = torch.device("cpu")
OPTIONS = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0, "min_mask_region_area": 5}


def small_sam(checkpoint: None = None) -> Sam:
    """SAM's structure at a size that takes milliseconds."""
    encoder = ImageEncoderViT(
        img_size=SIZE, patch_size=16, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=2, out_chans=WIDTH,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
    )  # fmt: skip
    grid = (SIZE // 16, SIZE // 16)
    prompts = PromptEncoder(embed_dim=WIDTH, image_embedding_size=grid, input_image_size=(SIZE, SIZE), mask_in_chans=4)
    transformer = TwoWayTransformer(depth=1, embedding_dim=WIDTH, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(
        transformer_dim=WIDTH, transformer=transformer, num_multimask_outputs=3, iou_head_depth=2, iou_head_hidden_dim=8
    )
    return Sam(encoder, prompts, decoder).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the small SAM, which stands for vit_b."""
    monkeypatch.setitem(sam_model_registry, "vit_b", small_sam)
    monkeypatch.setitem(sam_masks.MODELS, WIDTH, "vit_b")
    torch.manual_seed(4)  # whose masks are several and of several sizes
    torch.save(small_sam().state_dict(), tmp_path / "own.pth")
    return tmp_path / "own.pth"


def test_the_masks_are_segment_anythings_painted_large_to_small(checkpoint: Path) -> None:
    sam = load_sam(checkpoint, "auto", CPU)
    image = picture(1, 48, 36)
    found = SamMasks(sam, SamMaskConfig(**OPTIONS), points_per_batch=64)(Path("x"), image)
    masks = SamAutomaticMaskGenerator(sam, crop_n_layers=1, points_per_batch=64, **OPTIONS).generate(image)
    expected = np.zeros((36, 48), int)
    for number, mask in enumerate(sorted(masks, key=lambda one: -one["area"]), 1):
        expected[mask["segmentation"]] = number
    ids, expected = np.unique(expected, return_inverse=True)
    expected = expected.reshape(36, 48) + (ids[0] != 0)
    assert found.dtype == np.uint16 and len(masks) >= 3 and found.max() >= 2
    assert (found == expected).all()


def test_the_checkpoint_is_loaded_whole_and_attention_maps_are_avoided(checkpoint: Path) -> None:
    sam = load_sam(checkpoint, "vit_b", CPU)
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved) == set(sam.state_dict())
    assert all(torch.equal(value, saved[key]) for key, value in sam.state_dict().items())
    assert all(isinstance(block, SamBlock) for block in sam.image_encoder.blocks)
    assert not sam.training


def test_an_image_without_any_mask_is_all_zero(checkpoint: Path) -> None:
    """segment-anything itself fails there, which is why its generator is extended."""
    sam = load_sam(checkpoint, "auto", CPU)
    options = {"points_per_side": 2, "pred_iou_thresh": 1.0, "crop_n_layers": 1}
    with pytest.raises(IndexError):
        SamAutomaticMaskGenerator(sam, **options).generate(picture(1, 48, 36))
    found = SamMasks(sam, SamMaskConfig(**options), points_per_batch=64)(Path("x"), picture(1, 48, 36))
    assert found.shape == (36, 48) and found.dtype == np.uint16 and not found.any()


def disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:9, :9]
    return (x - 4) ** 2 + (y - 4) ** 2 <= radius**2


def test_small_masks_stay_visible_whatever_the_order() -> None:
    masks = [disc(1), disc(4), disc(2)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        areas = [int(masks[k].sum()) for k in order]
        found = paint(areas, lambda k, order=order: masks[order[k]], (9, 9))  # type: ignore[misc]
        assert (found == disc(4).astype(int) + disc(2) + disc(1)).all()
    hidden = paint([5, 5], lambda k: disc(1), (9, 9))
    assert (hidden == disc(1)).all(), "what nothing is left of has no id"


def test_beyond_the_format_the_largest_masks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam_masks, "MAX_SEGMENTS", 2)
    masks = [disc(1), disc(4), disc(2)]
    found = paint([int(mask.sum()) for mask in masks], lambda k: masks[k], (9, 9))
    assert (found == disc(4).astype(int) + disc(2)).all()


def test_files_that_are_not_the_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        checkpoint_digest(tmp_path / "none.pth")
    assert_sentence(error.value, "--sam-checkpoint", tmp_path / "none.pth")
    assert len(checkpoint_digest(checkpoint)) == 64
    tensors = torch.load(checkpoint, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({key: value for key, value in tensors.items() if "pos_embed" not in key}, other)
    with pytest.raises(UserError) as error:
        load_sam(other, "auto", CPU)
    assert_sentence(error.value, other, "is no SAM", "absent")
    torch.save({key: value for key, value in tensors.items() if key != "mask_decoder.iou_token.weight"}, other)
    with pytest.raises(UserError) as error:
        load_sam(other, "vit_b", CPU)
    assert_sentence(error.value, other, "mask_decoder.iou_token.weight", "--sam-model")


def test_a_published_name_must_be_the_published_file(checkpoint: Path) -> None:
    named = checkpoint.rename(checkpoint.with_name("sam_vit_b_01ec64.pth"))
    with pytest.raises(UserError) as error:
        checkpoint_digest(named)
    assert_sentence(error.value, named, "is damaged", "ec2df6273261", "download")


class Hostile:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('hostile-ran').touch()",)


def test_only_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768), "x": Hostile()}, tmp_path / "bad.pth")
    with pytest.raises(UserError):
        load_sam(tmp_path / "bad.pth", "auto", CPU)
    assert not (tmp_path / "hostile-ran").exists()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", 3) == pick_device("cpu", 0) == CPU
    for name in ("cuda", "cuda:0", "tpu", "cpu:1", "cuda:x", ""):
        with pytest.raises(UserError, match="--device"):
            pick_device(name, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device("auto", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(pick_device("cuda:1", 0)) == "cuda:1" and str(pick_device("cuda", 1)) == "cuda:1"
    with pytest.raises(UserError, match="finds 2"):
        pick_device("cuda:2", 0)


@pytest.mark.parametrize(
    ("bad", "option"),
    [
        ({"points_per_side": 0}, "--points-per-side"),
        ({"pred_iou_thresh": 86.0}, "--pred-iou-thresh"),
        ({"stability_score_thresh": float("nan")}, "--stability-score-thresh"),
        ({"crop_n_layers": -1}, "--crop-n-layers"),
        ({"min_mask_region_area": -1}, "--min-mask-region-area"),
        ({"crop_n_points_downscale_factor": 64}, "--crop-n-points-downscale-factor"),
    ],
)
def test_illegal_options_are_named(bad: dict[str, float], option: str) -> None:
    assert SamMaskConfig().problems() == []
    (problem,) = SamMaskConfig(**bad).problems()  # type: ignore[arg-type]
    assert problem.startswith(option) and " must " in problem


def test_the_command_makes_a_store_with_sam(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    for name in ("a", "b"):
        save(root / "images" / f"{name}.png", picture(2, 48, 36))
    command = ["masks", str(root), "--generator", "sam", "--sam-checkpoint", str(checkpoint), "--points-per-side", "2"]
    command += [
        "--pred-iou-thresh",
        "0",
        "--stability-score-thresh",
        "0",
        "--points-per-batch",
        "32",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    assert "2 maps made" in capsys.readouterr().out
    text = (root / "segments" / "store.json").read_text()
    assert sam_module.sha256(checkpoint) in text and '"min_mask_region_area": 100' in text and "cpu" not in text
    assert main([*command[:-4], "--points-per-batch", "64"]) == 0, "how fast it went is no part of the recipe"
    assert "2 kept" in capsys.readouterr().out
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, checkpoint)
    assert main(command) == 2
    assert_sentence(capsys.readouterr().err.strip(), "store of other segments", "--overwrite")
