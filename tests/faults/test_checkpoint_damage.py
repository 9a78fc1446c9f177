"""Damage of a checkpoint that two ranks saved: every flipped byte, every shortened or missing file is noticed."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.state import rng_state
from tests.engine.forked import run_ranks

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json", "manifest.sha256"]
FLIPS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step-1 and step-2 of two ranks; a test repairs what it breaks."""
    folder = tmp_path_factory.mktemp("damage") / "run"

    def work(ranks: Ranks) -> None:
        mesh = init_device_mesh("cpu", (2,))
        store = CheckpointStore(folder, ranks=ranks)
        for step in (1, 2):
            sharded = distribute_tensor(torch.full((5, 3), float(step)), mesh, [Shard(0)])
            state = {"x": sharded, "rng": {str(ranks.rank): rng_state()}, "step": step}
            store.save(step, state, config={"model": {"backbone": "mit_b0"}, "steps": 10})

    run_ranks(folder, 2, work)
    assert sorted(entry.name for entry in (folder / "step-2").iterdir()) == sorted(FILES)
    return folder


def _latest(folder: Path) -> tuple[Path | None, list[str]]:
    told: list[str] = []
    return CheckpointStore(folder, report=told.append).latest(), told


def _check_skipped(folder: Path, what: Any) -> str:
    """step-2 is not used, and one line says so; that line."""
    path, told = _latest(folder)
    assert path == folder / "step-1", what
    assert len(told) == 1 and told[0].startswith(f"skipping the checkpoint {folder / 'step-2'}: "), (what, told)
    assert "\n" not in told[0]
    return told[0]


def test_every_flipped_byte_is_noticed_and_the_previous_checkpoint_used(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [(folder / "step-2" / name).stat().st_size for name in FILES]
    hit = set()
    for number in range(FLIPS):
        # half of the flips by size, half in any file, or the small ones would be spared
        name = draw.choices(FILES, sizes if number % 2 else None)[0]
        file = folder / "step-2" / name
        whole = file.read_bytes()
        position, change = draw.randrange(len(whole)), draw.randrange(1, 256)
        file.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
        line = _check_skipped(folder, (name, position, change))
        assert name in line or "manifest" in line
        file.write_bytes(whole)
        hit.add(name)
    assert hit == set(FILES)
    assert _latest(folder) == (folder / "step-2", [])


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_every_missing_file_is_noticed(folder: Path, name: str, seed: int) -> None:
    file = folder / "step-2" / name
    whole = file.read_bytes()
    lengths = {0, 1, 511, 512, 4095, 4096, len(whole) // 2, len(whole) - 1} | set(random.sample(range(len(whole)), 10))
    for length in sorted(lengths):
        if length < len(whole):
            file.write_bytes(whole[:length])
            _check_skipped(folder, (name, length))
    file.unlink()
    assert _check_skipped(folder, name).endswith(f"{name} is missing")
    file.mkdir()  # what stands there is no file
    _check_skipped(folder, name)
    file.rmdir()
    file.write_bytes(whole)
    assert _latest(folder) == (folder / "step-2", [])


def test_files_of_two_checkpoints_that_are_mixed_are_noticed(folder: Path, tmp_path: Path) -> None:
    """Both are whole by themselves, and of the same size."""
    shutil.copytree(folder, tmp_path / "run")
    for name in FILES:
        file = tmp_path / "run" / "step-2" / name
        whole = file.read_bytes()
        other = (folder / "step-1" / name).read_bytes()
        file.write_bytes(other)
        if other != whole:
            _check_skipped(tmp_path / "run", name)
        file.write_bytes(whole)
