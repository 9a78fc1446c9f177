"""Align on a GPU: the accuracy rule in every dtype, repeatability, graph replay, no host sync, launches."""

import pytest
import torch

from ssr_kernels.align import align_stages
from tests.kernels.align_cases import Grouped, definition, grouped, relative, run

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = {
    "five points": ([(33, 47, 64), (16, 24, 128), (8, 12, 320), (4, 6, 512), (33, 47, 256)], (16, 24)),
    "four times finer": ([(64, 64, 32), (48, 52, 160)], (16, 13)),
    "finer by a hair": ([(17, 13, 64)], (16, 13)),
    "coarser": ([(5, 3, 64), (1, 1, 128)], (16, 24)),
}
CALLS = [
    (backend, dtype)
    for backend in ("triton", "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (backend, dtype) != ("cuda", torch.float32)
]


def make(case: str, dtype: torch.dtype, masks: bool = True, width: int = 256) -> Grouped:
    shapes, coarse = SHAPES[case]
    return grouped(shapes, coarse, width, dtype, masks).to(device="cuda")


@pytest.mark.parametrize(("backend", "dtype"), CALLS)
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("width", [256, 1280])
def test_error_is_within_the_rule(case, backend, dtype, width, seed):
    """At most 1.5 times the error of PyTorch in the same precision, and under the bound."""
    call = make(case, dtype, width=width)
    loss, gradients = run(call, backend)
    expected, exact = definition(call)
    same_loss, same = definition(call, dtype)
    errors, allowed = relative(gradients, exact), relative(same, exact)
    errors["loss"], allowed["loss"] = (abs(value.double() - expected).item() for value in (loss, same_loss))
    for name, error in errors.items():
        assert error <= max(1.5 * allowed[name], 1e-6) and error < BOUND[dtype], (name, error, allowed[name])


@pytest.mark.parametrize(("backend", "dtype"), CALLS)
def test_two_runs_are_bitwise_equal_on_poisoned_memory(backend, dtype, seed):
    call = make("five points", dtype)
    loss, gradients = run(call, backend)
    poison = torch.full((64 << 20,), float("nan"), device="cuda")  # what the allocator hands out next
    del poison
    again, repeated = run(call, backend)
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], repeated[name]) for name in gradients)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_in_a_cuda_graph_without_a_sync(backend, seed):
    call = make("five points", torch.bfloat16)
    leaves = call.leaves()

    def step() -> list[torch.Tensor]:
        loss = call.run(backend)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_compiles_in_one_graph(backend, seed):
    call = make("four times finer", torch.bfloat16)
    loss, _ = run(call, backend)
    compiled = torch.compile(align_stages, fullgraph=True)
    assert torch.equal(compiled(*call.arguments(), backend=backend), loss)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_launches_of_a_grouped_call(backend, seed):
    call = make("five points", torch.bfloat16, masks=False)
    run(call, backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = call.run(backend)
        torch.autograd.grad(loss, list(call.leaves().values()), grad_outputs=torch.ones_like(loss))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "align" in name or "gram" in name or "direct" in name]) >= 8
    assert len([name for name in kernels if "fill" not in name.lower()]) <= 12, kernels


def test_auto_takes_a_kernel_and_refuses_what_it_cannot_run(seed):
    from ssr_kernels.align.op import ALIGN

    call = make("five points", torch.bfloat16)
    tensors = (call.target, *call.features, *call.weights)
    assert ALIGN.choose("auto", tensors).name in ("cuda", "triton")
    assert ALIGN.choose("auto", (call.target.cpu(), *(x.cpu() for x in call.features))).name == "reference"
