"""A tensor as torch.save writes it, for files of thousands of small ones.

torch.save pickles each tensor's description and opens an archive for it: 70 us of Python for a few numbers, in which
the training thread stands still. The description is the same for all tensors of a kind, so it is made once here.
"""

import functools
import io
from typing import IO, Any

import torch
from torch import Tensor

_SMALL = 1 << 16
"""Bytes from which writing the numbers takes longer than describing them."""
Records = tuple[tuple[str, bytes | None], ...]


def write_tensor(stream: IO[bytes], tensor: Tensor) -> None:
    """Write what torch.save(tensor, stream) would, byte for byte.

    Args:
        tensor: on the CPU, without anything behind or before it in its storage.
    """
    records = _records(tensor.dtype, tuple(tensor.shape), tensor.stride()) if 0 < tensor.nbytes < _SMALL else None
    if records is None:
        torch.save(tensor, stream)
    else:
        archive = io.BytesIO()  # a full disk would be an error of the archive's, were the file written to by it
        _write(archive, records, tensor)
        stream.write(archive.getbuffer())


@functools.lru_cache(maxsize=4096)
def _records(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Records | None:
    """The parts of the archive of a tensor of this kind, the numbers' own as None; None if torch.save writes others.

    What makes the archive is PyTorch's own, without a promise that it stays as it is: so it is tried out.
    """
    try:
        example = torch.empty_strided(shape, stride, dtype=dtype).zero_()
        whole = io.BytesIO()
        torch.save(example, whole)
        reader = torch._C.PyTorchFileReader(io.BytesIO(whole.getvalue()))
        names = [name for name in reader.get_all_records() if name not in ("version", ".data/serialization_id")]
        records = tuple((name, None if name == "data/0" else reader.get_record(name)) for name in names)
        again = io.BytesIO()
        _write(again, records, example)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return records if again.getvalue() == whole.getvalue() else None


def _archive(stream: IO[bytes]) -> Any:
    return torch._C.PyTorchFileWriter(stream)


def _write(stream: IO[bytes], records: Records, tensor: Tensor) -> None:
    archive = _archive(stream)
    for name, content in records:
        if content is None:
            archive.write_record(name, tensor.untyped_storage(), tensor.nbytes)
        else:
            archive.write_record(name, content, len(content))
    archive.write_end_of_file()
