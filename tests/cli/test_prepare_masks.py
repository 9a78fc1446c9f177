"""`python -m ssr_fast.prepare masks`: shards, resume, a user's own maps, pictures, and every mistake in a sentence."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.layouts import find_layout
from ssr_fast.data.segments import open_store
from ssr_fast.prepare import main
from ssr_fast.report.segment_pictures import boundaries, segment_picture, sheet
from tests.data import builders
from tests.data.builders import assert_sentence, picture, save

COUNT = 5


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images with blobs, in two folders of one split."""
    for number in range(COUNT):
        blob = np.kron(picture(number, 6, 5), np.ones((7, 8, 1), np.uint8))  # [35, 48, 3]
        save(tmp_path / "set" / "images" / ("x" if number % 2 else "y") / f"{number}.png", blob)
    return tmp_path / "set"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["masks", *(str(argument) for argument in arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def superpixels(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run(capsys, *arguments, "--generator", "superpixels", "--workers", 0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result: tuple[int, str, str], *parts: object) -> None:
    """Exit code 2 and one sentence with the parts."""
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert_sentence(err[len("error: ") :].strip(), *parts)


# stores


def test_a_store_beside_the_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = superpixels(capsys, root)
    assert code == 0 and err == "" and f"{COUNT} maps made, 0 kept, 0 failed" in out and "100.0% of the pixels" in out
    store = open_store("", find_layout(root).root)
    for entry in find_layout(root).entries("train"):
        assert store.read(entry.image, (48, 35)).max() >= 2


def test_camvids_root_may_be_one_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.camvid(tmp_path / "CamVid")
    assert superpixels(capsys, tmp_path, "--split", "test", "--condition", "dusk")[0] == 0
    assert (tmp_path / "CamVid" / "segments" / "test" / "0001TP_008550.png.png").is_file()
    assert len(list((tmp_path / "CamVid" / "segments").rglob("*.png"))) == 1


def test_two_shards_are_one_run_bit_for_bit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    superpixels(capsys, root, "--out", tmp_path / "one")
    assert "2 maps made" in superpixels(capsys, root, "--out", tmp_path / "two", "--rank", 1, "--world", 2)[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "3 maps made" in superpixels(capsys, root, "--out", tmp_path / "two")[1]
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two") and len(snapshot(tmp_path / "one")) == COUNT + 1


def test_what_exists_is_kept_and_what_is_damaged_made_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    superpixels(capsys, root)
    maps = sorted((root / "segments").rglob("*.png"))
    before, times = snapshot(root / "segments"), [path.stat().st_mtime_ns for path in maps]
    maps[2].write_bytes(maps[2].read_bytes()[:-30])
    code, out, err = superpixels(capsys, root)
    assert code == 0 and f"1 maps made, {COUNT - 1} kept" in out
    assert err.count("\n") == 1 and str(maps[2]) in err and "made again" in err
    assert snapshot(root / "segments") == before
    changed = [path.stat().st_mtime_ns != then for path, then in zip(maps, times, strict=True)]
    assert changed == [False, False, True, False, False]
    assert f"{COUNT} maps made" in superpixels(capsys, root, "--overwrite")[1]


def test_other_options_are_refused_or_make_everything_anew(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    superpixels(capsys, root)
    before = snapshot(root / "segments")
    refused(superpixels(capsys, root, "--scale", 900), root / "segments", "scale 20.0", "scale 900.0", "--overwrite")
    assert snapshot(root / "segments") == before
    superpixels(capsys, root, "--scale", 900, "--overwrite", "--rank", 0, "--world", 2)  # as if it had been killed
    code, out, err = superpixels(capsys, root, "--scale", 900)
    assert code == 0 and "2 maps made, 3 kept" in out and err.count("other options than its store") == 2


def test_a_killed_run_leaves_whole_maps_and_no_process(root: Path, tmp_path: Path) -> None:
    for number in range(COUNT, 24):
        save(root / "images" / f"{number}.png", picture(number, 300, 200))
    command = [sys.executable, "-m", "ssr_fast.prepare", "masks", str(root), "--generator", "superpixels"]
    command += ["--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((root / "segments").rglob("*.png")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    store, entries = open_store("", root), find_layout(root).entries("train")
    there = [entry.image for entry in entries if store.path(entry.image).exists()]
    assert 0 < len(there) < 24 and all(store.problem(image, _size(image)) is None for image in there)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and f"{24 - len(there)} maps made, {len(there)} kept" in done.stdout, done.stderr
    assert all(store.problem(entry.image, _size(entry.image)) is None for entry in entries)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _size(image: Path) -> tuple[int, int]:
    with Image.open(image) as file:
        return file.size


def test_ctrl_c_is_a_sentence(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ssr_fast.data.superpixels.Superpixels.__call__", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        code, _, err = superpixels(capsys, root)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 3 and err.startswith("error: stopped by Ctrl-C") and err.count("\n") == 1


def test_bad_images_are_named_at_the_end_and_the_others_done(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [root / "images" / "x" / "1.png", root / "images" / "z.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:80])
    bad[1].write_text("text")
    code, out, err = superpixels(capsys, root)
    assert code == 2 and f"{COUNT - 1} maps made, 0 kept, 2 failed" in out
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    for path, line in zip(bad, lines, strict=True):
        assert_sentence(line, path)


def test_images_that_differ_in_their_suffix_have_maps_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "images" / "a.png", picture(1, 40, 30))
    save(tmp_path / "images" / "a.jpg", picture(2, 20, 10))
    assert superpixels(capsys, tmp_path)[0] == 0
    store = open_store("", tmp_path)
    assert store.read(tmp_path / "images" / "a.png").shape == (30, 40)
    assert store.read(tmp_path / "images" / "a.jpg").shape == (10, 20)


# mistakes


def test_a_root_that_cannot_be_used(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(superpixels(capsys, tmp_path / "none"), "ROOT", tmp_path / "none", "does not exist")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    refused(superpixels(capsys, tmp_path / "empty"), tmp_path / "empty", "no images")
    refused(superpixels(capsys, root, "--out", root / "images" / "segments"), "--out", "among the images")
    refused(superpixels(capsys, root, "--out", root), "--out", "store.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_root_that_may_not_be_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root.chmod(0)
    try:
        refused(superpixels(capsys, root), "cannot be listed", "permissions")
    finally:
        root.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--generator"),
        (("--generator", "slic"), "slic is no folder"),
        (("--generator", "sam"), "--sam-checkpoint is missing"),
        (("--generator", "sam", "--sam-checkpoint", "none.pth"), "none.pth does not exist"),
        (("--generator", "sam", "--sam-checkpoint", "x", "--points-per-batch", "0"), "--points-per-batch"),
        (("--generator", "sam", "--sam-checkpoint", "x", "--workers", "2"), "--workers has no effect"),
        (("--generator", "sam", "--sam-checkpoint", "x", "--scale", "2"), "--scale has no effect"),
        (("--generator", "superpixels", "--device", "cpu"), "--device has no effect"),
        (("--generator", "superpixels", "--points-per-side", "8"), "--points-per-side has no effect"),
        (("--generator", "superpixels", "--count", "8"), "--count has no effect with --algorithm felzenszwalb"),
        (("--generator", "superpixels", "--algorithm", "slic", "--sigma", "1"), "--sigma has no effect"),
        (("--generator", "superpixels", "--scale", "nan"), "--scale must be > 0"),
        (("--generator", "superpixels", "--scale", "x"), "--scale"),
        (("--generator", "superpixels", "--min-share", "1"), "--min-share"),
        (("--generator", "superpixels", "--workers", "-1"), "--workers"),
        (("--generator", "superpixels", "--rank", "0"), "--world"),
        (("--generator", "superpixels", "--rank", "2", "--world", "2"), "--rank 2 --world 2"),
        (("--generator", ".", "--algorithm", "slic"), "--algorithm has no effect"),
    ],
)
def test_mistakes_in_the_options(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    refused(run(capsys, root, *arguments), part)
    assert not (root / "segments").exists()


def test_mistakes_are_reported_all_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, root, "--generator", "superpixels", "--scale", "0", "--sigma", "-1", "--device", "cpu")
    assert code == 2 and err.count("error: ") == err.count("\n") == 3


def test_a_damaged_environment_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "one")
    refused(superpixels(capsys, root), "RANK=one")


def test_the_command_line_does_not_wait_for_pytorch() -> None:
    script = "import sys, ssr_fast.prepare; print({'torch', 'skimage', 'segment_anything'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "set()", done.stderr


# a user's own maps


def stripes(number: int, high: int = 300) -> NDArray[np.int64]:
    """Ids [35, 48] with 0 among them."""
    return np.random.default_rng(number).integers(0, high, (35, 48))


def own_maps(root: Path, folder: Path) -> Path:
    """One map an image, each in another format."""
    folder.mkdir()
    save(folder / "0.png", stripes(0).astype(np.uint16))
    save(folder / "1.tif", stripes(1).astype(np.int32))
    np.save(folder / "2.npy", stripes(2))
    save(folder / "images" / "x" / "3.png", stripes(3, 256).astype(np.uint8))
    save(folder / "images" / "y" / "4.png.png", stripes(4).astype(np.uint16))
    return folder


def test_own_maps_of_any_format_keep_their_ids(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_maps(root, tmp_path / "maps")
    code, out, err = run(capsys, root, "--generator", folder, "--workers", 0)
    assert code == 0 and "5 maps made" in out, err
    store = open_store("", root)
    for entry in find_layout(root).entries("train"):
        number = int(entry.image.stem)
        assert (store.read(entry.image) == stripes(number, 256 if number == 3 else 300)).all()


def test_a_store_is_a_folder_of_own_maps(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    superpixels(capsys, root)
    (root / "segments").rename(tmp_path / "maps")
    assert run(capsys, root, "--generator", tmp_path / "maps", "--workers", 2)[0] == 0
    old, new = open_store(str(tmp_path / "maps"), root), open_store("", root)
    for entry in find_layout(root).entries("train"):
        assert (old.read(entry.image) == new.read(entry.image)).all()


def test_ids_beyond_16_bits_are_renumbered(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_maps(root, tmp_path / "maps")
    ids = stripes(2) * 10_000_000_000
    np.save(folder / "2.npy", ids)
    assert run(capsys, root, "--generator", folder, "--workers", 0)[0] == 0
    found = open_store("", root).read(root / "images" / "y" / "2.png")
    values = np.unique(ids)
    assert (found == np.searchsorted(values, ids)).all() and values[0] == 0 and ((found == 0) == (ids == 0)).all()


BAD_MAPS = {
    "wrong size": (lambda path: save(path, stripes(0)[:, :-1].astype(np.uint16)), ["47x35", "48x35", "0.png"]),
    "missing": (lambda path: None, ["has no map", "0.png"]),
    "colours": (lambda path: save(path, picture(0, 48, 35)), ["shape [35, 48, 3]"]),
    "damaged": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), ["0.png"]),
    "JPEG": (lambda path: Image.fromarray(stripes(0).astype(np.uint8)).save(path, "JPEG"), ["is a JPEG"]),
    "float TIFF": (lambda path: save(path.with_suffix(".tif"), stripes(0).astype(np.float32)), ["float32"]),
    "float .npy": (lambda path: np.save(path.with_suffix(".npy"), stripes(0) / 2), ["float64"]),
    "negative": (lambda path: np.save(path.with_suffix(".npy"), stripes(0) - 1), ["negative id -1"]),
    "objects": (lambda path: np.save(path.with_suffix(".npy"), np.array([{}])), ["0.npy"]),
    "not an .npy": (lambda path: path.with_suffix(".npy").write_bytes(b"\x93NUMPY\x01"), ["0.npy"]),
    "no pixels": (lambda path: np.save(path.with_suffix(".npy"), np.zeros((0, 0), int)), ["no pixels"]),
    "two": (lambda path: [own_maps_pair(path)], ["has several maps", "0.npy"]),
}


def own_maps_pair(path: Path) -> None:
    save(path, stripes(0).astype(np.uint16))
    np.save(path.with_suffix(".npy"), stripes(0))


@pytest.mark.parametrize("name", BAD_MAPS)
def test_a_bad_map_is_named_and_the_others_are_kept(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = own_maps(root, tmp_path / "maps")
    (folder / "0.png").unlink()
    write, parts = BAD_MAPS[name]
    write(folder / "0.png")
    result = run(capsys, root, "--generator", folder, "--workers", 0)
    refused(result, *parts)
    assert "4 maps made, 0 kept, 1 failed" in result[1]
    assert len(list((root / "segments").rglob("*.png"))) == 4
    for extra in folder.glob("0.*"):
        extra.unlink()
    save(folder / "0.png", stripes(0).astype(np.uint16))
    code, out, _ = run(capsys, root, "--generator", folder, "--workers", 0)
    assert code == 0 and "1 maps made, 4 kept" in out


def test_a_name_that_two_images_have_is_not_guessed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own_maps(root, tmp_path / "maps")
    shutil.copy(root / "images" / "y" / "0.png", root / "images" / "x" / "0.png")
    save(root / "images" / "x" / "3.jpg", picture(3, 48, 35))
    code, out, err = run(capsys, root, "--generator", folder, "--workers", 0)
    assert code == 2 and "3 maps made, 0 kept, 4 failed" in out
    assert err.count("has no map") == 2 and err.count("shares its map") == 2
    for line in err.splitlines():
        assert_sentence(line)


# pictures


def test_the_preview_shows_image_and_segments(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = superpixels(capsys, root, "--preview")
    assert code == 0 and str(root / "segments" / "preview.png") in out
    drawn = np.asarray(Image.open(root / "segments" / "preview.png"))
    rows = 3  # of five images every second
    assert drawn.shape == (rows * 35 + (rows - 1) * 8, 2 * 48 + 8, 3)
    images = [entry.image for entry in find_layout(root).entries("train")][::2]
    assert (drawn[:35, :48] == np.asarray(Image.open(images[0]))).all()
    assert len(np.unique(drawn[:35, 56:].reshape(-1, 3), axis=0)) > 5
    code, out, _ = superpixels(capsys, root, "--preview", tmp_path / "one.jpg")
    assert code == 0 and "5 kept" in out and (tmp_path / "one.jpg").stat().st_size > 1000


def test_a_preview_folder_gets_a_picture_of_each(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert superpixels(capsys, root, "--preview", tmp_path / "pictures")[0] == 0
    names = [path.relative_to(tmp_path / "pictures").as_posix() for path in (tmp_path / "pictures").rglob("*.png")]
    assert sorted(names) == [f"images/{'x' if k % 2 else 'y'}/{k}.png.png" for k in (1, 3, 0, 2, 4)]
    (tmp_path / "file").write_text("x")
    refused(superpixels(capsys, root, "--preview", tmp_path / "file" / "p.png"), "--preview", tmp_path / "file")


def test_a_picture_is_coloured_with_boundaries_and_dark_where_nothing_is() -> None:
    segments = np.zeros((20, 30), np.uint16)
    segments[2:10, 2:10], segments[12:18, 4:28] = 1, 65535
    image = np.full((20, 30, 3), 200, np.uint8)
    right = segment_picture(image, segments)[:, 38:].astype(int)
    edge = boundaries(segments)
    assert (right[edge] == 255).all() and 40 < edge.sum() < 120
    assert (right[(segments == 0) & ~edge] == 50).all()
    inside = [right[(segments == k) & ~edge] for k in (1, 65535)]
    assert all((color == color[0]).all() for color in inside) and (inside[0][0] != inside[1][0]).any()
    wide = sheet([np.zeros((100, 5000, 3), np.uint8), right.astype(np.uint8)])
    assert wide.shape == (round(100 * 2056 / 5000) + 8 + 20, 2056, 3)
    with pytest.raises(ValueError, match="differ"):
        segment_picture(image[:-1], segments)
