"""One process, DDP, FSDP2 and HSDP train the same: the demo, some steps of it, in float32."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssr_fast.data.augment import normalise_batch
from ssr_fast.models.weights import load_model
from tests.ranks import check, train

STEPS = 20
DEMO = (
    f"--method.name=ssr --run.steps={STEPS} --run.log_every=1 --run.evaluate_every={STEPS} --run.save_every={STEPS} "
    "--run.samples=1 --self_training.start_step=4 --data.batch_size=1 --data.scenes.source_count=24 "
    "--data.scenes.target_count=24 --data.scenes.evaluation_count=5 --run.device=cpu"
).split()
UNTOLD = ("time", "images_per_second", "data_share")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in UNTOLD} for line in lines]


def check_same(run: Path, other: Path) -> None:
    """Losses to 1e-6 of their size, weights to 1e-5, and the same network."""
    one, two = rows(run), rows(other)
    assert len(one) == len(two) == STEPS + 1
    for ours, theirs in zip(one[:-1], two[:-1], strict=True):
        for name in ours:
            if name not in ("stage", "step"):
                assert math.isclose(ours[name], theirs[name], rel_tol=1e-6, abs_tol=1e-9), (ours, theirs)
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, other))
    away = {name: (weights[name] - others[name]).abs().max().item() for name in weights}
    assert max(value for name, value in away.items() if name not in UNDETERMINED) < 1e-5, away
    images = normalise_batch(torch.randint(0, 256, (2, 96, 192, 3), dtype=torch.uint8))
    with torch.no_grad():
        first, second = (load_model(str(folder)).segmentor.eval()(images).logits for folder in (run, other))
    assert (first - second).abs().max() < 1e-4 * first.abs().max()
    assert abs(one[-1]["eval/miou"] - two[-1]["eval/miou"]) < 0.05


UNDETERMINED = {
    "decode_head.linear_fuse.bn.running_mean",
    *(f"decode_head.linear_c{stage}.proj.bias" for stage in (1, 2, 3, 4)),
    "backbone.norm4.bias",
}
"""They shift the input of a BatchNorm, which takes the shift out again: their gradient is rounding alone, of which Adam
makes whole steps. The running mean follows the shift, so the network is the same one."""


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_mode_trains_as_one_process_does(world: int, tmp_path: Path) -> None:
    single = tmp_path / "single"
    check(train(tmp_path, 1, [*DEMO, f"--optim.accumulate={world}", "--run.dir", str(single)]))
    modes = {"ddp": [], "fsdp": [], "hsdp": ["--parallel.shard=2"]}
    for mode, options in modes.items():
        run = tmp_path / mode
        ended = train(tmp_path, world, [*DEMO, f"--parallel.mode={mode}", *options, "--run.dir", str(run)])
        check(ended)
        assert f"x {world} processes ({mode})" in ended[0].out and not any(rank.out for rank in ended[1:])
        check_same(single, run)
