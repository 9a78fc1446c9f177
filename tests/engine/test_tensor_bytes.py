"""The quick writer of small tensors: torch.save's own bytes, or torch.save."""

import io

import pytest
import torch
from torch import Tensor

from ssr_fast.engine import tensor_bytes
from ssr_fast.engine.tensor_bytes import write_tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (7,),
    (3, 5),
    (2, 3, 4, 5),
    (0,),
    (0, 4),
    (16384,),
    (16385,),
    (200, 100),
)


def saved(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def written(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    write_tensor(stream, tensor)
    return stream.getvalue()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_torch_save(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(2):
        tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)
        assert written(tensor) == saved(tensor)
        assert torch.equal(torch.load(io.BytesIO(written(tensor)), weights_only=True), tensor)


def test_other_orders_in_memory_too() -> None:
    last = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (last, torch.rand(4, 6).T, torch.rand(2, 3)):
        loaded = torch.load(io.BytesIO(written(tensor)), weights_only=True)
        assert written(tensor) == saved(tensor)
        assert torch.equal(loaded, tensor) and loaded.stride() == tensor.stride()


def test_small_ones_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.rand(5, 3)
    written(tensor)
    monkeypatch.setattr(torch, "save", lambda *arguments: pytest.fail("torch.save was called"))
    write_tensor(io.BytesIO(), tensor + 1)


class Changed:
    """An archive writer of another PyTorch."""

    def __init__(self, stream: io.BytesIO) -> None:
        stream.write(b"another format")

    def write_record(self, *arguments: object) -> None:
        pass

    def write_end_of_file(self) -> None:
        pass


def gone(stream: io.BytesIO) -> None:
    raise AttributeError("PyTorchFileWriter")


@pytest.mark.parametrize("archive", [Changed, gone])
def test_what_does_not_give_the_same_bytes_is_left_to_torch_save(
    archive: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.rand(3, 7)
    tensor_bytes._records.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(tensor_bytes, "_archive", archive)
        assert tensor_bytes._records(tensor.dtype, tuple(tensor.shape), tensor.stride()) is None
        assert written(tensor) == saved(tensor)
    tensor_bytes._records.cache_clear()


def test_a_stream_that_fails_raises_its_own_error() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tensor(Full(), torch.rand(3))
