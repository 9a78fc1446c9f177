"""Contrastive loss: the definition, the closed form against autograd on it, what it keeps, how it compiles."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssr_kernels.contrast import contrast_loss, forms, reference
from ssr_kernels.registry import BackendError
from tests.kernels.contrast_cases import KINDS, WITHOUT_LOSS, Call, definition, errors, make, run
from tests.syncfree import HostSyncError, NoHostSync


def written_out(call: Call) -> float:
    """The loss pair by pair in Python floats."""
    rows, group, klass = call.embedding.tolist(), call.group.tolist(), call.klass.tolist()
    norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
    found = []
    for i, row in enumerate(rows):
        positives, negatives = [], []
        for j, other in enumerate(rows):
            if i == j or group[i] < 0 or group[j] < 0:
                continue
            short = norms[i] <= 1e-12 or norms[j] <= 1e-12
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            s = 0.0 if short else dot / (norms[i] * norms[j]) / call.temperature
            if group[i] == group[j] or klass[i] == klass[j] >= 0:
                positives.append(s)
            elif klass[i] >= 0 and klass[j] >= 0:
                negatives.append(s)
        if positives and negatives:
            lse = math.log(sum(math.exp(s) for s in positives + negatives))
            found.append(lse - sum(positives) / len(positives))
    return sum(found) / max(1, len(found))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_what_is_written(kind, temperature, seed):
    call = make(kind, 41, 5, temperature, torch.float64)
    expected = written_out(call)
    assert (expected == 0) == (kind in WITHOUT_LOSS)
    for loss in (reference.contrast_loss(*call.arguments()), contrast_loss(*call.arguments())):
        assert loss.shape == () and abs(loss.item() - expected) <= 1e-12 * max(1, expected)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_closed_form_equals_autograd_on_the_definition(kind, temperature, chunk, seed):
    for n in (1, 2, 63, 129):
        call = make(kind, n, 6, temperature, torch.float64)
        x = call.embedding.detach()
        loss, rows, scale = forms.forward(x, call.group, call.klass, temperature, chunk)
        grad = torch.rand((), dtype=torch.float64)
        gradient = forms.backward(grad, x, call.group, call.klass, rows, scale, temperature, chunk) / grad
        for what, error in errors(call, (loss, gradient), definition(call)).items():
            assert error < 1e-10, (n, what, error)


@pytest.mark.parametrize("kind", ["mixed", "mostly padding", "unknown classes", "duplicates"])
def test_gradcheck(kind, seed):
    call = make(kind, 11, 4, 0.3, torch.float64)
    for loss in (contrast_loss, reference.contrast_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, *call.arguments()[1:]), call.embedding)


def test_a_second_derivative_is_refused_with_the_way_out(seed):
    call = make("zeros", 9, 3, 0.5, torch.float64)
    with pytest.raises(RuntimeError, match="no second derivative.*contrast.reference.contrast_loss"):
        torch.autograd.grad(contrast_loss(*call.arguments()), call.embedding, create_graph=True)
    call = make("mixed", 9, 3, 0.5, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: reference.contrast_loss(x, *call.arguments()[1:]), call.embedding, fast_mode=True
    )


@pytest.mark.parametrize("kind", sorted(WITHOUT_LOSS))
@pytest.mark.parametrize("n", [0, 1, 20])
def test_where_no_row_counts_all_is_zero(kind, n, seed):
    loss, gradient = run(make(kind, n, 5), "reference")
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient)) and gradient.shape == (n, 5)


def test_equal_embeddings_and_scaled_ones(seed):
    call = make("mixed", 40, 8, 0.2, torch.float64)
    loss, gradient = run(call, "reference")
    call.embedding = (call.embedding.detach() * 8).requires_grad_()
    again, smaller = run(call, "reference")
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(smaller * 8, gradient, rtol=1e-9, atol=1e-12)


def test_nan_is_seen(seed):
    call = make("nan", 20, 5)
    assert run(call, "reference")[0].isnan() and reference.contrast_loss(*call.arguments()).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype, seed):
    call = make("mixed", 30, 5, dtype=torch.float64)
    call.group, call.klass = call.group.clamp_min(0), call.klass.clamp_min(0)
    expected = contrast_loss(*call.arguments())
    assert torch.equal(contrast_loss(call.embedding, call.group.to(dtype), call.klass.to(dtype), 0.1), expected)


def test_non_contiguous_inputs(seed):
    call = make("mixed", 30, 6, dtype=torch.float64)
    loss, gradient = run(call, "reference")
    turned = call.embedding.detach().t().contiguous().t().requires_grad_()
    wide = [torch.stack([ids, ids - 7], dim=1)[:, 0] for ids in (call.group, call.klass)]
    assert not any(t.is_contiguous() for t in (turned, *wide))
    again, repeated = run(Call(turned, *wide, call.temperature), "reference")
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(repeated, gradient, rtol=1e-10, atol=1e-14)


def test_two_runs_are_bitwise_equal(seed):
    call = make("mixed", 300, 16)
    assert all(torch.equal(a, b) for a, b in zip(run(call, "reference"), run(call, "reference"), strict=True))


def test_without_gradient(seed):
    call = make("mixed", 20, 5)
    with torch.no_grad():
        assert not contrast_loss(*call.arguments()).requires_grad
    call.embedding = call.embedding.detach()
    assert not contrast_loss(*call.arguments()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_are_reduced_in_float32(dtype, seed):
    call = make("mixed", 300, 32, dtype=dtype)
    loss, gradient = run(call, "reference")
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    found = errors(call, (loss, gradient), definition(call))
    assert found["loss"] < 1e-5 and found["gradient"] < 3e-3  # the gradient itself is rounded


def test_autocast_casts_the_embedding_and_reduces_in_float32(seed):
    call = make("mixed", 300, 32)
    half = contrast_loss(*call.to(dtype=torch.bfloat16).arguments())
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = run(call, "reference")  # the backward pass under autocast too
    assert torch.equal(loss, half.detach()) and gradient.dtype == torch.float32
    assert errors(call, (loss, gradient), definition(call))["gradient"] < 1e-2


def saved_bytes(call: Call, loss) -> int:
    """What one forward keeps for the backward pass, the embedding excepted."""
    own, saved = call.embedding.untyped_storage().data_ptr(), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() != own:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*call.arguments())
    assert result.requires_grad
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_at_most_32_bytes_a_row_beyond_the_embedding(dtype, seed):
    kept = {n: saved_bytes(make("mixed", n, 256, dtype=dtype), contrast_loss) for n in (100, 512, 1024)}
    print(kept)
    for n, size in kept.items():
        assert 0 < size <= 32 * n
    eager = saved_bytes(make("mixed", 1024, 256, dtype=dtype), reference.contrast_loss)
    matrix = 4 * 1024 * 1024
    assert eager > 2 * matrix
    # at 8192 rows: 8 times the bytes here, and at least 2 matrices, 64 times theirs, in eager
    assert 8 * kept[1024] + 8192 * 256 * dtype.itemsize < 0.02 * 64 * eager
    assert 8 * kept[1024] < 0.01 * 64 * 2 * matrix


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under this mode have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(n: int) -> int:
    """Of the closed form, forward and backward."""
    call = make("mixed", n, 32)
    x = call.embedding.detach()
    with LiveBytes() as memory:
        _, rows, scale = forms.forward(x, call.group, call.klass, 0.1)
        forms.backward(scale, x, call.group, call.klass, rows, scale, 0.1)
    return memory.peak


def test_peak_memory_grows_with_n_not_its_square(seed):
    sizes = {n: peak_bytes(n) for n in (512, 1024, 2048)}
    print(sizes)
    assert sizes[512] > 4 * 512 * forms.CHUNK  # the mode does see the pairs of a chunk
    assert sizes[2048] < 2.2 * sizes[1024] < 4.8 * sizes[512]


def test_no_host_sync_forward_or_backward(seed):
    call = make("mixed", 300, 8)
    with NoHostSync():
        run(call, "reference")
    # the op hides from the mode what is inside it
    x = call.embedding.detach()
    with NoHostSync():
        _, rows, scale = forms.forward(x, call.group, call.klass, 0.1)
        forms.backward(scale, x, call.group, call.klass, rows, scale, 0.1)
    with NoHostSync():
        run_loss = reference.contrast_loss(*call.arguments())
        torch.autograd.grad(run_loss, call.embedding)
    with pytest.raises(HostSyncError), NoHostSync():
        forms.forward(x, call.group, call.klass, 0.1)[0].item()


def test_opcheck(seed):
    call = make("mixed", 12, 5)
    operands = (call.embedding.detach(), call.group.int(), call.klass.int())
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    turned = operands[0].t().contiguous().t()
    for x in (operands[0], operands[0].bfloat16(), operands[0].double(), turned, operands[0][:0]):
        ids = [tensor[: len(x)] for tensor in operands[1:]]
        _, rows, scale = torch.ops.ssr_kernels.contrast_forward(x, *ids, 0.1, "reference")
        forward = (x, *ids, 0.1, "reference")
        torch.library.opcheck(torch.ops.ssr_kernels.contrast_forward.default, forward, test_utils=tests)
        backward = (torch.ones_like(scale), x, *ids, rows, scale, 0.1, "reference")
        torch.library.opcheck(torch.ops.ssr_kernels.contrast_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_in_one_graph_forward_and_backward(engine, seed):
    call = make("mixed", 20, 5)
    compiled = torch.compile(contrast_loss, fullgraph=True, backend=engine)
    for temperature in (0.1, 0.2, 0.3):
        call.temperature = temperature
        loss, gradient = run(call, "reference")
        actual = compiled(*call.arguments())
        torch.testing.assert_close(actual, loss, rtol=0, atol=0)
        assert torch.equal(torch.autograd.grad(actual, call.embedding)[0], gradient)


def test_refusals_name_the_argument(seed):
    x, group, klass, _ = make("mixed", 8, 3).arguments()
    refused = [
        (ValueError, r"embedding must have the shape \[n, D\]", (x[0], group, klass, 0.1)),
        (TypeError, "embedding must be a tensor", ([[1.0]], group, klass, 0.1)),
        (TypeError, "embedding must be floating point", (x.long(), group, klass, 0.1)),
        (ValueError, r"group must have the shape \[n\] = \[8\]", (x, group[:7], klass, 0.1)),
        (TypeError, "group must be an integer tensor", (x, group.float(), klass, 0.1)),
        (TypeError, "group must be an integer tensor", (x, group > 0, klass, 0.1)),
        (ValueError, "group must be on the device of embedding", (x, group.to("meta"), klass, 0.1)),
        (ValueError, "klass must have the shape", (x, group, klass[:, None], 0.1)),
        (TypeError, "klass must be an integer tensor", (x, group, klass.double(), 0.1)),
        (ValueError, "klass must be on the device of embedding", (x, group, klass.to("meta"), 0.1)),
        (ValueError, "temperature must be a positive number", (x, group, klass, 0.0)),
        (ValueError, "temperature must be a positive number", (x, group, klass, math.nan)),
        (ValueError, "temperature must be a positive number", (x, group, klass, math.inf)),
    ]
    for kind, message, arguments in refused:
        with pytest.raises(kind, match=message):
            contrast_loss(*arguments)


def test_backends_say_why_they_cannot(seed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = make("mixed", 20, 5)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="backend=triton cannot be honoured: there is no CUDA device"):
            run(call, "triton")
    with pytest.raises(BackendError, match="contrast_loss has no cuda backend yet"):
        run(call, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused = {
        "interpreter is wrong in bfloat16": make("mixed", 20, 5, dtype=torch.bfloat16),
        "underflow in float16": make("mixed", 20, 5, dtype=torch.float16),
        "bfloat16 or float32": make("mixed", 20, 5, dtype=torch.float64),
        "at most 256 numbers": make("mixed", 20, 257),
        "at most 65536 rows": make("mixed", 65537, 1),
        "every tensor must be contiguous": Call(torch.randn(5, 20).t().requires_grad_(), call.group, call.klass, 0.1),
    }
    for message, wrong in refused.items():
        with pytest.raises(BackendError, match=message):
            run(wrong, "triton")
