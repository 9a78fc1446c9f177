"""Deterministic kernels in a step: when they are asked for, what is told, and that no step has an operator without."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ssr_fast.engine.deterministic import WORKSPACE, only_deterministic, prepare_deterministic
from ssr_fast.engine.trainer import Trainer
from ssr_fast.errors import UserError
from ssr_fast.models.sam import resize_frozen
from ssr_fast.train import main
from ssr_kernels.segloss import pseudo_label
from tests.engine.graph_support import METHODS, START, STEPS, check_equal, make_step, run
from tests.methods.run_support import TINY
from tests.methods.support import make_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda")

REFUSED = {
    *("adaptive_avg_pool2d_backward", "adaptive_avg_pool3d_backward", "avg_pool3d_backward", "adaptive_max_pool2d"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d", "grid_sampler_2d_backward"),
    *("grid_sampler_3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward"),
    *("replication_pad3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward"),
    *("_upsample_bicubic2d_aa_backward", "upsample_nearest1d_backward", "upsample_nearest2d_backward"),
    *("upsample_nearest3d_backward", "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward"),
    *("embedding_bag", "_embedding_bag", "put_", "histc", "bincount", "kthvalue", "median", "nanmedian"),
    *("cumsum", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "scatter_reduce", "index_reduce"),
}
"""Operators that PyTorch refuses, or takes a slow way for, on a GPU where kernels must be deterministic, by its
documentation or source; for some only types or arguments that no step needs either."""


def operators(work: Callable[[], object]) -> set[str]:
    """Names of PyTorch's operators that run, those of the backward pass and inside of ours too."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        work()
    return {event.key.removeprefix("aten::") for event in profiler.key_averages()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_has_an_operator_that_is_refused_on_a_gpu(name, precision, backend, monkeypatch):
    """Also where a GPU is too old for Triton and our operators are PyTorch's."""
    monkeypatch.setenv("SSR_FAST_KERNELS", backend)
    step = make_step(name, precision)
    names = operators(lambda: [step(make_batch(seed=number), number) for number in (0, START + 1)])
    assert {"convolution_backward", "ssr_kernels::segloss_backward"} <= names
    whole_numbers = {"cumsum"} if (name, backend) == ("source_free", "reference") else set()  # refused for others alone
    assert names & REFUSED == whole_numbers


def test_a_refused_operator_would_be_seen():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)

    def work() -> None:
        F.interpolate(x, (16, 16), mode="bilinear").sum().backward()
        F.cross_entropy(x, torch.zeros(1, 8, 8, dtype=torch.int64)).backward()

    assert {"upsample_bilinear2d_backward", "nll_loss2d_forward"} <= operators(work) & REFUSED
    logits = torch.randn(1, 4, 4, 3)
    inside = operators(lambda: pseudo_label(logits, (8, 8), 0.5, backend="reference"))
    assert {"ssr_kernels::pseudo_label", "upsample_bilinear2d"} <= inside  # what our operators call


@pytest.mark.parametrize("name", METHODS)
def test_no_step_calls_what_python_sends_a_slow_way_on_a_gpu(name, monkeypatch):
    called = []
    for function, key in ((F.interpolate, "interpolate"), (F.pad, "pad")):

        def note(x: Tensor, *rest, function: Callable = function, key: str = key, mode: str = "constant", **more):
            kernels = "ssr_kernels" in sys._getframe(1).f_code.co_filename  # their definitions, which no GPU runs
            if not kernels and (x.dim() > 3 and mode != "constant" or mode == "replicate"):
                called.append((key, mode))
            return function(x, *rest, mode=mode, **more)

        monkeypatch.setattr(F, key, note)
    step = make_step(name)
    for number in range(STEPS - 4):
        step(make_batch(seed=number), number)
    assert not called
    F.interpolate(torch.zeros(1, 1, 4, 4), size=(8, 8), mode="bilinear")
    assert called == [("interpolate", "bilinear")]


def test_frozen_maps_are_resized_with_interpolates_bits():
    maps = torch.randn(2, 3, 17, 23)
    for size in ((32, 64), (17, 23), (5, 7)):
        wanted = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        assert torch.equal(resize_frozen(maps, size), wanted)


def settings() -> tuple[bool, bool, bool]:
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return strict, warned, torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("name", ["ssr", "source_free"])
def test_a_step_is_computed_strictly_and_leaves_what_it_found(name, monkeypatch):
    name = {"ssr": "cosine"}.get(name, name)
    step, plain = make_step(name), make_step(name)
    step.deterministic = True
    inside = []
    backward = step.backward

    def watched(loss: Tensor) -> None:
        inside.append(settings())
        backward(loss)

    monkeypatch.setattr(step, "backward", watched)
    before = settings()
    check_equal(step, plain, run(step, step), run(plain, plain))
    assert inside == [(True, False, False)] * STEPS and settings() == before and not before[0]


@pytest.mark.parametrize("was", [(False, False), (True, False), (True, True)])
def test_what_was_set_before_is_set_again(was):
    try:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        before = settings()
        with only_deterministic(False):
            assert settings() == before
        with only_deterministic(True):
            assert settings() == (True, False, False)
        assert settings() == before
        with pytest.raises(ZeroDivisionError), only_deterministic(True):
            raise ZeroDivisionError
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operator_without_a_deterministic_kernel_is_told():
    refusal = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off ..."
    )
    with pytest.raises(UserError) as told, only_deterministic(True):
        raise RuntimeError(refusal)
    assert str(told.value) == (
        "cumsum_cuda_kernel does not have a deterministic implementation: give --run.deterministic false; "
        "a resumed run then has other last bits"
    )
    for wanted, error in ((True, RuntimeError("CUDA error")), (False, RuntimeError(refusal))):
        with pytest.raises(RuntimeError, match=str(error)[:10]) as raised, only_deterministic(wanted):
            raise error
        assert raised.value is error


def test_cublas_is_prepared_on_a_gpu_alone(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    assert not prepare_deterministic(True, CPU) and not prepare_deterministic(False, GPU)
    assert WORKSPACE not in os.environ
    assert prepare_deterministic(True, GPU) and os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    assert prepare_deterministic(True, GPU) and os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0'.*--run.deterministic false"):
        prepare_deterministic(True, GPU)
    assert not prepare_deterministic(False, GPU)


@pytest.mark.parametrize("given", [None, False])
def test_a_run_hands_the_option_to_its_steps(given, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssr_fast.session.write_report", lambda folder: None)
    asked, seen = [], []

    def prepare(wanted: bool, device: torch.device) -> bool:
        asked.append((wanted, device.type))
        return wanted

    train_step = Trainer.train_step

    def watched(self, batch, step):
        seen.append(self.step.deterministic)
        return train_step(self, batch, step)

    for place in ("ssr_fast.session", "ssr_fast.engine.trainer"):
        monkeypatch.setattr(f"{place}.prepare_deterministic", prepare)
    monkeypatch.setattr(Trainer, "train_step", watched)
    options = [] if given is None else [f"--run.deterministic={str(given).lower()}"]
    assert main([*TINY, "--run.device=cpu", *options, "--run.dir", str(tmp_path / "run")]) == 0
    assert set(asked) == {(given is None, "cpu")} and seen == [given is None] * 8
