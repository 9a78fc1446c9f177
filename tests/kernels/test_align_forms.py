"""The op around align: both forms against autograd on the definition, what it saves, how it compiles and is refused."""

import pytest
import torch

from ssr_kernels import library
from ssr_kernels.align import align_loss, align_stages, forms, reference
from ssr_kernels.registry import BackendError
from tests.kernels.align_cases import GRIDS, definition, grouped, relative, run


@pytest.mark.parametrize("channels", [32, 64, 128, 160, 256, 320, 512])
@pytest.mark.parametrize("width", [256, 1280])
def test_both_forms_equal_autograd_on_the_definition(channels, width, seed):
    forms_seen = set()
    for fine, coarse in GRIDS:
        call = grouped([(*fine, channels)], coarse, width, torch.float64, masks=True)
        forms_seen.add(forms.takes_gram(call.features[0].shape, call.target.shape))
        loss, gradients = run(call, "reference")
        expected, wanted = definition(call)
        assert abs(loss - expected) < 1e-10 * abs(expected)
        for name, error in relative(gradients, wanted).items():
            assert error < 1e-10, (fine, coarse, name)
    assert forms_seen == ({True, False} if channels < 256 else {False})


@pytest.mark.parametrize("masks", [True, False])
def test_the_grouped_form_is_the_sum_of_its_stages(masks, seed):
    call = grouped([(6, 9, 32), (3, 4, 160), (2, 3, 320), (12, 17, 64), (9, 5, 128)], (3, 4), 256, torch.float64, masks)
    call.biases[1] = None
    loss, gradients = run(call, "reference")
    expected, wanted = definition(call)
    assert abs(loss - expected) < 1e-10 * abs(expected)
    assert max(relative(gradients, wanted).values()) < 1e-10


@pytest.mark.parametrize("fine", [(6, 8), (3, 4)], ids=["gram", "direct"])
def test_rows_of_norm_zero_are_as_in_pytorch(fine, seed):
    call = grouped([(*fine, 32)], (3, 4), 64, torch.float64, masks=False)
    call.biases[0] = None
    with torch.no_grad():
        call.features[0][0, 0] = 0
        call.features[0][1, 1, 1] = 1e-12  # |p| under the bound
        call.target[0, 0, 1] = 0
        call.target[1] = 0
    loss, gradients = run(call, "reference")
    expected, wanted = definition(call)
    assert abs(loss - expected) < 1e-10 * abs(expected)
    assert gradients["x0"].isfinite().all() and max(relative(gradients, wanted).values()) < 1e-10


@pytest.mark.parametrize("fine", [(6, 8), (3, 4)], ids=["gram", "direct"])
def test_nothing_valid_is_zero_without_nan(fine, seed):
    call = grouped([(*fine, 32), (3, 3, 16)], (3, 4), 64, torch.float32, masks=True)
    for mask in call.valid:
        mask.zero_()
    loss, gradients = run(call, "reference")
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_no_rows_no_loss(seed):
    call = grouped([(0, 8, 32), (3, 4, 16)], (3, 4), 64, torch.float64, masks=False)
    loss, gradients = run(call, "reference")
    alone = align_loss(call.features[1], call.weights[1], call.biases[1], call.target)
    assert abs(loss - call.shares[1] * alone) < 1e-12
    assert torch.equal(gradients["w0"], torch.zeros_like(gradients["w0"])) and gradients["x0"].numel() == 0


@pytest.mark.parametrize("frozen", [("x",), ("w",), ("b",), ("w", "b"), ("x", "b")])
def test_partial_requires_grad(frozen, seed):
    call = grouped([(6, 8, 16), (3, 4, 16)], (3, 4), 32, torch.float64, masks=False)
    expected, wanted = definition(call)
    for name, leaf in call.leaves().items():
        leaf.requires_grad_(name[0] not in frozen)
    loss, gradients = run(call, "reference")
    assert {name[0] for name in gradients} == {"x", "w", "b"} - set(frozen)
    assert max(relative(gradients, {name: wanted[name] for name in gradients}).values()) < 1e-10
    with torch.no_grad():
        assert not call.run("reference").requires_grad


def test_saves_at_most_16_bytes_a_row(seed):
    call = grouped([(64, 64, 64), (32, 32, 128), (16, 16, 320), (8, 8, 512)], (16, 16), 256, torch.float32, masks=False)
    own = {t.untyped_storage().data_ptr() for t in (*call.leaves().values(), call.target)}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.run("reference")
    rows = sum(x.shape[0] * x.shape[1] * x.shape[2] for x in call.features)
    assert 0 < sum(saved.values()) <= 16 * rows
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reference.align_stages(*call.arguments())
    assert sum(saved.values()) > 16 * rows  # the hook does see what plain PyTorch keeps


@pytest.mark.parametrize("masks", [True, False])
def test_opcheck(masks, seed):
    call = grouped([(4, 6, 8), (2, 3, 8)], (2, 3), 16, torch.float32, masks)
    call.biases[1] = None
    arguments = [[t.detach() for t in call.features], [t.detach() for t in call.weights]]
    arguments += [[None if b is None else b.detach() for b in call.biases], call.target, call.valid]
    loss, rows, scale = torch.ops.ssr_kernels.align_forward(*arguments, call.shares, "reference")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.ssr_kernels.align_forward.default, (*arguments, call.shares, "reference"), test_utils=tests
    )
    wanted = [True, True, True, False, True, False]
    backward = (torch.ones(()), *arguments, rows, scale, wanted, "reference")
    torch.library.opcheck(torch.ops.ssr_kernels.align_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_in_one_graph_forward_and_backward(engine, seed):
    call = grouped([(4, 6, 8), (2, 3, 8)], (2, 3), 16, torch.float32, masks=True)
    call.biases[0] = None
    loss, gradients = run(call, "reference")
    compiled = torch.compile(align_stages, fullgraph=True, backend=engine)
    actual = compiled(*call.arguments())
    torch.testing.assert_close(actual, loss, rtol=0, atol=0)
    leaves = call.leaves()
    again = dict(zip(leaves, torch.autograd.grad(actual, list(leaves.values())), strict=True))
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def test_two_runs_are_bitwise_equal(seed):
    call = grouped([(12, 17, 64), (3, 4, 32)], (3, 4), 256, torch.float32, masks=True)
    (loss, gradients), (again, repeated) = run(call, "reference"), run(call, "reference")
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], repeated[name]) for name in gradients)


def test_autocast_casts_the_operands_and_reduces_in_float32(seed):
    call = grouped([(6, 8, 32), (3, 4, 32)], (3, 4), 64, torch.float32, masks=False)
    expected, _ = run(call, "reference")
    call.features[0] = call.features[0].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = run(call, "reference")
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-2 * expected
    assert gradients["x0"].dtype == torch.bfloat16 and gradients["w0"].dtype == torch.float32
    with pytest.raises(TypeError, match=r"weights\[0\] must have the dtype of features\[0\]"):
        call.run("reference")


def test_backends_say_why_they_cannot(seed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = grouped([(4, 6, 8)], (2, 3), 16, torch.float32, masks=False)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="backend=triton cannot be honoured: there is no CUDA device"):
            call.run("triton")
        with pytest.raises(BackendError, match="cuda runs in bfloat16 or float16"):
            call.run("cuda")
    call.features[0] = call.features[0].detach().permute(0, 2, 1, 3)
    with pytest.raises(BackendError, match="every tensor must be contiguous"):
        call.run("cpp")
    half = grouped([(4, 6, 8)], (2, 3), 16, torch.bfloat16, masks=False)
    with pytest.raises(BackendError, match="cpp runs in float32 or float64"):
        half.run("cpp")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="interpreter is wrong in bfloat16"):
        half.run("triton")


@pytest.mark.skipif(bool(library.reasons("ssr_cpu")), reason=f"{library.reasons('ssr_cpu')}")
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_the_cpp_backend_equals_the_definition_and_itself(dtype, bound, masks, seed):
    call = grouped([(6, 9, 32), (3, 4, 160), (12, 17, 64), (9, 5, 128), (7, 5, 5)], (3, 4), 256, dtype, masks)
    call.biases[1] = None
    loss, gradients = run(call, "cpp")
    expected, wanted = definition(call)
    assert abs(loss.double() - expected) < bound * abs(expected)
    assert max(relative(gradients, wanted).values()) < bound
    again, repeated = run(call, "cpp")
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], repeated[name]) for name in gradients)
