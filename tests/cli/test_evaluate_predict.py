"""evaluate and predict from the command line: results, errors in one sentence, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ssr_fast import commandline, evaluate, predict
from ssr_fast.data.labels import CITYSCAPES, ClassSet
from ssr_fast.models.segmentor import ModelConfig, Segmentor, build_segmentor
from ssr_fast.models.weights import save_hf, save_model
from tests.data import builders

CONFIG = ModelConfig(backbone="mit_tiny", channels=16)
CITY = {"names": list(CITYSCAPES.names), "colors": [list(color) for color in CITYSCAPES.colors]}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def network(classes: int, seed: int = 0) -> Segmentor:
    return build_segmentor(CONFIG, classes, seed)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run directory with a Cityscapes model."""
    save_model(tmp_path / "run", network(19), {"classes": CITY})
    return tmp_path / "run"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(module, arguments) -> (exit code, stdout, stderr), through the same `run` as on the command line."""

    def run(module: Any, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            commandline.run(module.main)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def errors(result: tuple[int, str, str]) -> list[str]:
    """The sentences of a user's mistake: code 2, nothing on stdout, no traceback."""
    code, out, err = result
    assert code == 2, err
    assert "Traceback" not in err
    return [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


# evaluate


def test_evaluate_prints_and_writes_all_protocols(tmp_path: Path, model: Path, call: Any) -> None:
    root = builders.cityscapes(tmp_path / "city")
    code, out, err = call(
        evaluate,
        model,
        "--data.root",
        root,
        "--protocol",
        "all",
        "--official",
        "--json",
        "out.json",
        "--data.split=all",
    )
    assert code == 0, err
    for word in ("cityscapes19", "synthia16", "synthia13", "cityscapesscripts", "traffic light", "mIoU"):
        assert word in out
    content = json.loads(Path("out.json").read_text())
    assert set(content["protocols"]) == {"cityscapes19", "synthia16", "synthia13"}
    ours, official = content["protocols"]["cityscapes19"], content["official"]
    assert content["images"] == 3 and ours["miou"] == pytest.approx(official["miou"], abs=1e-9)
    assert ours["per_class"] == pytest.approx(official["per_class"], abs=1e-9)
    assert ours["per_class"]["bus"] is None or isinstance(ours["per_class"]["bus"], float)
    assert sum(map(sum, content["confusion"])) > 0
    assert content["data"]["split"] == "all"


def test_evaluate_reads_val_and_the_models_own_settings(tmp_path: Path, call: Any) -> None:
    """Without options the images are seen as after training; options of the user win."""
    settings = {"mode": "slide", "crop": [32, 32], "stride": [16, 16], "batch": 2}
    save_model(tmp_path / "run", network(19), {"classes": CITY, "inference": settings, "resize": [64, 32]})
    root = builders.cityscapes(tmp_path / "city")
    code, _, err = call(evaluate, "run", "--data.root", root, "--json", "a.json")
    assert code == 0 and "fit (64, 32)" in err
    content = json.loads(Path("a.json").read_text())
    assert content["inference"] == settings and content["data"]["resize"] == [64, 32]
    assert content["images"] == 1, "val has one image"
    code, _, err = call(
        evaluate, "run", "--data.root", root, "--json=b.json", "--data.resize", "null", "--inference.mode", "whole"
    )
    content = json.loads(Path("b.json").read_text())
    assert code == 0 and content["data"]["resize"] is None and content["inference"]["mode"] == "whole"
    code, _, _ = call(evaluate, "run", "--data.root", root, "--json=c.json", "--data.resize", 40, 30)
    assert json.loads(Path("c.json").read_text())["data"]["resize"] == [40, 30]


def test_evaluate_other_classes_are_generic(tmp_path: Path, call: Any) -> None:
    root = builders.camvid(tmp_path / "CamVid")
    save_model(tmp_path / "run", network(11), {})
    code, out, err = call(evaluate, "run", "--data.root", root, "--data.split", "train")
    assert code == 0 and "generic" in out and "pavement" in out
    assert "class 0 to class 10" in err and "matched by number" in err


def test_evaluate_reports_every_wrong_option_at_once(tmp_path: Path, model: Path, call: Any) -> None:
    found = errors(
        call(evaluate, model, "--data.rot", "x", "--protocol=kitti", "--inference.batch", "many", "--jsno", "f")
    )
    assert found == [
        "unknown option --data.rot: did you mean --data.root?",
        "--protocol must be one of auto, cityscapes19, synthia16, synthia13, generic, all (it is kitti)",
        "--inference.batch must be an integer, or null (it is many)",
        "unknown option --jsno: did you mean --json?",
    ]
    found = errors(
        call(evaluate, model, "--inference.crop", 8, 8, "--json", tmp_path / "no" / "a.json", "--data.layout=x")
    )
    assert len(found) == 4 and all(
        word in " ".join(found)
        for word in ("--data.root is missing", "--inference.crop", "does not exist", "--data.layout")
    )


def test_evaluate_refuses_what_does_not_fit(tmp_path: Path, model: Path, call: Any) -> None:
    camvid = builders.camvid(tmp_path / "CamVid")
    (sentence,) = errors(call(evaluate, model, "--data.root", camvid, "--data.split=train"))
    assert "19 classes" in sentence and "has 11" in sentence
    save_model(tmp_path / "eleven", network(11), {})
    (sentence,) = errors(call(evaluate, "eleven", "--data.root", camvid, "--data.split=train", "--official"))
    assert "--official needs" in sentence
    (sentence,) = errors(call(evaluate, "eleven", "--data.root", camvid, "--data.split=train", "--protocol=synthia16"))
    assert "--protocol synthia16 needs" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "--data.root", "."), "nowhere does not exist"),
        (("broken.pth", "--data.root", "."), "broken.pth"),
        (("run", "--data.root", "missing"), "--data.root missing does not exist"),
        (("run", "--data.root", "city", "--data.split", "tset"), "--data.split"),
        (("run", "--data.root", "city", "--device", "tpu"), "--device tpu is unknown"),
        (("run", "--data.root", "city", "--device", "cuda:99"), "--device cuda:99 is not there"),
        (("--data.root", "city"), "the argument model is missing"),
        (("run", "city", "--data.root", "city"), "unexpected argument city"),
        (("run", "--data.root"), "--data.root needs a value"),
        (("run", "--data.root", "city", "--json", "city"), "--json city cannot be written"),
    ],
)
def test_evaluate_mistakes_are_one_sentence(
    tmp_path: Path, model: Path, call: Any, arguments: tuple[str, ...], words: str
) -> None:
    builders.cityscapes(tmp_path / "city")
    Path("broken.pth").write_bytes(b"PK\x03\x04 half a file")
    found = [sentence for sentence in errors(call_quietly(call, *arguments)) if words in sentence]
    assert len(found) == 1


def call_quietly(call: Any, *arguments: str) -> tuple[int, str, str]:
    code, _, err = call(evaluate, *arguments)
    return code, "", err


def test_a_models_damaged_settings_are_named(tmp_path: Path, call: Any) -> None:
    root = builders.cityscapes(tmp_path / "city")
    for number, meta in enumerate(({"inference": {"mode": "tiles"}}, {"inference": {"crop": "abc"}}, {"resize": [1]})):
        save_model(tmp_path / str(number), network(19), {"classes": CITY, **meta})
        (sentence,) = errors(call(evaluate, str(number), "--data.root", root))
        assert "config.json has" in sentence


def test_help_says_what_there_is(call: Any) -> None:
    for module in (evaluate, predict):
        code, out, _ = call(module, "--help")
        assert code == 0 and "--inference.mode" in out and f"python -m {module.__name__}" in out


# predict


def write_image(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.mark.parametrize("size", [(50, 40), (37, 91), (1, 1), (200, 33)])
def test_predict_an_image_of_any_size(tmp_path: Path, model: Path, call: Any, size: tuple[int, int]) -> None:
    image = write_image(tmp_path / "in" / "photo.one.png", size)
    code, _, err = call(predict, model, image, "--out", "out")
    assert code == 0, err
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "photo.one_color.png",
        "photo.one_overlay.png",
        "photo.one_trainIds.png",
    ]
    label = read(Path("out/photo.one_trainIds.png"))
    assert label.shape == (size[1], size[0]) and label.dtype == np.uint8 and label.max() < 19
    assert np.array_equal(read(Path("out/photo.one_color.png")), CITYSCAPES.colorize(label))
    assert read(Path("out/photo.one_overlay.png")).shape == (size[1], size[0], 3)


def test_predict_labels_are_the_networks(tmp_path: Path, model: Path, call: Any) -> None:
    from ssr_fast.data.augment import normalise

    image = write_image(tmp_path / "a.png", (64, 48))
    assert call(predict, model, image, "--out", "out")[0] == 0
    with torch.no_grad():
        logits = network(19).eval()(normalise(read(image))[None]).logits
    expected = torch.nn.functional.interpolate(logits, size=(48, 64), mode="bilinear").argmax(1)[0]
    assert np.array_equal(read(Path("out/a_trainIds.png")), expected.numpy())


def test_predict_keeps_the_folders_and_may_run_again(tmp_path: Path, model: Path, call: Any) -> None:
    for name in ("a.png", "x/a.jpg", "x/y/b.bmp"):
        write_image(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    out = tmp_path / "in" / "results"  # inside the input: a second run must not label its own outputs
    for _ in range(2):
        code, _, err = call(predict, model, tmp_path / "in", "--out", out)
        assert code == 0 and "1 files" in err and "3 of 3 inputs" in err
        found = sorted(str(path.relative_to(out)) for path in out.rglob("*_trainIds.png"))
        assert found == ["a_trainIds.png", "x/a_trainIds.png", "x/y/b_trainIds.png"]
        assert len([path for path in out.rglob("*") if path.is_file()]) == 9
    (out / "a_trainIds.png").write_text("old")
    assert call(predict, model, tmp_path / "in", "--out", out)[0] == 0
    assert read(out / "a_trainIds.png").ndim == 2, "old results are replaced"


def test_predict_refuses_two_inputs_for_one_output(tmp_path: Path, model: Path, call: Any) -> None:
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "in" / "a.jpg")
    (sentence,) = errors(call(predict, model, "in", "--out", "out"))
    assert "a.jpg and" in sentence and "a.png" in sentence and not Path("out").exists()


def test_predict_goes_on_after_a_bad_file_and_says_so(tmp_path: Path, model: Path, call: Any) -> None:
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "in" / "c.mp4").write_bytes(b"no video")
    write_image(tmp_path / "in" / "d.png", mode="L")
    code, out, err = call(predict, model, "in", "--out", "out")
    (sentence,) = errors((code, out, err))
    assert "2 of 4 inputs could not be used" in sentence and "b.png" in sentence
    assert Path("out/a_trainIds.png").exists() and Path("out/d_trainIds.png").exists()
    assert "c.mp4 cannot be read as a video" in err and "greyscale" in err
    assert not list(Path("out").rglob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_predict_into_a_read_only_folder(tmp_path: Path, model: Path, call: Any) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0o500)
    (sentence,) = errors(call(predict, model, "a.png", "--out", "locked/out"))
    assert "--out locked/out cannot be written" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "a.png"), "--out is missing"),
        (("run", "none.png", "--out", "o"), "none.png does not exist"),
        (("run", "file.txt", "--out", "o"), "is no image"),
        (("run", "empty", "--out", "o"), "holds no image"),
        (("run", "in", "--out", "in"), "--out in is the folder of the inputs"),
        (("run", "a.png", "--out", "file.txt"), "--out file.txt cannot be written"),
        (("run", "a.png", "--out", "o", "--resize", "0", "5"), "--resize must be width and height > 0"),
        (
            ("run", "a.png", "--out", "o", "--resize", "5"),
            "--resize must be 2 integers such as 512 512, or null (it is 5)",
        ),
        (("run", "a.png", "--out", "o", "--inference.mode", "tiles"), "--inference.mode must be one of"),
        (("file.txt", "a.png", "--out", "o"), "is not a checkpoint"),
    ],
)
def test_predict_mistakes_are_one_sentence(
    tmp_path: Path, model: Path, call: Any, arguments: tuple[str, ...], words: str
) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (sentence,) = errors(call(predict, *arguments))
    assert words in sentence


def test_predict_resizes_as_asked_and_writes_the_own_size(tmp_path: Path, model: Path, call: Any) -> None:
    image = write_image(tmp_path / "a.png", (120, 90))
    labels = []
    for number, arguments in enumerate(((), ("--resize", "60", "45"), ("--resize=[60,45]",))):
        assert call(predict, model, image, "--out", f"out{number}", *arguments)[0] == 0
        labels.append(read(Path(f"out{number}/a_trainIds.png")))
    assert all(label.shape == (90, 120) for label in labels)
    assert np.array_equal(labels[1], labels[2]) and not np.array_equal(labels[0], labels[1])


def test_predict_slides(tmp_path: Path, model: Path, call: Any) -> None:
    image = write_image(tmp_path / "a.png", (120, 90))
    code, _, err = call(
        predict,
        model,
        image,
        "--out",
        "o",
        "--inference.mode",
        "slide",
        "--inference.crop",
        40,
        48,
        "--inference.batch=3",
    )
    assert code == 0, err
    assert read(Path("o/a_trainIds.png")).shape == (90, 120)


def test_predict_foreign_checkpoints_get_classes(tmp_path: Path, call: Any) -> None:
    write_image(tmp_path / "a.png")
    for count, words in ((19, "taken for Cityscapes'"), (4, "class 0 to class 3")):
        save_model(tmp_path / str(count), network(count), {})
        code, _, err = call(predict, str(count), "a.png", "--out", "out")
        assert code == 0 and words in err
        label, colors = read(Path("out/a_trainIds.png")), read(Path("out/a_color.png"))
        if count == 19:
            assert np.array_equal(colors, CITYSCAPES.colorize(label))
        else:
            shown = {tuple(color) for color in colors.reshape(-1, 3).tolist()}
            assert len(shown) == len(np.unique(label)) and (0, 0, 0) not in shown


def test_predict_reads_a_transformers_folder(tmp_path: Path, call: Any) -> None:
    write_image(tmp_path / "a.png")
    classes = ClassSet("three", ("cat", "dog", "sky"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    segformer = build_segmentor(ModelConfig(backbone="mit_b0", head="segformer", channels=256), 3)
    save_hf(
        tmp_path / "hf",
        segformer,
        {"classes": {"names": list(classes.names), "colors": [list(c) for c in classes.colors]}},
    )
    code, _, err = call(predict, "hf", "a.png", "--out", "out")
    assert code == 0, err
    assert np.array_equal(read(Path("out/a_color.png")), classes.colorize(read(Path("out/a_trainIds.png"))))


def write_video(path: Path, frames: int = 5, size: tuple[int, int] = (64, 48)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12.0, size)
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no mp4")
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 40 * number, np.uint8))
    writer.release()
    return path


def test_predict_a_video(tmp_path: Path, model: Path, call: Any) -> None:
    write_video(tmp_path / "drive.mp4")
    code, _, err = call(predict, model, "drive.mp4", "--out", "out")
    assert code == 0, err
    assert [path.name for path in Path("out").iterdir()] == ["drive_overlay.mp4"]
    reader = cv2.VideoCapture("out/drive_overlay.mp4")
    frames = [frame for good, frame in iter(reader.read, (False, None)) if good]
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3)
    assert reader.get(cv2.CAP_PROP_FPS) == pytest.approx(12.0)


@pytest.mark.slow
def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssr_fast.predict", "nowhere", "none.png", "--out", "o", "--uot", "x"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown option --uot: did you mean --out?\n"
