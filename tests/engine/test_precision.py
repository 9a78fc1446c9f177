"""The precision of a step: what auto means, near-equal gradients, resume, and what is shipped."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from ssr_fast.engine.precision import apply_precision, pick_precision
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.train import main
from tests.faults.test_resume import check_equal
from tests.faults.test_source_free_run import SCENES, SIZES
from tests.methods.support import make_batch, make_method, make_source_free
from tests.syncfree import NoHostSync

CPU = torch.device("cpu")
METHODS = {
    "supervised": lambda: make_method("supervised"),
    "self_training": lambda: make_method("self_training"),
    "cosine": lambda: make_method("ssr"),
    "injection": lambda: make_method("ssr", ssr=SsrConfig(regulariser="injection")),
    "source_free": lambda: make_source_free(contrast=0.0),
}


def test_auto_and_refusals():
    assert pick_precision("auto", CPU) == "fp32" and pick_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="--run.precision tf32 is a GPU's"):
        pick_precision("tf32", CPU)
    assert "--run.precision must be one of" in RunConfig(precision="fp8").problems("run")[0]


@pytest.mark.gpu
def test_auto_on_a_gpu():
    able = torch.cuda.get_device_capability() >= (8, 0)
    assert pick_precision("auto", torch.device("cuda")) == ("bf16" if able else "fp32")


@pytest.mark.parametrize("name", METHODS)
def test_gradients_in_bf16_are_near_those_in_fp32(name):
    vectors, losses = [], []
    for precision in ("fp32", "bf16"):
        method, batch = METHODS[name](), make_batch()
        apply_precision(method, precision)
        loss = method.losses(batch, 2)["loss"]
        loss.backward()
        method.hand_over()
        grads = [p.grad for module in method.trainable().values() for p in module.parameters()]
        assert loss.dtype == torch.float32 and all(g is None or g.dtype == torch.float32 for g in grads)
        vectors.append(torch.cat([g.flatten() for g in grads if g is not None]))
        losses.append(float(loss.detach()))
    assert abs(losses[1] - losses[0]) < 2e-3 * abs(losses[0])
    assert torch.linalg.vector_norm(vectors[1] - vectors[0]) < 0.05 * torch.linalg.vector_norm(vectors[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_bf16_needs_no_sync_and_follows_the_optimiser(name, monkeypatch):
    monkeypatch.setenv("SSR_FAST_KERNELS", "reference")
    method, batch = METHODS[name](), make_batch()
    apply_precision(method, "bf16")
    with NoHostSync():
        method.losses(batch, 2)["loss"].backward()
        method.hand_over()
        with torch.no_grad():
            for module in method.trainable().values():
                for parameter in module.parameters():
                    parameter.sub_(0.1 * parameter.grad if parameter.grad is not None else 0.0)
        method.refresh()
    student, working = method.student.state_dict(), method.running("student").state_dict()
    assert all(torch.equal(working[key].float(), student[key].to(working[key].dtype).float()) for key in student)


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_in_bf16_are_bitwise_equal(name):
    results = []
    for _ in range(2):
        method = METHODS[name]()
        apply_precision(method, "bf16")
        method.losses(make_batch(size=(128, 128)), 2)["loss"].backward()
        method.hand_over()
        results.append([p.grad for module in method.trainable().values() for p in module.parameters()])
        poison = [torch.full((1 << 20,), float("nan")) for _ in range(3)]  # what is handed out next
        del poison
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_trains_resumes_bit_exactly_and_ships_float32(tmp_path, monkeypatch):
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    options = ["--method.name=ssr", *SIZES, *SCENES, "--self_training.start_step=1", "--run.precision=bf16"]
    whole, parts, single = tmp_path / "whole", tmp_path / "parts", tmp_path / "single"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train_step = Trainer.train_step

    def interrupted(self, batch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, step)

    try:
        assert main([*options, "--run.dir", str(whole)]) == 0
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "train_step", interrupted)
            assert main([*options, "--run.dir", str(parts)]) == 3
        assert main(["--resume", str(parts)]) == 0
        check_equal(parts, whole)
        assert main([*options, "--run.precision=fp32", "--run.dir", str(single)]) == 0
    finally:
        torch.set_num_threads(before)
    shipped, other = load_file(whole / "model.safetensors"), load_file(single / "model.safetensors")
    assert {tensor.dtype for tensor in shipped.values()} <= {torch.float32, torch.int64}
    name = "backbone.block1.0.attn.q.weight"
    assert not torch.equal(shipped[name], shipped[name].bfloat16().float())  # a master's value, no copy's
    assert not torch.equal(shipped[name], other[name])
