"""What `bench profile` makes of recorded events: made-up ones, with streams side by side and replays of a graph."""

import random

import pytest

from bench import kernel_times
from bench.kernel_times import Event, busy, by_kind, device_events, incomplete, kind, own_kernels, shares, totals, wall


def test_busy_time_is_a_union_over_streams():
    assert busy([]) == 0
    assert busy([Event("a", 0, 4), Event("b", 6, 7)]) == 5
    assert busy([Event("a", 0, 4, 7), Event("b", 1, 2, 8)]) == 4  # inside another
    assert busy([Event("a", 0, 4, 7), Event("b", 3, 6, 8), Event("c", 3.5, 5, 9)]) == 6  # a chain
    assert busy([Event("a", 0, 10), Event("b", 1, 2), Event("c", 9, 12), Event("d", 11, 11)]) == 12
    assert busy([Event("late", 6, 7), Event("early", 0, 4)]) == 5  # a trace is not in order
    assert busy([Event("a", 0, 4), Event("b", 4, 5)]) == 5  # one right behind another


def test_busy_time_against_counting():
    generator = random.Random(0)
    for _ in range(50):
        starts = [generator.randrange(60) for _ in range(8)]
        events = [Event("k", at, at + generator.randrange(12), generator.randrange(3)) for at in starts]
        counted = {moment for event in events for moment in range(int(event.start), int(event.end))}
        assert busy(events) == len(counted)
        assert wall(events) == max(event.end for event in events) - min(starts)


def replays(count=3, gap=5.0):
    """A trace of graph replays: one launch on the host, kernels on two streams with its correlation, and a copy."""
    events = [{"ph": "M", "name": "process_name", "args": {"name": "python"}}]
    for number in range(count):
        at, correlation = number * (20 + gap), {"correlation": 100 + number}
        events += [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at - 3, "dur": 40, "args": correlation},
            {"ph": "X", "cat": "kernel", "name": "gemm", "ts": at, "dur": 10, "args": {"stream": 7, **correlation}},
            {"ph": "X", "cat": "kernel", "name": "gemm", "ts": at + 12, "dur": 8, "args": {"stream": 7, **correlation}},
            {"ph": "X", "cat": "kernel", "name": "gelu_forward", "ts": at + 4, "dur": 9, "args": {"stream": 21}},
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": at, "dur": 1, "args": {}},
            {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": at, "id": 4},
        ]
    return {"traceEvents": events}


def test_a_trace_of_graph_replays():
    events = device_events(replays())
    assert len(events) == 12 and {event.stream for event in events} == {0, 7, 21}  # nothing of the host's
    assert busy(events) == 3 * 20 and wall(events) == 70
    found = shares(totals(events), 3, own_kernels())
    assert [(one.name, one.calls, one.ms) for one in found] == [
        ("gemm", 2, pytest.approx(0.018)),
        ("gelu_forward", 1, pytest.approx(0.009)),
        ("Memcpy DtoD (Device -> Device)", 1, pytest.approx(0.001)),
    ]
    assert sum(one.percent for one in found) == pytest.approx(100)
    kinds = by_kind(found)
    assert list(kinds) == ["matrix products", kernel_times.OURS, kernel_times.COPIES]
    assert kinds["matrix products"] == (2, pytest.approx(0.018), pytest.approx(100 * 18 / 28))
    assert incomplete(totals(events), 3) == []
    assert incomplete(totals(events[:-2]), 3) == ["gelu_forward", "Memcpy DtoD (Device -> Device)"]
    assert incomplete({"odd": (4, 1.0), "even": (6, 1.0)}, 3) == ["odd"]


NATIVE = "void at::native::"
NAMES = {
    f"{NATIVE}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >"
    "(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)": (
        "vectorized_elementwise_kernel<CUDAFunctor_add>",
        kernel_times.ELEMENTWISE,
    ),
    f"{NATIVE}elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::"
    "TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>(at::TensorIteratorBase&)>(int)": (
        "elementwise_kernel<direct_copy_kernel_cuda>",
        kernel_times.COPIES,
    ),
    f"{NATIVE}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::native::"
    "sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}>, unsigned int> >"
    "(at::native::ReduceOp<float>)": ("reduce_kernel<sum_functor>", kernel_times.ELEMENTWISE),
    f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<2>"
    ", at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>(float)": (
        "multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        "optimiser, average, working copies",
    ),
    f"{NATIVE}elementwise_kernel<128, 4, at::native::BinaryFunctor<float, float, float, at::native::binary_internal::"
    "MulFunctor<float> >, at::native::clamp_min_scalar_kernel_impl_cuda>(int)": (
        "elementwise_kernel<MulFunctor>",
        kernel_times.ELEMENTWISE,
    ),
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128> >(Params)": (
        "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel",
        "attention",
    ),
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(int)": (
        "Kernel2",
        "matrix products",
    ),
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN": ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
    "void (anonymous namespace)::row_pass<64, float>((anonymous namespace)::Launch)": ("row_pass", kernel_times.OURS),
    "gelu_backward_1": ("gelu_backward_1", kernel_times.OURS),
    f"{NATIVE}(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int, float)": (
        "vectorized_layer_norm_kernel",
        "normalisation",
    ),
    "triton_per_fused_native_layer_norm_backward_3": (
        "triton_per_fused_native_layer_norm_backward_3",
        "elementwise, reductions, by torch.compile",
    ),
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float, false, true>(int)": ("nchwToNhwcKernel", "convolutions"),
    "Memset (Device)": ("Memset (Device)", kernel_times.COPIES),
    "something_else": ("something_else", kernel_times.OTHER),
    "aten::addmm": ("aten::addmm", "matrix products"),
    "aten::mul": ("aten::mul", kernel_times.ELEMENTWISE),
    "aten::convolution_backward": ("aten::convolution_backward", "convolutions"),
    "ssr_kernels::dwconv_gelu_forward": ("ssr_kernels::dwconv_gelu_forward", kernel_times.OURS),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_names_and_kinds(name):
    assert (kernel_times.shorten(name), kind(name, own_kernels())) == NAMES[name]


def test_a_long_name_keeps_both_ends():
    name = (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_kernel"
    )
    short = kernel_times.shorten(name)
    assert len(short) == kernel_times.WIDTH and short.startswith("sm90_xmma_fprop") and short.endswith("1x1x1_kernel")
    assert kind(name, ()) == "convolutions"


def test_the_kernels_of_this_project():
    """What the bench's sanitizer runs is among them, and nothing that a library could be named after."""
    own = own_kernels()
    assert {"gelu_forward", "dilated_dw", "gram_rows", "pixel_losses", "row_pass", "adjoint_pass", "sort_tiles"} <= own
    assert not own & {"configs", "forward", "backward", "elementwise_kernel", "reduce_kernel", "kernel"}
