"""A whole step on a GPU, in bfloat16: compiled kernels everywhere, no host sync, bitwise repeatable."""

import pytest
import torch

from ssr_fast.engine.deterministic import only_deterministic, prepare_deterministic
from ssr_fast.engine.precision import apply_precision
from ssr_kernels import registry
from tests.methods.support import make_batch, make_method, make_source_free

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
METHODS = {
    "self_training": lambda: make_method("self_training"),
    "cosine": lambda: make_method("ssr"),
    "source_free": lambda: make_source_free(vote=True),
}


@pytest.fixture(autouse=True)
def as_in_a_run():
    """Deterministic kernels alone."""
    with only_deterministic(prepare_deterministic(True, GPU)):
        yield


def step(name):
    """The gradients of a fresh method's step."""
    method, batch = METHODS[name]().to(GPU), make_batch(size=(128, 128)).to(GPU)
    apply_precision(method, "bf16")
    terms = method.losses(batch, 3)
    terms["loss"].backward()
    method.hand_over()
    assert all(torch.isfinite(value) for value in terms.values())
    return [p.grad for module in method.trainable().values() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", METHODS)
def test_every_operator_takes_compiled_code(name, monkeypatch, seed):
    taken, choose = {}, registry.Op.choose

    def recorded(self, backend, tensors=()):
        found = choose(self, backend, tensors)
        taken.setdefault(self.name, set()).add(found.name)
        return found

    monkeypatch.setattr(registry.Op, "choose", recorded)
    step(name)
    assert taken and all(backends <= {"triton", "cuda"} for backends in taken.values()), taken


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_are_bitwise_equal(name, seed):
    assert all(torch.equal(one, other) for one, other in zip(step(name), step(name), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, seed):
    method, batch = METHODS[name]().to(GPU), make_batch(size=(128, 128)).to(GPU)
    apply_precision(method, "bf16")
    method.losses(batch, 3)["loss"].backward()  # compiles what is compiled on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.losses(batch, 4)["loss"].backward()
        method.hand_over()
        method.refresh()
    finally:
        torch.cuda.set_sync_debug_mode("default")
