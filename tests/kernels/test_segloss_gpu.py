"""segloss and pseudo_label on a GPU: the accuracy rule, repeatability, graph replay, no host sync, launches, memory."""

import pytest
import torch

from ssr_kernels.segloss import PSEUDO_LABEL, SEGLOSS, pseudo_label, segloss
from tests.kernels.segloss_cases import KINDS, SIZES, WITHOUT_LOSS, Call, definition, errors, label_errors, make, run

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)


def on_device(kind: str, shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, labels=torch.uint8) -> Call:
    return make(kind, shape, size, dtype, labels).to(device="cuda")


def within_the_rule(call: Call) -> None:
    """At most 1.5 times the error of PyTorch in the same precision, and under the bound."""
    dtype, exact = call.logits.dtype, definition(call)
    found, allowed = errors(run(call, "triton"), exact), errors(definition(call, dtype), exact)
    for name, error in found.items():
        assert error <= max(1.5 * allowed[name], 1e-6) and error < BOUND[dtype], (name, found, allowed)
    size = (call.labels.shape[1], call.labels.shape[2])
    assert max(label_errors(call.logits, size, 0.6, "triton").values()) < 1e-5


@DTYPES
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "large logits"])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_error_is_within_the_rule(kind, labels, dtype, seed):
    call = on_device(kind, (2, 32, 40, 19), (128, 160), dtype, labels)
    within_the_rule(call)
    if kind in WITHOUT_LOSS:
        loss, gradient = run(call, "triton")
        assert loss == 0 and not gradient.any()


def test_large_logits(seed):
    within_the_rule(on_device("large logits", (2, 32, 40, 19), (128, 160), torch.float32))


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, seed):
    within_the_rule(on_device("mixed", *SIZES[size], dtype))


@DTYPES
@pytest.mark.parametrize("classes", [2, 7, 16, 19, 33, 64, 100, 150, 255])
def test_numbers_of_classes(classes, dtype, seed):
    within_the_rule(on_device("mixed", (1, 17, 37, classes), (65, 150), dtype))


def test_one_class_has_no_loss_and_next_to_no_gradient(seed):
    loss, gradient = run(on_device("no weights", (2, 9, 9, 1), (36, 36), torch.float32), "triton")
    assert loss.abs() < 1e-6 and gradient.abs().max() < 1e-6 / 36


@DTYPES
def test_misaligned_storage(dtype, seed):
    call = on_device("mixed", (2, 9, 8, 19), (33, 31), dtype)
    within_the_rule(call)
    shifted = [torch.cat([t.detach().flatten()[:1], t.detach().flatten()])[1:] for t in (call.logits, call.labels)]
    logits, labels = shifted[0].view(call.logits.shape).requires_grad_(), shifted[1].view(call.labels.shape)
    assert logits.data_ptr() % 16 and labels.data_ptr() % 16
    assert all(map(torch.equal, run(Call(logits, labels, call.weights), "triton"), run(call, "triton")))


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_bitwise_equal_on_poisoned_memory(deterministic, dtype, seed):
    call = on_device("mixed", (3, 65, 67, 19), (260, 268), dtype)

    def results() -> tuple[torch.Tensor, ...]:
        return *run(call, "triton"), *pseudo_label(call.logits, (260, 268), 0.9, backend="triton")

    torch.use_deterministic_algorithms(deterministic)
    try:
        first = results()
        poison = torch.full((64 << 20,), float("nan"), device="cuda")  # what the allocator hands out next
        del poison
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_replays_in_a_cuda_graph_without_a_sync(seed):
    call = on_device("mixed", (2, 32, 32, 19), (128, 128), torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        return *run(call, "triton"), *pseudo_label(call.logits, (128, 128), 0.9, backend="triton")

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
        call.logits.copy_(3 * torch.randn_like(call.logits))
        call.labels.copy_(torch.randint_like(call.labels, 0, 25))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiles_in_one_graph(seed):
    call = on_device("mixed", (2, 32, 32, 19), (128, 128), torch.bfloat16)
    loss, _ = run(call, "triton")
    assert torch.equal(torch.compile(segloss, fullgraph=True)(*call.arguments(), backend="triton"), loss)


def test_launches(seed):
    call = on_device("mixed", (2, 128, 128, 19), (512, 512), torch.bfloat16)
    run(call, "triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = segloss(*call.arguments(), backend="triton")
        torch.autograd.grad(loss, call.logits, grad_outputs=torch.ones_like(loss))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "fill" not in name.lower()]) == 3, kernels


def test_memory_is_a_few_bytes_a_label_pixel(seed):
    call = on_device("mixed", (2, 256, 256, 19), (1024, 1024), torch.bfloat16)
    run(call, "triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(call, "triton")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.2 * (4 * call.labels.numel() + call.logits.nbytes) < 0.15 * 4 * call.labels.numel() * 19


def test_other_sizes_and_thresholds_do_not_recompile(seed):
    from ssr_kernels.segloss import triton_kernels

    kernels = (triton_kernels.pixel_losses, triton_kernels.logit_gradients, triton_kernels.surest_classes)

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def step(height: int, width: int, threshold: float) -> None:
        call = on_device("mixed", (2, height, width, 23), (height * 4 + 1, width * 4), torch.bfloat16)
        run(call, "triton")
        pseudo_label(call.logits, (height * 4, width), threshold, backend="triton")

    step(32, 32, 0.9)
    before = compiled()
    for height, width, threshold in ((1, 1, 0.5), (33, 47, 1.0), (16, 1, 0.968)):
        step(height, width, threshold)
    assert compiled() == before > 0


def test_auto_takes_triton_and_refuses_what_it_cannot_run(seed):
    call = on_device("mixed", (2, 8, 8, 19), (32, 32), torch.bfloat16)
    tensors = (call.logits, call.labels, call.weights)
    assert SEGLOSS.choose("auto", tensors).name == PSEUDO_LABEL.choose("auto", tensors[:1]).name == "triton"
    assert SEGLOSS.choose("auto", tuple(tensor.cpu() for tensor in tensors)).name == "reference"
    assert SEGLOSS.choose("auto", (call.logits.double(), *tensors[1:])).name == "reference"
