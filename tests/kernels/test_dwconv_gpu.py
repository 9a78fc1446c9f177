"""dwconv on a GPU: the accuracy rule, repeatability, graph replay, no host sync, launches, memory."""

import pytest
import torch
from torch import Tensor

from ssr_kernels.dwconv import DILATED, GELU, dwconv_dilated, dwconv_gelu, reference

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)
SHAPES = [(2, 128, 128, 256), (2, 16, 16, 2048), (1, 33, 47, 100), (3, 1, 1, 5), (1, 9, 300, 7), (2, 64, 64, 512)]
DILATIONS = (6, 12, 18)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, three weights, the bias."""
    channels = shape[3]
    tensors = [torch.randn(shape), *(torch.randn(channels, 1, 3, 3) / 3 for _ in range(3)), torch.randn(channels)]
    return [t.to("cuda", dtype).requires_grad_() for t in tensors]


def run(tensors: list[Tensor], backend: str) -> list[Tensor]:
    """Results of both ops and the gradients of all arguments, of fixed gradients of the results."""
    x, *weights, bias = tensors
    if backend == "definition":
        outs = [reference.dwconv_gelu(x, weights[0], bias), *reference.dwconv_dilated(x, weights, DILATIONS)]
    else:
        outs = [
            dwconv_gelu(x, weights[0], bias, backend=backend),
            *dwconv_dilated(x, weights, DILATIONS, backend=backend),
        ]
    generator = torch.Generator("cuda").manual_seed(5)
    grads = [torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype) for out in outs]
    gelu = torch.autograd.grad(outs[:1], [x, weights[0], bias], grads[:1], retain_graph=True)
    return [*(out.detach() for out in outs), *gelu, *torch.autograd.grad(outs[1:], [x, *weights], grads[1:])]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_the_rule(shape, dtype, seed):
    """At most 1.5 times the error of PyTorch in the same precision, and under the bound."""
    tensors = make(shape, dtype)
    exact = run([t.detach().double().requires_grad_() for t in tensors], "definition")
    found, eager = run(tensors, "triton"), run(tensors, "definition")
    for number, (ours, theirs, wanted) in enumerate(zip(found, eager, exact, strict=True)):
        error, allowed = relative(ours, wanted), relative(theirs, wanted)
        assert error <= max(1.5 * allowed, 1e-6) and error < BOUND[dtype], (number, error, allowed)


@DTYPES
@pytest.mark.parametrize("strict", [False, True])
def test_two_runs_are_bitwise_equal_on_poisoned_memory(dtype, strict, seed):
    tensors = make((2, 65, 66, 200), dtype)
    torch.use_deterministic_algorithms(strict)
    try:
        first = run(tensors, "triton")
        poison = torch.full((64 << 20,), float("nan"), device="cuda")  # what the allocator hands out next
        del poison
        assert all(torch.equal(a, b) for a, b in zip(first, run(tensors, "triton"), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_replays_in_a_cuda_graph_without_a_sync(seed):
    tensors = make((2, 32, 32, 64), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(tensors, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        generator = torch.ones(2, 32, 32, 64, device="cuda", dtype=torch.bfloat16)
        with torch.cuda.graph(graph):
            x, *weights, bias = tensors
            outs = [dwconv_gelu(x, weights[0], bias), *dwconv_dilated(x, weights, DILATIONS)]
            captured = [*outs, *torch.autograd.grad(outs, tensors, [generator] * 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    outs = [dwconv_gelu(x, weights[0], bias), *dwconv_dilated(x, weights, DILATIONS)]
    again = [*outs, *torch.autograd.grad(outs, tensors, [generator] * 4)]
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_compiles_in_one_graph(seed):
    x, weight, *_, bias = make((2, 32, 32, 64), torch.bfloat16)
    compiled = torch.compile(dwconv_gelu, fullgraph=True)
    assert torch.equal(compiled(x, weight, bias, backend="triton"), dwconv_gelu(x, weight, bias, backend="triton"))


def test_launches(seed):
    x, weight, *_, bias = make((2, 32, 32, 64), torch.bfloat16)
    grad = torch.randn_like(x)
    torch.autograd.grad(dwconv_gelu(x, weight, bias), (x, weight, bias), grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(dwconv_gelu(x, weight, bias), (x, weight, bias), grad)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 3, kernels


def test_the_forward_pass_allocates_its_result_alone(seed):
    x, weight, *_, bias = make((2, 128, 128, 256), torch.bfloat16)
    dwconv_gelu(x, weight, bias)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = dwconv_gelu(x, weight, bias)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + 4096


def test_other_sizes_of_a_map_do_not_recompile(seed):
    from ssr_kernels.dwconv import triton_gelu

    def compiled() -> int:
        return sum(len(caches[0]) for caches in triton_gelu.gelu_backward.device_caches.values())

    def step(height: int) -> None:
        x, weight, *_, bias = make((1, height, 32, 48), torch.bfloat16)
        torch.autograd.grad(dwconv_gelu(x, weight, bias).sum(), (x, weight, bias))

    step(32)
    before = compiled()
    for height in (16, 31, 33, 200):
        step(height)
    assert compiled() == before > 0


def test_auto_takes_triton(seed):
    x, weight, *_, bias = make((1, 4, 4, 8), torch.bfloat16)
    assert GELU.choose("auto", (x, weight, bias)).name == DILATED.choose("auto", (x, weight)).name == "triton"
    assert GELU.choose("auto", (x.double(), weight.double(), bias.double())).name == "reference"
