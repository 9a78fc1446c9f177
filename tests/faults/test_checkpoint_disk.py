"""Saving in the background onto a disk that fails: full, read-only, vanished, over quota; and the policies for it."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from ssr_fast.engine import checkpoint, dcp_files
from ssr_fast.engine.checkpoint import CheckpointStore, verify
from ssr_fast.errors import UserError

GOES_ON = "the checkpoint of step {step} could not be written ({reason}): training goes on; {rest}"


def _state(value: float, size: int = 1000) -> dict[str, Any]:
    return {"x": torch.full((size,), float(value)), "step": int(value)}


def _store(folder: Path, on_error: str, background: bool = True) -> tuple[CheckpointStore, list[str]]:
    told: list[str] = []
    return CheckpointStore(folder, 3, background=background, on_error=on_error, report=told.append), told


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_and_the_run_goes_on(disk: Path, background: bool) -> None:
    store, told = _store(disk, "continue", background)
    store.save(1, _state(1))
    store.save(2, _state(2, 100_000))
    store.wait()
    rest = "the last whole checkpoint is step-1"
    assert told == [GOES_ON.format(step=2, reason="No space left on device", rest=rest)]
    assert os.listdir(disk) == ["step-1"] and store.written == 1  # what did not fit gives its room back
    store.save(3, _state(3))
    assert store.latest() == disk / "step-3" and store.written == 3
    with pytest.raises(UserError, match="step 4 could not be written .*No space left on device"):
        store.save(4, _state(4, 100_000), final=True)
    assert len(told) == 1 and sorted(os.listdir(disk)) == ["step-1", "step-3"]


def test_the_last_whole_checkpoint_is_not_one_that_was_cut_short(disk: Path) -> None:
    store, told = _store(disk, "continue")
    for step in (1, 2):
        store.save(step, _state(step))
    store.wait()
    file = disk / "step-2" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    store.save(3, _state(3, 100_000))
    store.wait()
    assert len(told) == 1 and told[0].endswith("the last whole checkpoint is step-1"), told


def test_a_full_disk_stops_the_run_at_the_next_save(disk: Path) -> None:
    store, told = _store(disk, "stop")
    store.save(1, _state(1))
    store.save(2, _state(2, 100_000))
    with pytest.raises(UserError, match="step 2 could not be written .*No space left on device.*--resume"):
        store.save(3, _state(3))
    assert os.listdir(disk) == ["step-1"] and told == []
    store.wait()  # it is said once
    assert store.latest() == disk / "step-1"


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_the_last_save_is_tried_although_the_one_before_it_failed(disk: Path, on_error: str) -> None:
    store, told = _store(disk, on_error)
    store.save(1, _state(1, 100_000))
    store.save(2, _state(2), final=True)
    assert store.written == 2 and verify(disk / "step-2") is None  # without waiting
    rest = "there is no whole checkpoint"
    assert told == [GOES_ON.format(step=1, reason="No space left on device", rest=rest)]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_becomes_read_only(disk: Path, on_error: str) -> None:
    store, told = _store(disk, on_error)
    store.save(1, _state(1))
    store.wait()
    if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
        pytest.skip("this system does not remount read-only, and root ignores permissions")
    store.save(2, _state(2))
    if on_error == "stop":
        with pytest.raises(UserError, match="step 2 could not be written .*Read-only file system"):
            store.wait()
    else:
        store.wait()
        rest = "the last whole checkpoint is step-1"
        assert told == [GOES_ON.format(step=2, reason="Read-only file system", rest=rest)]
    with pytest.raises(UserError, match=r"checkpoints cannot be kept in .* \(--run.dir\)"):
        CheckpointStore(disk)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    store.save(3, _state(3))
    assert store.latest() == disk / "step-3" and sorted(os.listdir(disk)) == ["step-1", "step-3"]


def test_a_vanished_folder_is_not_made_anew(tmp_path: Path) -> None:
    """It may be a disk that is no longer mounted: what is written below its name would fill another one."""
    folder = tmp_path / "mount" / "checkpoints"
    store, told = _store(folder, "continue")
    store.save(1, _state(1))
    store.wait()
    shutil.rmtree(folder.parent)
    store.save(2, _state(2))
    store.wait()
    rest = "there is no whole checkpoint"
    assert told == [GOES_ON.format(step=2, reason="No such file or directory", rest=rest)]
    assert not folder.parent.exists() and store.latest() is None and store.best() is None


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_quota_and_other_errors_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store, told = _store(tmp_path, "continue")
    store.save(1, _state(1))
    store.wait()

    def failing(*arguments: Any, **options: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        store.save(2, _state(2))
        store.wait()
    rest = "the last whole checkpoint is step-1"
    assert told == [GOES_ON.format(step=2, reason=os.strerror(code), rest=rest)]
    assert os.listdir(tmp_path) == ["step-1"]
    store.save(3, _state(3))
    assert store.latest() == tmp_path / "step-3"


def test_what_could_not_be_removed_is_removed_before_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = _store(tmp_path, "continue")
    rmtree = shutil.rmtree

    def failing(path: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            rmtree(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", failing)
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        store.save(1, _state(1))
        store.wait()
    assert os.listdir(tmp_path) == [".tmp-1"]
    room: list[list[str]] = []
    writing = dcp_files.save_tensors
    monkeypatch.setattr(dcp_files, "save_tensors", lambda *a: (room.append(os.listdir(tmp_path)), writing(*a)))
    store.save(2, _state(2))
    store.wait()
    assert room == [[".tmp-2"]] and os.listdir(tmp_path) == ["step-2"]


def test_a_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store = CheckpointStore(tmp_path, 1, background=True, report=told.append)
    store.save(1, _state(1))
    store.wait()
    rename = os.rename

    def stuck(old: Path, new: Path) -> None:
        if Path(old).name == "step-1":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(old, new)

    monkeypatch.setattr(os, "rename", stuck)
    store.save(2, _state(2))
    store.wait()
    assert store.written == 2 and len(told) == 1 and "step-1" in told[0] and "busy" in told[0], told
    assert store.latest() == tmp_path / "step-2"


def test_a_fault_of_the_program_is_raised_whatever_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = _store(tmp_path, "continue")

    def broken(*arguments: Any) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(dcp_files, "save_tensors", broken)
    store.save(1, _state(1))
    with pytest.raises(ZeroDivisionError):
        store.wait()
    with pytest.raises(ValueError, match="on_error"):
        CheckpointStore(tmp_path, on_error="ignore")
    assert told == []


def test_an_interrupted_wait_leaves_the_save_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = _store(tmp_path, "stop")
    store.save(1, _state(1))
    assert store._pending is not None
    future = store._pending[1]

    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    store.save(2, _state(2), final=True)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"] and store.written == 2
