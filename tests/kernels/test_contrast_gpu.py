"""contrast_loss on a GPU: the accuracy rule, repeatability, graph replay, no host sync, launches, recompilation."""

import pytest
import torch

from ssr_kernels.contrast import CONTRAST_LOSS, contrast_loss
from tests.kernels.contrast_cases import KINDS, WITHOUT_LOSS, Call, definition, errors, make, run

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)


def on_device(kind: str, n: int, width: int, dtype: torch.dtype, temperature: float = 0.1) -> Call:
    return make(kind, n, width, temperature, dtype).to(device="cuda")


def within_the_rule(call: Call) -> None:
    """At most 1.5 times the error of PyTorch in the same precision, and under the bound."""
    dtype, exact = call.embedding.dtype, definition(call)
    found, allowed = errors(call, run(call, "triton"), exact), errors(call, definition(call, dtype), exact)
    for name, error in found.items():
        assert error <= max(1.5 * allowed[name], 1e-6) and error < BOUND[dtype], (name, found, allowed)


@DTYPES
@pytest.mark.parametrize("kind", [*KINDS, "nan"])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_error_is_within_the_rule(kind, dtype, temperature, seed):
    call = on_device(kind, 1000, 256, dtype, temperature)
    within_the_rule(call)
    if kind in WITHOUT_LOSS:
        loss, gradient = run(call, "triton")
        assert loss == 0 and not gradient.any()


@DTYPES
@pytest.mark.parametrize(("n", "width"), [(1, 8), (2, 16), (63, 64), (257, 200), (300, 3), (4096, 256), (17000, 64)])
def test_sizes(n, width, dtype, seed):
    within_the_rule(on_device("mixed", n, width, dtype))


@DTYPES
def test_two_runs_are_bitwise_equal_on_poisoned_memory(dtype, seed):
    call = on_device("mixed", 4097, 256, dtype)
    first = run(call, "triton")
    poison = torch.full((64 << 20,), float("nan"), device="cuda")  # what the allocator hands out next
    del poison
    assert all(torch.equal(a, b) for a, b in zip(first, run(call, "triton"), strict=True))


def test_replays_in_a_cuda_graph_without_a_sync(seed):
    call = on_device("mixed", 2000, 256, torch.bfloat16)
    call.group, call.klass = call.group.int(), call.klass.int()

    def step() -> tuple[torch.Tensor, ...]:
        return run(call, "triton")

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
        call.embedding.copy_(torch.randn_like(call.embedding))
        call.klass.copy_(torch.randint_like(call.klass, -1, 5))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiles_in_one_graph(seed):
    call = on_device("mixed", 1000, 128, torch.bfloat16)
    loss, _ = run(call, "triton")
    assert torch.equal(torch.compile(contrast_loss, fullgraph=True)(*call.arguments(), backend="triton"), loss)


def test_launches(seed):
    call = on_device("mixed", 4096, 64, torch.bfloat16)
    call.group, call.klass = call.group.int(), call.klass.int()
    run(call, "triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = contrast_loss(*call.arguments(), backend="triton")
        torch.autograd.grad(loss, call.embedding, grad_outputs=torch.ones_like(loss))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "fill" not in name.lower()]) == 5, kernels


def test_memory_grows_with_n(seed):
    peaks = {}
    for n in (16384, 32768):
        call = on_device("mixed", n, 64, torch.bfloat16)
        run(call, "triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(call, "triton")
        peaks[n] = torch.cuda.max_memory_allocated() - before
    assert peaks[32768] < 2.2 * peaks[16384] and peaks[32768] < 32768 * 64 * 8


def test_other_temperatures_and_row_counts_do_not_recompile(seed):
    from ssr_kernels.contrast import triton_kernels

    kernels = (triton_kernels.row_sums, triton_kernels.row_gradients)

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    run(on_device("mixed", 20000, 32, torch.bfloat16, 0.1), "triton")
    before = compiled()
    for n, temperature in ((20000, 0.05), (20001, 0.3), (19984, 1.0)):
        run(on_device("mixed", n, 32, torch.bfloat16, temperature), "triton")
    assert compiled() == before > 0


def test_auto_takes_triton_and_refuses_what_it_cannot_run(seed):
    call = on_device("mixed", 100, 64, torch.bfloat16)
    tensors = call.arguments()[:3]
    assert CONTRAST_LOSS.choose("auto", tensors).name == "triton"
    assert CONTRAST_LOSS.choose("auto", tuple(tensor.cpu() for tensor in tensors)).name == "reference"
    assert CONTRAST_LOSS.choose("auto", (call.embedding.half(), *tensors[1:])).name == "reference"
