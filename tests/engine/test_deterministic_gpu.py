"""On a GPU: a step of a real network gives the same bits each time, a resumed run is the run that was not stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch

from ssr_fast.engine.deterministic import only_deterministic, prepare_deterministic
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.step import TrainStep
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.models.segmentor import ModelConfig
from ssr_fast.train import main
from tests.engine.graph_support import everything
from tests.faults.test_resume import check_equal
from tests.methods.run_support import TINY
from tests.methods.support import make_batch, make_method

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
MODEL = ModelConfig(backbone="mit_b1", channels=64, drop_path=0.1)
"""Of B1's attention on crops of 512 every stage has 256 keys: several blocks of FlashAttention's backward pass."""
LARGER = ["--data.crop=[128,256]", "--data.scenes.height=128", "--data.scenes.width=256", "--run.device=cuda"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_step_gives_the_same_bits_each_time(precision: str, recompute: bool) -> None:
    assert prepare_deterministic(True, GPU)
    batch = make_batch(size=(512, 512), count=2).to(GPU)
    found = []
    for _ in range(3):
        method = make_method("self_training", model=MODEL, start_step=0).to(GPU)
        method.student.backbone.recompute_blocks = recompute
        apply_precision(method, precision)
        step = TrainStep(method, OptimConfig(lr=1e-3, warmup_steps=0), 10, deterministic=True)
        for number in range(3):
            step(batch, number)
        found.append([tensor.clone() for tensor in everything(step)])
        poison = torch.full((256 << 20,), float("nan"), device=GPU)  # what the allocator hands out next
        del poison
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "option", ["method.name=ssr", "method.name=self_training", "run.precision=fp32", "run.graph=off"]
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(option: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, *LARGER, f"--{option}", "--run.dir", str(whole)]) == 0
    train_step = Trainer.train_step

    def interrupted(self, batch, step):
        if step == 5:  # from the fourth on steps replay a graph
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        assert main([*TINY, *LARGER, f"--{option}", "--run.dir", str(parts)]) == 3
    assert main(["--resume", str(parts)]) == 0
    check_equal(parts, whole)


def test_what_pytorch_refuses_is_told_in_a_sentence() -> None:
    assert prepare_deterministic(True, GPU)
    maps = torch.randn(1, 2, 8, 8, device=GPU, requires_grad=True)
    with pytest.raises(UserError, match="does not have a deterministic implementation: give --run.deterministic false"):
        with only_deterministic(True):
            torch.nn.functional.adaptive_avg_pool2d(maps, 3).sum().backward()
