"""Features that stay on a device: views cut there equal the loader's bit for bit, and so does a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_fast.config import problems
from ssr_fast.data.feature_map import FeatureMap, Geometry, grid_of
from ssr_fast.data.residents import Resident, Residents, read_residents
from ssr_fast.errors import UserError
from ssr_fast.models.resident_features import ResidentFeatures
from ssr_fast.presets import demo
from ssr_fast.train import main
from tests.data.test_feature_loader import data_set
from tests.faults.test_resume import check_equal
from tests.methods.run_support import TINY
from tests.syncfree import NoHostSync

CPU = torch.device("cpu")
SIZES = [(97, 61), (40, 80), (64, 64)]
CROP, STRIDE = (48, 40), 8


def maps(dtype, seed):
    """A stored map of each size, and all of them together."""
    generator = np.random.default_rng(seed)
    found = []
    for width, height in SIZES:
        shape = -(-height // STRIDE), -(-width // STRIDE), 5
        geometry = Geometry((width, height), (width, height), STRIDE)
        if dtype == "int8":
            values = generator.integers(-127, 128, shape, dtype=np.int8)
            scales = generator.random((*shape[:2], 1), dtype=np.float32) + 0.1
        else:
            values, scales = generator.standard_normal(shape).astype(np.float16), None
        found.append(FeatureMap(values, scales, geometry))
    places, first = {}, 0
    for number, one in enumerate(found):
        rows, columns = one.values.shape[:2]
        places[str(number)] = Resident(first, rows, columns, one.geometry)
        first += rows * columns
    values = np.concatenate([one.values.reshape(-1, 5) for one in found])
    scales = np.concatenate([one.scales.reshape(-1, 1) for one in found]) if dtype == "int8" else None
    return found, Residents(places), ResidentFeatures(values, scales, grid_of(CROP[0], STRIDE), CPU)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_views_equal_the_loaders_bit_for_bit(dtype, seed):
    found, residents, resident = maps(dtype, seed)
    generator = np.random.default_rng(seed)
    expected, places = [], []
    for number in range(60):
        image = number % len(SIZES)
        size = tuple(
            int(side * factor) for side, factor in zip(SIZES[image], generator.uniform(0.6, 1.7, 2), strict=True)
        )
        if number % 4 == 0:
            size = SIZES[image]
        corner = tuple(int(value) for value in generator.integers(0, 30, 2))  # some crops reach beyond the image
        view = (size, corner, CROP, bool(number % 2))
        expected.append(found[image].cut(*view))
        places.append(residents.places(str(image), *view))
    with NoHostSync():
        actual = resident(torch.from_numpy(np.stack(places)))
    wanted = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)
    assert torch.equal(actual, wanted) and actual.stride() == wanted.stride()
    assert len({float(one.sum()) for one in wanted}) > 50


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_store_is_read_whole(dtype, tmp_path):
    index, store = data_set(tmp_path, [(64, 48), (80, 32), (33, 47)], dtype)
    residents, values, scales = read_residents(store, index.samples)
    assert list(residents.images) == [str(sample.image) for sample in index.samples]
    assert values.dtype == (np.int8 if dtype == "int8" else np.float16) and (scales is None) == (dtype == "fp16")
    for sample in index.samples:
        stored, at = store.read(sample.image), residents.images[str(sample.image)]
        kept = values[at.first : at.first + at.rows * at.columns].reshape(stored.values.shape)
        assert np.array_equal(kept, stored.values) and at.geometry == stored.geometry
    path = store.path(index.samples[1].image)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        read_residents(store, index.samples)


def test_without_stored_features_there_is_nothing_to_keep():
    config = demo()
    config.sam.resident = True
    assert any("--sam.resident keeps stored features, of which --sam.features cached_views has none" in line
               for line in problems(config))  # fmt: skip


@pytest.mark.parametrize("mixed", ["online", "composed"])
def test_a_run_equals_the_one_that_reads_its_features(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    options = ["--run.stages=null", *TINY, "--sam.features=cached_full", f"--sam.mixed={mixed}"]
    options = [option.replace("[32,64]", "[32,48]") for option in options]
    try:
        runs: list[Path] = []
        for resident in ("true", "false"):
            runs.append(tmp_path / resident)
            assert main([*options, f"--sam.resident={resident}", f"--run.dir={runs[-1]}"]) == 0
    finally:
        torch.set_num_threads(before)
    check_equal(*runs)


@pytest.mark.gpu
def test_on_a_gpu(seed):
    found, residents, resident = maps("int8", seed)
    view = ((97, 61), (7, 3), CROP, True)
    place = torch.from_numpy(residents.places("0", *view))[None].cuda()
    wanted = torch.from_numpy(found[0].cut(*view))[None].permute(0, 3, 1, 2)
    torch.testing.assert_close(resident.cuda()(place).cpu(), wanted, rtol=1e-6, atol=1e-6)
