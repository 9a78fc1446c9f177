"""The closed form of segloss against autograd on the definition, what it keeps and holds, its ops, its refusals."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssr_kernels.registry import BackendError
from ssr_kernels.segloss import forms, pseudo_label, reference, segloss
from tests.kernels.segloss_cases import KINDS, SIZES, WITHOUT_LOSS, Call, definition, errors, label_errors, make, run
from tests.syncfree import HostSyncError, NoHostSync


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_equals_autograd_on_the_definition(kind, size, seed):
    for labels_dtype in (torch.uint8, torch.int64):
        call = make(kind, *SIZES[size], torch.float64, labels_dtype)
        z, *others = call.arguments()
        for chunk in (1, 17, 10**9):
            loss, lse = forms.forward(z.detach(), *others, chunk)
            grad = torch.rand((), dtype=torch.float64) + 0.5
            labels, weights, ignore_index = others
            gradient = forms.backward(grad, z.detach(), labels, weights, lse, ignore_index, chunk) / grad
            for what, error in errors((loss, gradient), definition(call)).items():
                assert error < 1e-12, (chunk, what, error)


@pytest.mark.parametrize("size", SIZES)
def test_pseudo_labels_equal_the_definition_in_chunks_too(size, seed):
    (shape, labels_size), chunks = SIZES[size], (1, 17, 10**9)
    logits = torch.randn(shape, dtype=torch.float64)
    expected = reference.pseudo_label(logits, labels_size, 0.5)
    for chunk in chunks:
        actual = forms.pseudo_label(logits, *labels_size, 0.5, chunk)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", sorted(WITHOUT_LOSS))
def test_where_nothing_counts_all_is_zero(kind, seed):
    loss, gradient = run(make(kind, *SIZES["odd"]), "reference")
    assert loss == 0 and not gradient.any()


def test_one_class_has_no_loss_and_no_gradient(seed):
    loss, gradient = run(make("mixed", (1, 3, 4, 1), (7, 9)), "reference")
    assert loss == 0 and not gradient.any()
    assert segloss(torch.randn(1, 2, 2, 300), torch.zeros(1, 4, 4, dtype=torch.uint8)).isfinite()


def test_nan_is_seen(seed):
    call = make("no weights", (1, 3, 4, 5), (12, 16))
    with torch.no_grad():
        call.logits[0, 1, 1, 2] = torch.nan
    assert run(call, "reference")[0].isnan()


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_bitwise_equal(deterministic, seed):
    call = make("mixed", (2, 40, 30, 19), (160, 120))
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(call, "reference"), run(call, "reference"), strict=True))
        once, again = (pseudo_label(call.logits, (160, 120), 0.5, backend="reference") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_reduced_in_float32(dtype, seed):
    call = make("mixed", (2, 9, 8, 19), (36, 32), dtype)
    loss, gradient = run(call, "reference")
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    found = errors((loss, gradient), definition(call))
    assert found["loss"] < 1e-5 and found["gradient"] < 3e-3  # the gradient itself is rounded
    assert max(label_errors(call.logits, (36, 32), 0.6, "reference").values()) < 1e-5


def test_autocast_changes_nothing(seed):
    call = make("mixed", (2, 9, 8, 19), (36, 32))
    expected = run(call, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(call, "reference"), expected, strict=True))


def saved_bytes(call: Call, loss) -> int:
    """What one forward keeps for the backward pass, the arguments excepted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in call.arguments() if isinstance(tensor, torch.Tensor)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*call.arguments())
    assert result.requires_grad
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_four_bytes_a_label_pixel(dtype, seed):
    call = make("mixed", (2, 16, 12, 19), (64, 48), dtype)
    assert saved_bytes(call, segloss) == 4 * call.labels.numel()
    assert saved_bytes(call, reference.segloss) > 19 * 4 * call.labels.numel()


class Bytes(TorchDispatchMode):
    """The most bytes that tensors made under this mode have held at one time, and of the largest one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def held(call: Call, chunk: int) -> tuple[Bytes, Bytes]:
    """Of the loss and its gradient, and of pseudo-labels."""
    z, (labels, weights, ignore_index) = call.logits.detach(), call.arguments()[1:]
    with Bytes() as loss:
        value, lse = forms.forward(z, labels, weights, ignore_index, chunk)
        forms.backward(value, z, labels, weights, lse, ignore_index, chunk)
    with Bytes() as pseudo:
        forms.pseudo_label(z, *labels.shape[1:], 0.9, chunk)
    return loss, pseudo


def test_no_map_of_all_classes_and_pixels_is_ever_made(seed):
    classes, size, chunk = 19, 256, 4096
    call = make("mixed", (4, size // 4, size // 4, classes), (size, size))
    whole = 4 * call.labels.numel() * classes
    for memory in held(call, chunk):
        print(memory.largest, memory.peak, whole)
        assert 4 * classes * chunk <= memory.largest < 0.07 * whole  # the low-resolution logits are 1/16
        assert memory.peak < 0.4 * whole
    demo = make("mixed", (4, 24, 48, 8), (96, 192))
    for memory in held(demo, forms.CHUNK):
        assert memory.largest <= 0.51 * 4 * demo.labels.numel() * 8  # a small batch is taken in halves
    with Bytes() as eager:
        reference.segloss(*call.arguments())
    assert eager.largest >= whole


def test_no_host_sync_forward_or_backward(seed):
    call = make("mixed", (2, 5, 6, 7), (20, 24))
    z, (labels, weights, ignore_index) = call.logits.detach(), call.arguments()[1:]
    with NoHostSync():
        run(call, "reference")
        # the op hides from the mode what is inside it
        value, lse = forms.forward(z, labels, weights, ignore_index)
        forms.backward(value, z, labels, weights, lse, ignore_index)
        forms.pseudo_label(z, 20, 24, 0.9)
        loss = reference.segloss(*call.arguments())
        torch.autograd.grad(loss, call.logits)
    with pytest.raises(HostSyncError), NoHostSync():
        forms.forward(z, labels, weights, ignore_index)[0].item()


def test_opcheck(seed):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    ops = torch.ops.ssr_kernels
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for kind in ("mixed", "no weights"):
            call = make(kind, *SIZES["odd"], dtype)
            z, (labels, weights, ignore_index) = call.logits.detach(), call.arguments()[1:]
            turned = z.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            for x in (z, turned, z[:0]):
                others = (labels[: len(x)], None if weights is None else weights[: len(x)])
                _, lse = ops.segloss_forward(x, *others, ignore_index, "reference")
                forward = (x, *others, ignore_index, "reference")
                backward = (torch.ones((), dtype=lse.dtype), x, *others, lse, ignore_index, "reference")
                torch.library.opcheck(ops.segloss_forward.default, forward, test_utils=tests)
                torch.library.opcheck(ops.segloss_backward.default, backward, test_utils=tests)
                torch.library.opcheck(ops.pseudo_label.default, (x, 9, 11, 0.5, "reference"), test_utils=tests)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_in_one_graph_forward_and_backward(engine, seed):
    call = make("mixed", *SIZES["4x"])
    size = tuple(call.labels.shape[1:])
    loss, gradient = run(call, "reference")
    actual = torch.compile(segloss, fullgraph=True, backend=engine)(*call.arguments())
    assert torch.equal(actual, loss)
    assert torch.equal(torch.autograd.grad(actual, call.logits)[0], gradient)
    compiled = torch.compile(pseudo_label, fullgraph=True, backend=engine)
    for threshold in (0.5, 0.6, 0.7):
        found, expected = compiled(call.logits, size, threshold), pseudo_label(call.logits, size, threshold)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_backends_say_why_they_cannot(seed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = make("mixed", *SIZES["4x"])
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="backend=triton cannot be honoured: there is no CUDA device"):
            run(call, "triton")
        with pytest.raises(BackendError, match="backend=triton cannot be honoured: there is no CUDA device"):
            pseudo_label(call.logits, (4, 4), 0.5, backend="triton")
    with pytest.raises(BackendError, match="segloss has no cuda backend yet"):
        run(call, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused = {
        "interpreter is wrong in bfloat16 and float16": make("mixed", *SIZES["4x"], torch.bfloat16),
        "bfloat16, float16 or float32": make("mixed", *SIZES["4x"], torch.float64),
        r"at most 256 classes \(there are 257\)": make("mixed", (1, 1, 1, 257), (1, 1)),
        "at most 32768 rows or columns": make("mixed", (1, 1, 1, 2), (1, 32769)),
        "every tensor must be contiguous": Call(call.logits, call.labels.transpose(1, 2).contiguous().mT, None),
    }
    for message, wrong in refused.items():
        with pytest.raises(BackendError, match=message):
            run(wrong, "triton")
