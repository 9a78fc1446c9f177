"""Segment stores: maps are lossless, and whole or named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data.index import Sample
from ssr_fast.data.segments import COMMAND, Recipe, SegmentStore, compact, create_store, open_store
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence, ids, picture, save

RECIPE = Recipe("test", {"scale": 2.0})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def store(root: Path) -> SegmentStore:
    return create_store(None, root, RECIPE, overwrite=False)


def noise(seed: int = 0, width: int = 16, height: int = 8, high: int = 65536) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, high, (height, width)).astype(np.uint16)


def problem_of(store: SegmentStore, image: Path, size: tuple[int, int] = (16, 8)) -> str:
    """`read`, `problem` and the sentence agree on what is wrong."""
    problem = store.problem(image, size)
    assert problem is not None
    with pytest.raises(UserError) as error:
        store.read(image, size)
    assert_sentence(error.value, store.path(image), problem, COMMAND, store.root)
    return problem


# the file


def test_every_id_comes_back(root: Path, store: SegmentStore) -> None:
    everything = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    store.write(root / "images" / "a.png", everything)
    read = store.read(str(root / "images" / "a.png"), (256, 256))
    assert read.dtype == np.uint16 and (read == everything).all() and read.flags.writeable
    with Image.open(root / "segments" / "images" / "a.png.png") as file:
        assert file.format == "PNG" and file.mode in ("I;16", "I")
    assert not list((root / "segments" / ".tmp").iterdir())


def test_a_view_of_an_array_is_written_as_it_is(root: Path, store: SegmentStore) -> None:
    whole = noise()
    store.write(root / "a.png", whole[::-1, ::2])
    assert (store.read(root / "a.png") == whole[::-1, ::2]).all()


def test_other_types_are_refused(root: Path, store: SegmentStore) -> None:
    for array in (noise().astype(np.int32), noise()[0], noise()[None]):
        with pytest.raises(ValueError, match="uint16"):
            store.write(root / "a.png", array)  # type: ignore[arg-type]


def test_no_two_images_share_a_map(root: Path, store: SegmentStore) -> None:
    names = ["a.png", "a.jpg", "a.png.png", "a.PNG", "b/a.png", "a", ".a.png", "ä ö.png", "store.json"]
    paths = [store.path(root / name) for name in names]
    assert len(set(paths)) == len(names) and all(path.is_relative_to(store.folder) for path in paths)
    for number, name in enumerate(names):
        store.write(root / name, np.full((2, 2), number, np.uint16))
    assert [int(store.read(root / name)[0, 0]) for name in names] == list(range(len(names)))
    assert open_store("", root).recipe == RECIPE


def test_the_mode_of_a_map_follows_the_umask(root: Path, store: SegmentStore) -> None:
    before = os.umask(0o022)
    try:
        store.write(root / "a.png", noise())
    finally:
        os.umask(before)
    assert store.path(root / "a.png").stat().st_mode & 0o777 == 0o644


# damage


def test_a_missing_map(root: Path, store: SegmentStore) -> None:
    assert problem_of(store, root / "a.png") == "is missing"


def test_a_map_that_is_cut_short_anywhere(root: Path, store: SegmentStore) -> None:
    store.write(root / "a.png", noise())
    path = store.path(root / "a.png")
    data = path.read_bytes()
    for length in (0, 1, 8, 20, 33, 60, len(data) // 2, len(data) - 13, len(data) - 12, len(data) - 1):
        path.write_bytes(data[:length])
        assert problem_of(store, root / "a.png"), length


def test_a_flipped_bit_anywhere(root: Path, store: SegmentStore) -> None:
    store.write(root / "a.png", noise())
    path = store.path(root / "a.png")
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert store.problem(root / "a.png", (16, 8)), position


@pytest.mark.parametrize("other", ["8-bit", "colour", "jpeg", "text", "folder", "tiff"])
def test_what_is_no_map(root: Path, store: SegmentStore, other: str) -> None:
    path = store.path(root / "a.png")
    path.parent.mkdir(exist_ok=True)
    if other == "folder":
        path.mkdir()
    elif other == "text":
        path.write_text("no picture")
    else:
        array = {"8-bit": ids(0, 1), "colour": picture(), "jpeg": picture(), "tiff": noise()}[other]
        Image.fromarray(array).save(path, {"jpeg": "JPEG", "tiff": "TIFF"}.get(other, "PNG"))
    problem_of(store, root / "a.png")


def test_another_size(root: Path, store: SegmentStore) -> None:
    store.write(root / "a.png", noise())
    problem = problem_of(store, root / "a.png", (8, 16))
    assert "16x8" in problem and "8x16" in problem


def test_a_map_of_another_recipe_is_not_mixed_in(root: Path, store: SegmentStore) -> None:
    store.write(root / "a.png", noise())
    other = create_store(None, root, Recipe("test", {"scale": 3.0}), overwrite=True)
    assert problem_of(other, root / "a.png") == "was made with other options than its store"
    assert store.problem(root / "a.png", (16, 8)) is None


def test_all_samples_are_looked_for_before_training(root: Path, store: SegmentStore) -> None:
    samples = [Sample(str(k), str(root / f"{k}.png"), None, 16, 8, None) for k in range(4)]
    for sample in samples:
        store.write(sample.image, noise())
    store.require(samples)
    store.path(samples[1].image).unlink()
    store.write(samples[3].image, noise(width=4))
    with pytest.raises(UserError) as error:
        store.require(samples)
    assert_sentence(error.value, store.path(samples[1].image), "is missing", "1 more of 4", COMMAND)


def test_a_process_killed_in_the_middle_of_a_write_leaves_no_half_map(root: Path, store: SegmentStore) -> None:
    """The old map stays, or none; what is left over goes away when it is old."""
    store.write(root / "a.png", noise())
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "from ssr_fast.data.segments import open_store\n"
        "def save(image, file, *rest, **options):\n"
        "    file.write(b'\\x89PNG half of a map')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Image.Image.save = save\n"
        "root = Path(sys.argv[1])\n"
        "open_store('', root).write(root / sys.argv[2], np.zeros((8, 16), np.uint16))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("a.png", "b.png"):
        done = subprocess.run([sys.executable, "-c", script, str(root), name], env=environment, capture_output=True)
        assert done.returncode == -9, done.stderr.decode()
    assert (store.read(root / "a.png") == noise()).all()
    assert problem_of(store, root / "b.png") == "is missing"
    left = list((store.folder / ".tmp").iterdir())
    assert len(left) == 2
    os.utime(left[0], (time.time() - 2 * 3600,) * 2)
    create_store(None, root, RECIPE, overwrite=False)
    assert list((store.folder / ".tmp").iterdir()) == left[1:]


def test_a_full_disk_is_a_sentence(root: Path, store: SegmentStore) -> None:
    (store.folder / "images").write_text("a file where a folder must be")
    with pytest.raises(UserError) as error:
        store.write(root / "images" / "a.png", noise())
    assert_sentence(error.value, store.path(root / "images" / "a.png"), "cannot be written")


# store.json


def test_a_store_is_found_by_option_or_in_the_root(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_store("", root)
    assert_sentence(error.value, "--data.segments", root / "segments", f"{COMMAND} {root}`")
    with pytest.raises(UserError) as error:
        open_store(str(tmp_path / "other"), root)
    assert_sentence(error.value, tmp_path / "other", f"--out {tmp_path / 'other'}")
    created = create_store(tmp_path / "other", root, RECIPE, overwrite=False)
    assert open_store(str(tmp_path / "other"), root) == created


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"version": 1, "generator": 3, "options": {}}', "\xff"])
def test_a_damaged_store_json_is_named(root: Path, store: SegmentStore, text: str) -> None:
    file = store.folder / "store.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        open_store("", root)
    assert_sentence(error.value, file, "--overwrite")
    with pytest.raises(UserError):
        create_store(None, root, RECIPE, overwrite=False)
    create_store(None, root, RECIPE, overwrite=True)
    assert open_store("", root).recipe == RECIPE


def test_a_newer_version_is_refused(root: Path, store: SegmentStore) -> None:
    file = store.folder / "store.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_store("", root)


def test_other_options_need_overwrite(root: Path, store: SegmentStore) -> None:
    other = Recipe("test", {"scale": 3.0})
    with pytest.raises(UserError) as error:
        create_store(None, root, other, overwrite=False)
    assert_sentence(error.value, store.folder, "scale 2.0", "scale 3.0", "--overwrite", "--out")
    assert open_store("", root).recipe == RECIPE
    assert create_store(None, root, other, overwrite=True) == open_store("", root)


def test_a_folder_of_other_things_is_not_written_into(root: Path) -> None:
    save(root / "images" / "a.png", picture())
    for overwrite in (False, True):
        with pytest.raises(UserError) as error:
            create_store(root / "images", root, RECIPE, overwrite)
        assert_sentence(error.value, root / "images", "--out")
    assert [path.name for path in (root / "images").iterdir()] == ["a.png"]


# ids


def test_compact_keeps_segments_and_their_order() -> None:
    big = np.array([[0, 70000, 5], [2**40, 70000, 5]], np.int64)
    assert compact(big).tolist() == [[0, 2, 1], [3, 2, 1]] and compact(big).dtype == np.uint16
    assert compact(np.array([[2**64 - 1, 0]], np.uint64)).tolist() == [[1, 0]]
    assert compact(np.array([[7, 7]])).tolist() == [[1, 1]] and not compact(np.zeros((2, 3), int)).any()


def test_more_than_65535_segments_keep_the_largest() -> None:
    ids = np.arange(1, 70001)
    ids = np.concatenate([ids, ids[-3:], [70000]])  # 69998, 69999 and 70000 are larger than the others
    found = compact(ids[None])[0]
    assert found.max() == 65535 and len(np.unique(found)) == 65536
    assert found[0] == 1 and found[65531] == 65532 and not found[65532:69997].any()
    assert found[69997:].tolist() == [65533, 65534, 65535] * 2 + [65535]


def test_the_recipe_names_a_map_beyond_this_process() -> None:
    assert Recipe("a", {"x": 1, "y": 2.5}).digest == Recipe("a", {"y": 2.5, "x": 1}).digest == "b2a8443b2f36ac3f"
