"""`python -m ssr_fast.prepare features`: shards, resume after kill -9, damage, and every mistake in a sentence."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_fast.data.features import open_features
from ssr_fast.data.layouts import find_layout
from ssr_fast.models.feature_maps import build_map_encoder
from ssr_fast.models.sam import SamConfig
from ssr_fast.prepare import main
from tests.data.builders import assert_sentence, picture, save

COUNT = 5
SMALL = ("--sam.encoder", "small")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def images(root: Path, count: int) -> Path:
    """Pictures of odd sizes in two folders of one split."""
    for number in range(count):
        blob = np.kron(picture(number, 6, 5), np.ones((7, 8 + number % 3, 1), np.uint8))
        save(root / "images" / ("x" if number % 2 else "y") / f"{number}.png", blob)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return images(tmp_path / "set", COUNT)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["features", *(str(argument) for argument in arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder: Path) -> dict[str, bytes]:
    """Content of a store, without what a killed process may have left in its temporary folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".tmp")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def refused(result: tuple[int, str, str], *parts: object) -> None:
    """Exit code 2 and one sentence with the parts."""
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert_sentence(err[len("error: ") :].strip(), *parts)


def test_a_store_beside_the_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, root, *SMALL, "--mode", "cached_full", "--dtype", "fp16")
    assert code == 0 and err == "" and f"{COUNT} files made, 0 kept, 0 failed" in out and "MB" in out
    store = open_features("", find_layout(root).root, "x")
    encoder = build_map_encoder(SamConfig(encoder="small"), torch.device("cpu"), "fp32")
    assert store.recipe.options["encoder"] == "small" and len(store.recipe.options["weights_sha256"]) == 64
    for entry in find_layout(root).entries("train"):
        with Image.open(entry.image) as image:
            found = store.read(entry.image, image.size)
            assert found.values.shape == (image.height // 8, image.width // 8, 64)
            features, geometry = encoder(entry.image, np.array(image))
            assert found.geometry == geometry and (found.values == features.astype(np.float16)).all()
    assert len(find_layout(root).entries("train")) == COUNT  # the store's files are no images


def test_two_shards_are_one_run_bit_for_bit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, root, *SMALL, "--out", tmp_path / "one", "--workers", 1)
    two = (*SMALL, "--out", tmp_path / "two")
    assert "2 files made" in run(capsys, root, *two, "--rank", 1, "--world", 2)[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "3 files made" in run(capsys, root, *two)[1]
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) == COUNT + 1


def test_what_exists_is_kept_and_what_is_damaged_made_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, root, *SMALL)
    made = sorted((root / "features").rglob("*.features"))
    before, times = files(root / "features"), [path.stat().st_mtime_ns for path in made]
    data = made[2].read_bytes()
    for broken in (data[:-30], data[:150] + bytes([data[150] ^ 1]) + data[151:]):
        made[2].write_bytes(broken)
        code, out, err = run(capsys, root, *SMALL)
        assert code == 0 and f"1 files made, {COUNT - 1} kept" in out
        assert err.count("\n") == 1 and str(made[2]) in err and "made again" in err
        assert files(root / "features") == before
    changed = [path.stat().st_mtime_ns != then for path, then in zip(made, times, strict=True)]
    assert changed == [False, False, True, False, False]
    assert f"{COUNT} files made" in run(capsys, root, *SMALL, "--overwrite")[1]
    assert files(root / "features") == before


def test_other_options_are_refused_or_make_everything_anew(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, root, *SMALL)
    before = files(root / "features")
    refused(run(capsys, root, *SMALL, "--dtype", "fp16"), "dtype int8", "dtype fp16", "--overwrite")
    refused(run(capsys, root, "--sam.encoder", "untrained"), "encoder small", "encoder untrained", "--overwrite")
    assert files(root / "features") == before
    fp16 = (*SMALL, "--dtype", "fp16")
    run(capsys, root, *fp16, "--overwrite", "--rank", 0, "--world", 2)  # as if it had been killed
    code, out, err = run(capsys, root, *fp16)
    assert code == 0 and "2 files made, 3 kept" in out and err.count("other options than its store") == 2


def test_images_that_fail_are_named_at_the_end_and_the_others_done(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [root / "images" / "x" / "1.png", root / "images" / "y" / "thin.png", root / "images" / "z.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:80])
    save(bad[1], picture(0, 50, 5))
    bad[2].write_text("text")
    code, out, err = run(capsys, root, *SMALL)
    assert code == 2 and f"{COUNT - 1} files made, 0 kept, 3 failed" in out
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    for path, line in zip(bad, lines, strict=True):
        assert_sentence(line, path)


def test_a_disk_that_is_full_is_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssr_fast.data.stores.os.fsync", full)
    refused(run(capsys, root, *SMALL), "cannot be written", "No space left on device", "free space")
    assert not list((root / "features").rglob("*.features")) and not list((root / "features" / ".tmp").iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--sam.checkpoint is missing"),
        (("--sam.checkpoint", "none.pth"), "none.pth does not exist"),
        ((*SMALL, "--sam.checkpoint", "none.pth"), "--sam.checkpoint has no effect"),
        ((*SMALL, "--sam.input_size", "64"), "--sam.input_size has no effect"),
        (("--sam.encoder", "vitb"), "--sam.encoder must be one of"),
        (("--sam.encoder", "nowhere:f"), "cannot be imported"),
        ((*SMALL, "--mode", "cached_views"), "--mode must be cached_full"),
        ((*SMALL, "--dtype", "fp8"), "--dtype"),
        ((*SMALL, "--precision", "fp8"), "--precision"),
        ((*SMALL, "--device", "tpu"), "--device must be"),
        ((*SMALL, "--workers", "0"), "--workers must be at least 1"),
        ((*SMALL, "--rank", "0"), "--world"),
        ((*SMALL, "--rank", "2", "--world", "2"), "--rank 2 --world 2"),
        ((*SMALL, "--out", "set/images/f"), "among the images"),
        ((*SMALL, "--out", "set"), "store.json"),
    ],
)
def test_mistakes_in_the_options(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.chdir(root.parent)
    before = files(root)
    code, _, err = run(capsys, "set", *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    assert files(root) == before


def test_mistakes_are_reported_all_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, root, "--mode", "online", "--workers", "0")
    assert code == 2 and err.count("error: ") == err.count("\n") == 3


def test_ctrl_c_is_a_sentence(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ssr_fast.models.feature_maps.MapEncoder.__call__", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        code, _, err = run(capsys, root, *SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 3 and err.startswith("error: stopped by Ctrl-C") and err.count("\n") == 1


@pytest.mark.parametrize("wanted", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_nothing_and_leaves_the_same_store(tmp_path: Path, wanted: int) -> None:
    """The encoder is slowed down a little, so that several kills fall into one preparation."""
    count, root = 40, images(tmp_path / "set", 40)
    script = (
        "import sys, time\n"
        "from ssr_fast.models.feature_maps import MapEncoder\n"
        "from ssr_fast.prepare import main\n"
        "call = MapEncoder.__call__\n"
        "def slow(self, *arguments):\n"
        "    time.sleep(0.02)\n"
        "    return call(self, *arguments)\n"
        "MapEncoder.__call__ = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "features", str(root), *SMALL, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    seed = int(time.time())
    print("seed", seed)
    store, rng, kills, finished = tmp_path / "store", random.Random(seed), 0, {}
    while kills < wanted:
        process = subprocess.Popen([*command, str(store)], env=environment, stdout=subprocess.DEVNULL)
        there = len(finished)
        while process.poll() is None and len(list(store.rglob("*.features"))) <= there:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        ended = process.wait()
        now = files(store)
        assert all(now[name] == content for name, content in finished.items()), "a finished file has changed"
        finished = {name: content for name, content in now.items() if name.endswith(".features")}
        if ended == 0:
            break
        kills += 1
    assert kills >= 3, kills
    done = subprocess.run([*command, str(store)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"{count - len(finished)} files made, {len(finished)} kept" in done.stdout
    assert done.stderr == "" and files(store) == files(tmp_path / "whole")
    print(kills, "kills; files that were there after the last one:", len(finished))
