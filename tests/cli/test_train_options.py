"""The command line of train: presets, overrides, every mistake reported at once in one sentence each, no traceback."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ssr_fast
from ssr_fast import session, train
from ssr_fast.arguments import configure
from ssr_fast.config import TrainConfig, problems
from ssr_fast.data.labels import CAMVID, CITYSCAPES
from ssr_fast.errors import UserError
from ssr_fast.presets import PRESETS
from ssr_fast.train import main
from tests.methods.run_support import TINY, start


def lines(argv):
    with pytest.raises(UserError) as caught:
        configure(argv)
    return str(caught.value).splitlines()


def walk(kind, prefix=""):
    for field in dataclasses.fields(kind):
        hint = (
            field.type
            if isinstance(field.type, type)
            else next((a for a in getattr(field.type, "__args__", ()) if dataclasses.is_dataclass(a)), None)
        )
        if hint is not None and dataclasses.is_dataclass(hint):
            yield from walk(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize(
    ("classes", "preset", "protocol"),
    [
        (CITYSCAPES, "gta5-cityscapes", "cityscapes19"),
        (CITYSCAPES, "synthia-cityscapes", "synthia16"),
        (CITYSCAPES, "folder", "cityscapes19"),
        (CAMVID, "camvid-day-dusk", "generic"),
        (CAMVID, "synthia-cityscapes", "generic"),
    ],
)
def test_a_run_is_scored_by_the_published_protocol(classes, preset, protocol):
    assert session._protocol(classes, preset) == protocol


def test_the_loaders_options():
    folders = ["folder", "--data.source.root", "a", "--data.target.root", "b", "--data.evaluation", "null"]
    (loader,), (prefetch,) = lines([*folders, "--data.loader", "tali"]), lines([*folders, "--data.prefetch", "0"])
    assert "--data.loader" in loader and "auto, torch, dali" in loader and "tali" in loader
    assert "--data.prefetch" in prefetch and "at least 1" in prefetch
    (unread,) = lines([*folders, "--data.prefetch", "2", "--data.workers", "0"])
    assert "--data.prefetch 2 has no effect with --data.workers 0" in unread
    for more in (["--data.workers", "1"], ["--data.workers", "0", "--data.loader", "dali"]):
        assert configure([*folders, "--data.prefetch", "2", *more])[0].data.prefetch == 2


def test_every_config_field_is_read_somewhere():
    read = set()
    for path in Path(ssr_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "problems":
                for inner in ast.walk(node):
                    inner.attr = None  # being checked is not being used
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    names = list(walk(TrainConfig))
    assert len(names) > 50
    assert [name for name in names if name.split(".")[-1] not in read] == []


def test_the_guess_that_stages_will_train_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "_GPU", tmp_path / "none")
    for preset, build in PRESETS.items():
        stages = build().stages()  # source_free waits for its source model, so it trains in one process with it
        assert train.several_processes_likely([preset]) == (len(stages) > 1 and "source_free" not in stages), preset
    for text, likely in {
        "": True,
        "--resume": True,
        "--run.steps 4": True,
        "folder --run.stages=[supervised,ssr]": True,
        "--method.name=ssr": False,
        "--method.name ssr --run.stages [supervised,ssr]": True,
        "demo --run.device=cuda": False,
        "--help": False,
        "--print_config": False,
    }.items():
        assert train.several_processes_likely(text.split()) == likely, text
    monkeypatch.setattr(train, "_GPU", tmp_path)
    assert not train.several_processes_likely(["demo"])


def test_what_is_imported_before_the_fork_server_starts_is_quick_to_import():
    code = "import sys, ssr_fast.train; print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_legal_once_their_files_are_named(preset):
    config = PRESETS[preset]()
    allowed = ("root", "checkpoint is missing", "feature_distance", "source_free.model is missing")
    assert [p for p in problems(config) if not any(word in p for word in allowed)] == []


def test_overrides_configuration_file_and_print_config(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("run: {steps: 222, seed: 7}\n")
    config, preset, resume = configure(["--config", str(file), "--run.seed", "9", "--data.crop", "64", "96"])
    assert (config.run.steps, config.run.seed, config.data.crop, preset, resume) == (222, 9, (64, 96), "demo", False)
    with pytest.raises(SystemExit):
        configure(["camvid-day-dusk", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["source"]["condition"] == "day" and printed["model"]["backbone"] == "mit_b0"


def test_a_method_by_name_replaces_the_presets_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure([])[0].stages() == ("supervised", "self_training", "ssr")
    assert configure(["--method.name", "self_training"])[0].stages() == ("self_training",)


def test_default_run_folders_are_numbered_and_a_given_one_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure([])[0].run.dir == "runs/demo"
    (tmp_path / "runs/demo").mkdir(parents=True)
    assert configure([])[0].run.dir == "runs/demo-2"
    (tmp_path / "runs/demo/config.yaml").write_text("")
    (line,) = lines(["--run.dir", "runs/demo"])
    assert "already holds a run" in line and "--resume" in line


FULL = ["--sam.features=cached_full"]
FROM_FOLDERS = ["gta5-cityscapes", "--data.source.root=a", "--data.target.root=b", *FULL]
FROM_FOLDERS += ["--self_training.feature_distance=0"]


def test_stored_features_alone_need_no_checkpoint():
    for argv in (["--sam.mixed=composed"], ["--ssr.domains=source"]):
        config = configure([*FROM_FOLDERS, "--run.dir=none", *argv])[0]
        assert config.sam.encoder == "vit_b" and not config.sam.encodes(config.ssr.domains)
        assert config.reads_features() == (("source", "target") if "mixed" in argv[0] else ("source",))
    config = configure([*FROM_FOLDERS, "--run.dir=none", "--sam.checkpoint=x.pth"])[0]
    assert config.sam.encodes("both") and config.reads_features() == ("source",)
    assert configure(["--run.dir=none"])[0].reads_features() == ()


def test_all_errors_at_once():
    found = lines(["--run.steps", "0", "--optim.lr", "-1", "--model.backbone", "mit_b9", "--data.crop", "8", "8"])
    for option in ("--run.steps", "--optim.lr", "--model.backbone", "--data.crop"):
        assert sum(line.startswith(option) for line in found) == 1, found


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run.stpes", "5"], ["--run.stpes", "did you mean", "--run.steps"]),
        (["demoo"], ["demoo", "did you mean demo"]),
        (["--run.steps", "many"], ["--run.steps", "an integer", "many"]),
        (["--ssr.points", "[stage5]"], ["stage5", "stage4"]),
        (["--method.name", "self_training", "--ssr.weight", "2"], ["--ssr.weight", "no effect", "self_training"]),
        (["--data.source.root", "/somewhere"], ["--data.source.root", "contradicts", "--data.scenes"]),
        (["--self_training.feature_distance", "0.005"], ["--self_training.feature_distance", "--model.weights"]),
        (["--sam.encoder", "vit_b"], ["--sam.checkpoint is missing"]),
        (["--sam.checkpoint", "x.pth"], ["--sam.checkpoint", "no effect", "small"]),
        (["--sam.features", "cached"], ["--sam.features", "cached_views", "it is cached"]),
        (["--ssr.domains", "mixed"], ["--sam.features", "--ssr.domains mixed", "online"]),
        (["--sam.mixed", "both"], ["--sam.mixed must be online or composed", "it is both"]),
        (["--sam.mixed", "composed"], ["--sam.mixed composed", "cached_views", "give --sam.features cached_full"]),
        ([*FULL, "--ssr.domains=source", "--sam.mixed=composed"], ["--sam.mixed composed has no effect"]),
        ([*FULL, "--ssr.domains=source", "--sam.mixed=online"], ["--sam.mixed online has no effect"]),
        ([*FULL, "--ssr.domains=mixed"], ["--ssr.domains mixed", "give --sam.mixed composed"]),
        ([*FULL, "--data.source_features=x"], ["--data.source_features x has no effect", "made with the scenes"]),
        ([*FULL, "--data.target_features=x"], ["--data.target_features x has no effect", "the target"]),
        (["--data.source_features=x"], ["--data.source_features x has no effect", "by no method"]),
        (["--method.name=self_training", "--sam.features=cached_full"], ["--sam.features has no effect"]),
        (["--method.name=self_training", "--data.source_features=x"], ["--data.source_features x has no effect"]),
        ([*FULL, "--sam.encoder=vit_b"], ["--sam.checkpoint is missing", "mixed images are encoded", "composed"]),
        ([*FULL, "--sam.encoder=vit_b", "--sam.mixed=composed"], ["--sam.checkpoint is missing", "scenes are"]),
        ([*FROM_FOLDERS, "--sam.checkpoint=x.pth", "--sam.mixed=composed"], ["--sam.checkpoint x.pth has no effect"]),
        ([*FROM_FOLDERS, "--sam.checkpoint=x.pth", "--ssr.domains=source"], ["--sam.checkpoint x.pth has no effect"]),
        ([*FROM_FOLDERS], ["--sam.checkpoint is missing", "mixed images are encoded"]),
        (["--data.source.features=x"], ["--data.source.features", "did you mean --data.source_features"]),
        (["gta5-cityscapes", "--method.name", "supervised"], ["--data.source.root is missing"]),
        (["--run.device", "cuda:x" if torch.cuda.is_available() else "cuda"], ["--run.device"]),
        (["--resume", "/nowhere"], ["/nowhere", "no run directory"]),
    ],
)
def test_mistakes_name_option_and_value(argv, words):
    found = lines(argv)
    assert any(all(word in line for word in words) for line in found), found


def run_folder(tmp_path, name, image, label, classes=("a", "b", "c")):
    """A folder data set with one good pair and one given pair of file contents."""
    root = tmp_path / name
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps({"names": list(classes)}))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8)).save(root / "images/good.png")
    Image.fromarray(rng.integers(0, len(classes), (40, 64), dtype=np.uint8)).save(root / "labels/good.png")
    for part, content in (("images", image), ("labels", label)):
        if isinstance(content, bytes):
            (root / part / "case.png").write_bytes(content)
        elif content is not None:
            Image.fromarray(content).save(root / part / "case.png")
    return root


def folder_argv(root, tmp_path, *more):
    roots = [f"--data.{name}.root={root}" for name in ("source", "target", "evaluation")]
    splits = [f"--data.{name}.split=all" for name in ("source", "target", "evaluation")]
    small = "--run.steps=2 --optim.warmup_steps=1 --data.crop=[64,64] --data.workers=0 --model.backbone=mit_tiny"
    rest = f"{small} --model.channels=16 --method.name=self_training --run.dir={tmp_path / 'run'}".split()
    return ["folder", *roots, *splits, *rest, *more]


IMAGE = np.full((40, 64, 3), 90, np.uint8)
LABEL = np.zeros((40, 64), np.uint8)


def png(array):
    import io

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


BAD = {
    "label_missing": (IMAGE, None, "label"),
    "size_mismatch": (IMAGE, LABEL[:20], "64x20"),
    "unknown_value": (IMAGE, LABEL + 7, "7"),
    "colour_coded": (IMAGE, np.dstack([LABEL + 10, LABEL + 200, LABEL]), "colour"),
    "all_ignored": (IMAGE, LABEL + 255, "ignored"),
    "truncated": (
        png(np.random.default_rng(1).integers(0, 255, (40, 64, 3), dtype=np.uint8))[:900],
        LABEL,
        "truncated",
    ),
    "text": (b"this is no picture, whatever its name says", LABEL, "case.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_sentence_that_names_the_file(case, tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    image, label, word = BAD[case]
    root = run_folder(tmp_path, "data", image, label)
    with pytest.raises(UserError) as caught:
        main(folder_argv(root, tmp_path))
    message = str(caught.value)
    assert "case.png" in message and word in message and "\n" not in message, message


def test_alpha_and_16_bit_images_are_converted_and_small_ones_padded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    root = run_folder(tmp_path, "data", np.dstack([IMAGE, IMAGE[..., 0]]), LABEL)
    Image.fromarray(np.full((40, 64), 30000, np.uint16)).save(root / "images/deep.png")
    Image.fromarray(LABEL).save(root / "labels/deep.png")
    assert main(folder_argv(root, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "alpha" in out and "16" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: ["--data.source.root=/nowhere/at/all"], ["--data.source.root", "/nowhere/at/all"]),
        (lambda root: [f"--data.target.root={(root.parent / 'empty')}"], ["empty"]),
        (lambda root: [f"--run.dir={root / 'classes.json'}"], ["--run.dir", "classes.json"]),
        (lambda root: [f"--model.weights={root / 'bad.pth'}"], ["bad.pth"]),
        (lambda root: [f"--model.weights={root / 'other.pth'}"], ["other.pth"]),
    ],
)
def test_missing_and_unusable_paths(change, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    root = run_folder(tmp_path, "data", IMAGE, LABEL)
    (tmp_path / "empty").mkdir()
    (root / "bad.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"conv.weight": torch.zeros(3)}, root / "other.pth")
    with pytest.raises(UserError) as caught:
        main(folder_argv(root, tmp_path, *change(root)))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_class_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="class"):
        main(folder_argv(run_folder(tmp_path, "data", IMAGE, LABEL, classes=("only",)), tmp_path))


def test_sam_file_with_a_wrong_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "sam_vit_b_01ec64.pth"
    file.write_bytes(b"0" * 1000)
    root = run_folder(tmp_path, "data", IMAGE, LABEL)
    more = ["--method.name=ssr", "--sam.encoder=vit_b", f"--sam.checkpoint={file}"]
    with pytest.raises(UserError, match=r"sam_vit_b_01ec64\.pth.*sha256"):
        main(folder_argv(root, tmp_path, *more))


def test_the_process_exits_with_2_and_prints_no_traceback(tmp_path):
    process = start(*TINY, "--run.dir", str(tmp_path / "r"), "--run.stpes", "3", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"error: unknown option --run\.stpes: did you mean --run\.steps\?\n", err), err
    assert not (tmp_path / "r").exists()


FREE = ["gta5-cityscapes-source-free", "--data.target.root", "/c", "--source_free.model", "m.safetensors"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (FREE[:3], ["--source_free.model is missing", "model.safetensors"]),
        ([*FREE, "--data.source.root", "/gta5"], ["--data.source.root /gta5", "no effect", "reads no source"]),
        ([*FREE, "--method.class_weight", "inverse_sqrt"], ["--method.class_weight", "does not read"]),
        ([*FREE, "--model.backbone", "mit_b0"], ["--model.backbone", "no effect", "source_free"]),
        ([*FREE, "--self_training.momentum", "0.9"], ["--self_training.momentum", "no effect"]),
        ([*FREE, "--source_free.contrast_start", "40000"], ["--source_free.contrast_start", "--run.steps 40000"]),
        ([*FREE, "--source_free.majority", "0.5"], ["--source_free.majority", "(0.5, 1]"]),
        ([*FREE, "--source_free.contrast", "0", "--data.segments", "/s"], ["--data.segments /s", "no effect"]),
        (["demo-source-free", "--source_free.model", "x"], ["--source_free.model x", "contradicts", "leave one out"]),
        (["demo-source-free", "--data.segments", "/s"], ["--data.segments /s", "made with the scenes"]),
        (["--source_free.contrast", "1"], ["--source_free.contrast", "no effect"]),
    ],
)
def test_mistakes_of_source_free_runs(argv, words):
    found = lines(argv)
    assert any(all(word in line for word in words) for line in found), found


def test_a_source_free_run_needs_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _, _ = configure(FREE)
    assert config.stages() == ("source_free",) and not config.reads_source() and config.reads_segments()
    assert config.data.evaluation.root == "/c"
