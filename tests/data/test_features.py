"""Feature stores: what comes back, and damage that is always noticed and named."""

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import COMMAND, FeatureShape, FeatureStore, create_features, open_features
from ssr_fast.data.images import BadFile
from ssr_fast.data.index import Sample
from ssr_fast.data.stores import Recipe
from ssr_fast.errors import UserError
from tests.data.builders import assert_sentence

GEOMETRY = Geometry((100, 60), (100, 60), 16)
SIZE = GEOMETRY.size


def recipe(dtype: str = "int8", **options: object) -> Recipe:
    return Recipe("test", {"dtype": dtype, **options})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture(params=["int8", "fp16"])
def store(request: pytest.FixtureRequest, root: Path) -> FeatureStore:
    return create_features(None, root, recipe(request.param), overwrite=False)


def noise(seed: int = 0, shape: tuple[int, ...] = (4, 7, 12)) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def problem_of(store: FeatureStore, image: Path) -> str:
    """`read` and `problem` agree on what is wrong, and the sentence names file and cure."""
    problem = store.problem(image, SIZE)
    assert problem is not None
    with pytest.raises(UserError) as error:
        store.read(image, SIZE)
    assert_sentence(error.value, store.path(image), problem, f"{COMMAND} {store.root}`")
    return problem


# values


@pytest.mark.filterwarnings("error")  # a token of zeros is divided by nothing
def test_features_come_back(root: Path, store: FeatureStore) -> None:
    features = noise()
    features[1, 2] = 0  # a token of zeros
    features[0, 0] *= 1e-3
    store.write(root / "images" / "a.png", features, GEOMETRY)
    found = store.read(str(root / "images" / "a.png"), SIZE)
    assert found.geometry == GEOMETRY and found.values.shape == features.shape
    dense = found.dense()
    assert dense.dtype == np.float32 and not dense[1, 2].any()
    if found.scales is None:
        assert (dense == features.astype(np.float16)).all()
    else:
        largest = np.abs(features).max(2, keepdims=True)
        assert (np.abs(dense - features) <= largest / 254 * (1 + 1e-5)).all() and found.values.min() >= -127
        assert (np.abs(found.values).max(2) == np.where(largest[..., 0] > 0, 127, 0)).all()
    assert (found.dense(slice(1, 3), slice(2, 3)) == dense[1:3, 2:3]).all()
    assert not list((root / "features" / ".tmp").iterdir()) and pickle.loads(pickle.dumps(store)) == store


def test_int8_keeps_directions(root: Path) -> None:
    store = create_features(None, root, recipe(), overwrite=False)
    features = noise(shape=(32, 32, 256))
    store.write(root / "a.png", features, GEOMETRY)
    dense = store.read(root / "a.png").dense()
    norms = np.linalg.norm(features, axis=2) * np.linalg.norm(dense, axis=2)
    assert ((features * dense).sum(2) / norms).min() > 0.9999


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-10, 1e30, 3e38])
def test_int8_of_any_size_stays_finite(root: Path, scale: float) -> None:
    store = create_features(None, root, recipe(), overwrite=False)
    features = (np.sign(noise()) * np.float32(scale)).astype(np.float32)
    store.write(root / "a.png", features, GEOMETRY)
    dense = store.read(root / "a.png").dense()
    assert np.isfinite(dense).all() and (np.abs(dense - features) <= np.abs(features) / 100 + 1e-43).all()


@pytest.mark.parametrize(("dtype", "value", "part"), [("int8", np.nan, "finite"), ("fp16", 7e4, "--dtype int8")])
def test_features_that_cannot_be_kept(root: Path, dtype: str, value: float, part: str) -> None:
    store, features = create_features(None, root, recipe(dtype), overwrite=False), noise()
    features[0, 0, 0] = value
    with pytest.raises(BadFile) as error:
        store.write(root / "a.png", features, GEOMETRY)
    assert_sentence(error.value, root / "a.png", part)
    assert not store.path(root / "a.png").exists()


def test_other_arrays_are_refused(root: Path, store: FeatureStore) -> None:
    for array in (noise().astype(np.float64), noise()[0]):
        with pytest.raises(ValueError, match="float32"):
            store.write(root / "a.png", array, GEOMETRY)  # type: ignore[arg-type]


def test_equal_features_are_equal_bytes(root: Path, store: FeatureStore) -> None:
    for name in ("a.png", "b.png"):
        store.write(root / name, noise(), GEOMETRY)
    assert store.path(root / "a.png").read_bytes() == store.path(root / "b.png").read_bytes()


# damage


def test_a_missing_file_and_a_folder(root: Path, store: FeatureStore) -> None:
    assert problem_of(store, root / "a.png") == "is missing"
    store.path(root / "a.png").mkdir(parents=True)
    assert "cannot be read" in problem_of(store, root / "a.png")


def test_every_truncation_is_noticed(root: Path, store: FeatureStore) -> None:
    store.write(root / "a.png", noise(), GEOMETRY)
    path = store.path(root / "a.png")
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert store.problem(root / "a.png", SIZE), length
    problem_of(store, root / "a.png")
    path.write_bytes(data + b"\0")
    problem_of(store, root / "a.png")


def test_a_flipped_byte_is_noticed_wherever_it_is(root: Path, store: FeatureStore) -> None:
    store.write(root / "a.png", noise(), GEOMETRY)
    path = store.path(root / "a.png")
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    header = list(range(min(120, len(data))))
    for position in [*header, *rng.choice(len(data), 300, replace=len(data) < 300)]:
        flipped = data[position] ^ int(rng.integers(1, 256))
        path.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
        assert store.problem(root / "a.png", SIZE), position
        problem_of(store, root / "a.png")
    path.write_bytes(data)
    assert store.problem(root / "a.png", SIZE) is None


@pytest.mark.parametrize("content", [b"", b"no features", b"\x89PNG\r\n\x1a\n" + bytes(200), b"SSRFEAT0" + bytes(200)])
def test_what_is_no_feature_file(root: Path, store: FeatureStore, content: bytes) -> None:
    path = store.path(root / "a.png")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    problem_of(store, root / "a.png")


def test_another_size_and_another_recipe(root: Path, store: FeatureStore) -> None:
    store.write(root / "a.png", noise(), Geometry((60, 100), (100, 60), 16))
    assert "60x100" in problem_of(store, root / "a.png")
    store.write(root / "a.png", noise(), GEOMETRY)
    changed = recipe(store.recipe.options["dtype"], encoder="other")
    other = create_features(None, root, changed, overwrite=True)
    assert problem_of(other, root / "a.png") == "was made with other options than its store"
    assert store.problem(root / "a.png", SIZE) is None


def test_all_samples_are_looked_for_before_training(root: Path, store: FeatureStore) -> None:
    samples = [Sample(str(k), str(root / f"{k}.png"), None, *SIZE, None) for k in range(4)]
    for sample in samples:
        store.write(sample.image, noise(), GEOMETRY)
    assert store.require(samples) == FeatureShape(12, 16)
    cut = store.path(samples[3].image)
    cut.write_bytes(cut.read_bytes()[:-1])
    store.path(samples[1].image).unlink()
    with pytest.raises(UserError) as error:
        store.require(samples)
    assert_sentence(error.value, store.path(samples[1].image), "is missing", "2 of 4", COMMAND)
    store.write(samples[1].image, noise(shape=(4, 7, 5)), GEOMETRY)
    store.write(samples[3].image, noise(), GEOMETRY)
    with pytest.raises(UserError) as error:
        store.require(samples)
    assert_sentence(error.value, store.path(samples[1].image), "different encoders", "--overwrite")


# the disk


def test_a_full_disk_is_one_sentence(root: Path, store: FeatureStore) -> None:
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    store.write(root / "a.png", noise(), GEOMETRY)
    script = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from tests.data.test_features import GEOMETRY, noise, open_features\n"
        "root = Path(sys.argv[1])\n"
        "store = open_features('', root, 'x')\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (200, {resource.RLIM_INFINITY}))\n"
        "for name in ('a.png', 'b.png'):\n"
        "    try:\n"
        "        store.write(root / name, noise(1), GEOMETRY)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, str(root)], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line, name in zip(lines, ("a.png", "b.png"), strict=True):
        assert line.startswith("UserError ")
        assert_sentence(line.removeprefix("UserError "), store.path(root / name), "cannot be written", "free space")
    assert (store.read(root / "a.png").dense() == open_features("", root, "x").read(root / "a.png").dense()).all()
    assert problem_of(store, root / "b.png") == "is missing" and not list((store.folder / ".tmp").iterdir())


def test_content_is_on_the_disk_before_it_takes_its_name(
    root: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    store.write(root / "a.png", noise(), GEOMETRY)
    assert calls == ["fsync", "replace"]


# store.json


def test_a_store_is_found_by_option_or_in_the_root(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_features("", root, "data.source.features")
    assert_sentence(error.value, "--data.source.features", root / "features", f"{COMMAND} {root}`")
    created = create_features(tmp_path / "other", root, recipe(), overwrite=False)
    assert open_features(str(tmp_path / "other"), root, "data.source.features") == created
    create_features(tmp_path / "wrong", root, Recipe("superpixels", {"scale": 2.0}), overwrite=False)
    with pytest.raises(UserError) as error:
        open_features(str(tmp_path / "wrong"), root, "data.source.features")
    assert_sentence(error.value, tmp_path / "wrong", "something else", COMMAND)
    with pytest.raises(UserError) as error:
        create_features(tmp_path / "other", root, recipe("fp16"), overwrite=False)
    assert_sentence(error.value, "dtype int8", "dtype fp16", "--overwrite")
