"""--parallel.*: each illegal value and contradiction is one sentence, and each mode trains the same."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssr_fast.arguments import configure
from ssr_fast.errors import UserError
from ssr_fast.train import main
from tests.methods.run_support import TINY
from tests.ranks import check, train

SMALL = [*TINY, "--run.device=cpu", "--run.log_every=1"]
SUPERVISED = [option for option in SMALL if "self_training" not in option and "method.name" not in option]
SUPERVISED += ["--method.name=supervised", "--model.drop_path=0", "--model.dropout=0"]
UNTOLD = ("time", "images_per_second", "data_share")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def no_report(rank: int) -> None:
    """Drawing it takes longer than these trainings."""
    import ssr_fast.session

    ssr_fast.session.write_report = lambda folder: None  # type: ignore[assignment]


def trained(run: Path, world: int, options: Sequence[str]) -> Path:
    check(train(run.parent, world, [*options, "--run.dir", str(run)], (no_report, ())))
    return run


def lines(monkeypatch: pytest.MonkeyPatch, world: int, options: Sequence[str]) -> list[str]:
    """What is wrong with options of a run that torchrun has started on so many processes of two machines."""
    if world > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world // 2))
    return sentences(["--method.name=self_training", *options])


def sentences(options: Sequence[str]) -> list[str]:
    try:
        configure(list(options))
    except UserError as error:
        return str(error).splitlines()
    return []


MISTAKES: dict[str, tuple[int, str, Sequence[str]]] = {
    "mode": (1, "--parallel.mode=dpp", ("--parallel.mode must be one of auto, single, ddp, fsdp, hsdp (it is dpp)",)),
    "reduce": (2, "--parallel.reduce=fp16", ("--parallel.reduce must be one of fp32, bf16 (it is fp16)",)),
    "negative shard": (2, "--parallel.mode=hsdp --parallel.shard=-2", ("--parallel.shard must not be negative", "-2")),
    "negative timeout": (1, "--parallel.hang_timeout=-1", ("--parallel.hang_timeout must not be negative", "-1")),
    "single": (2, "--parallel.mode=single", ("--parallel.mode single", "has started 2", "--parallel.mode auto")),
    "processes": (2, "--parallel.processes=4", ("--parallel.processes 4", "(2)", "--nproc-per-node")),
    "processes alone": (1, "--parallel.processes=2", ("--parallel.processes 2", "(1)")),
    "no processes": (1, "--parallel.processes=0", ("--parallel.processes 0", "(1)")),
    "shard of ddp": (4, "--parallel.mode=ddp --parallel.shard=2", ("--parallel.shard 2 has no effect", "ddp")),
    "shard of auto": (4, "--parallel.shard=2", ("--parallel.shard 2 has no effect", "auto")),
    "shard": (4, "--parallel.mode=hsdp --parallel.shard=3", ("--parallel.shard 3 does not divide the 4 processes",)),
    "large shard": (4, "--parallel.mode=hsdp --parallel.shard=8", ("--parallel.shard 8 does not divide", "4")),
    "reduce alone": (1, "--parallel.reduce=bf16", ("--parallel.reduce bf16 has no effect with one process",)),
    "batchnorm alone": (1, "--parallel.sync_batchnorm=true", ("--parallel.sync_batchnorm", "one process")),
    "apex": (2, "--parallel.mode=fsdp --optim.fused=apex", ("--optim.fused apex", "fsdp", "--optim.fused torch")),
    "apex, hsdp": (2, "--parallel.mode=hsdp --optim.fused=apex", ("--optim.fused apex", "hsdp")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, options, words = MISTAKES[name]
    found = lines(monkeypatch, world, options.split())
    assert len(found) == 1 and all(word in found[0] for word in words), found


def test_one_gpu_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (found,) = lines(monkeypatch, 2, ["--run.device=cuda:1"])
    assert "--run.device cuda:1 is one GPU and torchrun has started 2 processes" in found
    assert found.endswith("give --run.device cuda") and lines(monkeypatch, 2, ["--run.device=cuda"]) == []


def test_all_mistakes_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["--parallel.mode=hsdp", "--parallel.shard=3", "--parallel.reduce=fp8", "--optim.fused=apex"]
    found = lines(monkeypatch, 4, [*wrong, "--parallel.processes=2", "--optim.accumulate=0"])
    assert len(found) == 5 and [sum(word in line for line in found) for word in ("shard 3", "fp8", "apex")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("world", "options", "mode", "group"),
    [
        (1, [], "single", 1),
        (2, [], "ddp", 1),
        (1, ["--parallel.mode=ddp"], "ddp", 1),
        (1, ["--parallel.mode=hsdp"], "hsdp", 1),
        (4, ["--parallel.mode=hsdp"], "hsdp", 2),  # of a machine
        (4, ["--parallel.mode=hsdp", "--parallel.shard=4"], "hsdp", 4),
        (4, ["--parallel.processes=4", "--parallel.reduce=bf16", "--parallel.sync_batchnorm=true"], "ddp", 2),
    ],
)
def test_what_is_legal(world: int, options: list[str], mode: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, world, options) == []
    parallel = configure(["--method.name=self_training", *options])[0].parallel
    assert parallel.picked(world) == mode and parallel.processes == world
    assert mode != "hsdp" or parallel.group(world) == group


@pytest.mark.parametrize("text", ["", "many", "0"])
def test_a_number_of_processes_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(
        UserError, match=f"^WORLD_SIZE must be a number of processes .it is '{text}'.: start .*torchrun$"
    ):
        main(SMALL)


def test_variables_that_torchrun_would_have_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 2 and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"):
        main([*SMALL, "--run.dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def begun(folder: Path, **sections: dict[str, Any]) -> str:
    """A run directory with these options, as far as its configuration goes."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": {"name": "self_training"}, **sections}))
    (folder / "environment.json").write_text('{"preset": "demo"}')
    return str(folder)


@pytest.mark.parametrize(
    ("before", "accumulated", "now", "after", "more"),
    [
        (1, 2, 2, 1, ["--parallel.processes"]),
        (4, 3, 6, 2, []),
        (6, 1, 2, 3, ["--parallel.processes"]),
        (2, 2, 2, 2, []),
    ],
)
def test_a_resumed_run_keeps_its_micro_batches(
    before: int,
    accumulated: int,
    now: int,
    after: int,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What --parallel.processes says of now tells nothing about before."""
    run = begun(tmp_path / "run", parallel={"processes": before}, optim={"accumulate": accumulated})
    monkeypatch.setenv("WORLD_SIZE", str(now))
    options = ["--resume", run, *(f"{option}={now}" for option in more)]
    assert configure(options)[0].optim.accumulate == after
    told = capsys.readouterr().err.splitlines()
    assert (
        told == []
        if before == now
        else len(told) == 1 and f"in place of {before}: --optim.accumulate is {after}," in told[0]
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert configure(options)[0].optim.accumulate == after and capsys.readouterr().err == ""


@pytest.mark.parametrize(("before", "accumulated", "now"), [(1, 1, 2), (2, 2, 8)])
def test_micro_batches_that_cannot_be_shared(
    before: int, accumulated: int, now: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = begun(tmp_path / "run", parallel={"processes": before}, optim={"accumulate": accumulated})
    monkeypatch.setenv("WORLD_SIZE", str(now))
    (found,) = sentences(["--resume", run])
    assert f"{now} cannot share the {before * accumulated} micro-batches of a step evenly" in found
    (tmp_path / "more.yaml").write_text("optim: {accumulate: 5}")
    for options, wanted in (("--optim.accumulate 1", 1), (f"--config {tmp_path / 'more.yaml'}", 5)):
        assert configure(["--resume", run, *options.split()])[0].optim.accumulate == wanted


def test_a_run_of_before_there_were_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert configure(["--resume", run])[0].parallel.processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = sentences(["--resume", run])
    assert "trained by 1 process with --optim.accumulate 1, and 2 cannot share" in found


def test_another_mode_is_an_override(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"mode": "hsdp", "shard": 2, "processes": 4, "sync_batchnorm": True, "reduce": "bf16"}
    run = begun(tmp_path / "run", parallel=saved)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert configure(["--resume", run])[0].parallel.shard == 2
    for mode in ("ddp", "fsdp", "auto"):
        parallel = configure(["--resume", run, "--parallel.mode", mode])[0].parallel
        assert parallel.mode == mode and parallel.shard == 0 and parallel.sync_batchnorm
    assert configure(["--resume", run, "--parallel.mode=hsdp"])[0].parallel.shard == 2
    (found,) = sentences(["--resume", run, "--parallel.mode=ddp", "--parallel.shard=4"])
    assert "--parallel.shard 4 has no effect with --parallel.mode ddp" in found
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    configure(["--resume", run])
    accumulated, statistics = capsys.readouterr().err.splitlines()
    assert "2 processes in place of 4: --optim.accumulate is 2" in accumulated
    assert "--parallel.sync_batchnorm makes BatchNorm's statistics those of 2 micro-batches" in statistics


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in UNTOLD} for row in found]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


@pytest.mark.parametrize("mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fsdp", "hsdp"))])
def test_a_process_alone_trains_the_same_in_every_mode(mode: str, tmp_path: Path) -> None:
    single = trained(tmp_path / "single", 1, SMALL)
    run = trained(tmp_path / mode, 1, [*SMALL, f"--parallel.mode={mode}"])
    if mode == "ddp":
        assert rows(run) == rows(single)
        one, two = (load_file(folder / "model.safetensors") for folder in (run, single))
        assert all(torch.equal(one[name], two[name]) for name in two)
    else:
        for ours, theirs in zip(losses(run), losses(single), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_batchnorm_over_two_ranks_is_that_of_a_batch_of_two(tmp_path: Path) -> None:
    """The statistics of 2 x 1 images are those of 1 x 2; with each rank's own the first loss is another by 8e-5."""
    options = [option for option in SUPERVISED if "batch_size" not in option]
    whole = losses(trained(tmp_path / "whole", 1, [*options, "--data.batch_size=2"]))
    each = [*options, "--data.batch_size=1"]
    synced = losses(trained(tmp_path / "synced", 2, [*each, "--parallel.sync_batchnorm=true"]))
    assert (
        len(whole) == 8 and synced == pytest.approx(whole, rel=1e-5) and synced[0] == pytest.approx(whole[0], rel=1e-6)
    )


@pytest.mark.slow
def test_a_reduction_in_bf16_is_close_to_float32(tmp_path: Path) -> None:
    found = {}
    for reduce in ("fp32", "bf16"):
        found[reduce] = losses(trained(tmp_path / reduce, 2, [*SUPERVISED, f"--parallel.reduce={reduce}"]))
    assert found["bf16"][0] == found["fp32"][0]  # the first loss knows no gradient
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=2e-2)
