"""The frozen encoder on a GPU: each form of attention in bf16 and float32, no wait for the device, CUDA graphs."""

import copy

import pytest
import torch

from ssr_fast.engine.attention import check_sam_attention
from ssr_fast.errors import UserError
from ssr_fast.models.sam import SHAPES, SamConfig, SamShape
from ssr_fast.models.sam_encoder import SamEncoder
from ssr_fast.models.sam_forms import FORMS
from tests.models.sam_nets import CASES, LargestTensor, error, ours, random_encoder

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SHAPES_1024 = {
    "heads of 64": SamShape(1024, 16, 128, 2, 2, 4.0, 32, 14, (1,)),
    "heads of 80": SamShape(1024, 16, 160, 2, 2, 4.0, 32, 14, (1,)),
}
"""A window block and a global one of ViT-B and ViT-L, and of ViT-H, with fewer heads."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each form that runs here."""
    try:
        check_sam_attention(SamConfig(encoder="vit_b", checkpoint="x", attention=request.param), "bf16", GPU, False)
    except UserError as problem:
        pytest.skip(str(problem))
    return str(request.param)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES_1024)
def test_bf16_error_is_at_most_stocks(name: str, form: str) -> None:
    shape = SHAPES_1024[name]
    encoder = random_encoder(shape).to(GPU, torch.bfloat16)
    images = torch.randn(2, 3, 1024, 1024, device=GPU).bfloat16()
    exact = copy.deepcopy(encoder).double()(images.double())
    stock, found = error(encoder(images), exact), error(ours(encoder, shape, form).to(GPU)(images), exact)
    print(f"{name}, {form}: {found:.2e}, stock {stock:.2e}")
    assert found <= 1.5 * stock


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_fp32_error(case: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shape, size = CASES[case]
    encoder = random_encoder(shape).to(GPU)
    images = torch.randn(2, 3, *size, device=GPU)
    exact = copy.deepcopy(encoder).double()(images.double())
    assert error(ours(encoder, shape, form).to(GPU)(images), exact) < 1e-5


@torch.no_grad()
def test_a_graph_replays_the_same_bits_without_a_wait(form: str) -> None:
    shape = SHAPES_1024["heads of 64"]
    encoder = ours(random_encoder(shape).bfloat16(), shape, form).to(GPU)
    images = torch.randn(2, 3, 1024, 1024, device=GPU).bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = encoder(images).clone()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = encoder(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = encoder(images)
        found.zero_()
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected) and torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_b", "vit_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_map_of_attention_is_stored(name: str, dtype: torch.dtype) -> None:
    """A fused kernel takes the widths: else PyTorch would fall back to stored maps, without a word."""
    shape = SHAPES[name]
    encoder = SamEncoder(shape).to(GPU, dtype).requires_grad_(False)
    images = torch.randn(1, 3, 1024, 1024, device=GPU, dtype=dtype)
    encoder(images)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with LargestTensor() as mode:
        encoder(images)
    assert mode.largest == 4096 * 4 * shape.width
    assert torch.cuda.max_memory_allocated() - before < shape.heads * 4096**2 * dtype.itemsize
