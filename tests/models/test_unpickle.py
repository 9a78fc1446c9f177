"""Checkpoint files are read as tensors: nothing in them runs, whatever they try."""

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_fast.errors import UserError
from ssr_fast.models import unpickle
from ssr_fast.models.weights import read_tensors


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


class Config(dict[str, Any]):
    """A dict with attributes, as the training frameworks have."""

    extra: list[Any]


def write_zip(path: Path, data: bytes, **records: bytes) -> None:
    """A torch archive around a hand-made data.pkl."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def bombs(marker: Path) -> dict[str, Any]:
    """Objects whose unpickling makes the marker file, by several roads."""
    touch = f"touch {marker}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, f"__import__('os').system('{touch}')"),
        "exec": Call(exec, f"open('{marker}', 'w')"),
        "open": Call(open, str(marker), "w"),
        "nested": {"a": [({"b": Call(os.system, touch)},)]},
        "call in arguments": Call(dict, [("x", Call(os.system, touch))]),
    }


BOMBS = sorted(bombs(Path("/none")))
# getattr(__import__("os"), "system")("touch ...") in raw opcodes: pickle.dumps would not write it like this
CHAIN = b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR("


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BOMBS)
def test_an_object_in_meta_is_not_run_and_the_tensors_load(name: str, zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    tensor = torch.randn(3, 4)
    state = OrderedDict(weight=tensor)
    content = {"meta": {"hook": bombs(marker)[name], "epoch": 3}, "state_dict": state, "optimizer": {}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_tensors(path)
    assert not marker.exists(), "code from the file was executed"
    assert list(read) == ["weight"] and torch.equal(read["weight"], tensor)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the bomb is a dud: this test would not notice an execution"


def test_a_getattr_chain_is_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    data = CHAIN + text(f"touch {marker}") + b"tR."
    write_zip(path, data)
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(path)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the bomb is a dud"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_file_that_is_only_a_bomb_is_refused(protocol: int, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    data = pickle.dumps(Call(os.system, f"touch {marker}"), protocol)
    path.write_bytes(data)
    with pytest.raises(UserError, match="c.pth"):
        read_tensors(path)
    path.write_bytes(b"\x80\x02" + data)
    with pytest.raises(UserError, match="c.pth"):
        read_tensors(path)
    write_zip(path, data)
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(path)
    assert not marker.exists()


def test_what_training_frameworks_keep_in_meta_is_survived(tmp_path: Path) -> None:
    config = Config(lr=1.0)
    config.extra = [1, {2}]
    meta = {
        "config": config,
        "numpy": np.arange(3),
        "scalar": np.float64(2.0),
        "path": Path("x"),
        "set": {1, 2},
        "bytes": b"abc",
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "CLASSES": ("road", "sky"),
    }
    path = tmp_path / "c.pth"
    torch.save({"meta": meta, "state_dict": torch.nn.BatchNorm1d(3).state_dict()}, path)
    content = unpickle.load_torch(path)
    assert content["meta"]["CLASSES"] == ("road", "sky")
    assert isinstance(content["meta"]["numpy"], unpickle.Inert)
    assert torch.equal(content["meta"]["parameter"], torch.ones(2))
    assert set(read_tensors(path)) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_all_types_and_layouts(dtype: torch.dtype, tmp_path: Path) -> None:
    base = (torch.arange(24) % 2).to(dtype).view(4, 6)
    tensors = {"whole": base, "view": base[1:3, ::2], "turned": base.T, "scalar": base[1, 1], "empty": base[:0]}
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        read = read_tensors(path)
        for name, tensor in tensors.items():
            assert read[name].dtype == dtype and torch.equal(read[name], tensor), name


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"w": torch.ones(100)}, path)
    before = path.read_bytes()
    read_tensors(path)["w"].zero_()
    assert path.read_bytes() == before, "the tensors are mapped from the file: writing to them must stay private"


def test_a_tensor_outside_of_its_storage_is_refused() -> None:
    storage = torch.arange(6.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    assert torch.equal(unpickle._tensor(typed, 2, (2, 2), (2, 1)), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    for offset, size, stride in [(3, (2, 2), (2, 1)), (0, (7,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,))]:
        with pytest.raises(pickle.UnpicklingError, match="outside"):
            unpickle._tensor(typed, offset, size, stride)


def test_the_allowed_functions_cannot_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    function = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    attribute = function + b"}" + text("x") + b"K\x01sb."  # function.__dict__["x"] = 1
    slot = function + b"N}" + text("__defaults__") + b"Ns\x86b."  # setattr(function, "__defaults__", None)
    for data in (attribute, slot):
        write_zip(path, data)
        with pytest.raises(UserError, match="tries to change a function"):
            read_tensors(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ is not None and not torch._utils._rebuild_tensor_v2.__dict__


def test_a_source_reference_cannot_make_torch_write_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's older reader compares a module's source with the file's and may write the difference where told."""
    monkeypatch.chdir(tmp_path)

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("module", unpickle.Inert, "x.py", "other source") if obj == "here" else None

    stream = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(header, stream, protocol=2)
    Writer(stream, protocol=2).dump({"state_dict": "here"})
    Path("c.pth").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="something else than a storage"):
        read_tensors("c.pth")
    assert os.listdir() == ["c.pth"]


def test_archives_with_readers_of_their_own_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    write_zip(path, b"\x80\x02}.", **{"constants.pkl": b"\x80\x02).", "code/x.py": b""})
    with pytest.raises(UserError, match="TorchScript"):
        read_tensors(path)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("\udc80\x02storages")
        archive.addfile(member)
    assert path.read_bytes()[:2] == unpickle.PICKLE_MAGIC
    with pytest.raises(UserError, match="tar archive"):
        read_tensors(path)
