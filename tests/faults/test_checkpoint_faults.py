"""What a disk, a kill and a user can do to checkpoints."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from ssr_fast.engine import checkpoint
from ssr_fast.engine.checkpoint import CheckpointStore, verify
from ssr_fast.errors import UserError

FILES = ("__0_0.distcp", ".metadata", "manifest.json", "manifest.sha256")


def _state(value: float) -> dict[str, Any]:
    return {
        "net": {"weight": torch.full((30, 40), float(value)), "bias": torch.full((), float(value))},
        "step": int(value),
    }


def _two(folder: Path) -> tuple[CheckpointStore, list[str]]:
    told: list[str] = []
    store = CheckpointStore(folder, 5, report=told.append)
    for step in (1, 2):
        store.save(step, _state(step))
    return store, told


def _loaded(store: CheckpointStore, path: Path) -> float:
    """The value of the checkpoint, every element of which must agree."""
    state = _state(0)
    store.load(path, state)
    value = float(state["step"])
    assert state["net"]["weight"].eq(value).all() and state["net"]["bias"].eq(value).all()
    return value


def _sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("bit", [0, 5])
@pytest.mark.parametrize("where", [0.0, 0.37, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str, where: float, bit: int) -> None:
    store, told = _two(tmp_path)
    path = tmp_path / "step-2" / name
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    assert store.latest() == tmp_path / "step-1"
    assert len(told) == 1 and "step-2" in told[0] and ("manifest" in told[0] or name in told[0])
    assert _loaded(store, tmp_path / "step-1") == 1
    with pytest.raises(UserError) as error:
        store.load(tmp_path / "step-2", _state(0))
    _sentence(error, "step-2", "resume from another")


def test_every_single_byte_of_the_manifest_matters(tmp_path: Path) -> None:
    _two(tmp_path)
    for name in ("manifest.json", "manifest.sha256"):
        path = tmp_path / "step-2" / name
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x20]) + whole[position + 1 :])
            assert verify(tmp_path / "step-2") is not None, (name, position)
        path.write_bytes(whole)
    assert verify(tmp_path / "step-2") is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_or_long_file_is_found(tmp_path: Path, name: str) -> None:
    store, told = _two(tmp_path)
    path = tmp_path / "step-2" / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        assert store.latest() == tmp_path / "step-1"
    path.unlink()
    assert store.latest() == tmp_path / "step-1"
    assert len(told) == 4 and f"{name} is missing" in told[-1]


def test_nothing_whole_is_none_and_every_skip_is_said(tmp_path: Path) -> None:
    store, told = _two(tmp_path)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step}")
        (tmp_path / f"step-{step}").mkdir()
    assert store.latest() is None
    assert len(told) == 2 and "step-2" in told[0] and "step-1" in told[1]


def test_a_damaged_future_does_not_push_out_the_new_checkpoint(tmp_path: Path) -> None:
    told: list[str] = []
    store = CheckpointStore(tmp_path, 1, report=told.append)
    store.save(5, _state(5))
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-10")
    (tmp_path / "step-10" / "__0_0.distcp").write_bytes(b"")
    assert store.latest() == tmp_path / "step-5"
    store.save(7, _state(7))
    assert store.latest() == tmp_path / "step-7" and _loaded(store, tmp_path / "step-7") == 7


def _in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_at(event_number: int, folder: Path, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, killed at its n-th call that changes or opens something in the folder."""

    def doomed() -> None:
        left = [event_number]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and str(folder) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return doomed


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path: Path, step: int) -> None:
    """Step 3 is new and pushes step 1 out; step 2 replaces the newest checkpoint by another value."""
    killed = 0
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        store = CheckpointStore(folder, 2, report=lambda line: None)
        for old in (1, 2):
            store.save(old, _state(old))
        code = _in_child(_die_at(moment, folder, lambda store=store: store.save(step, _state(step + 40))))
        told: list[str] = []
        again = CheckpointStore(folder, 2, report=told.append)
        path = again.latest()
        assert path is not None and told == [], (moment, told)
        assert _loaded(again, path) in (2, step + 40), moment
        assert not [name for name in os.listdir(folder) if name.startswith(".")], moment
        again.save(4, _state(4))
        assert again.latest() == folder / "step-4"
        shutil.rmtree(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed >= 12, "the save was killed at too few moments to say anything"


_SAVER = """
import sys, torch
from pathlib import Path
from ssr_fast.engine.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), 2)
for step in range(1, 10000):
    store.save(step, {"x": torch.full((300_000,), float(step)), "step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_from_outside_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for pause in (0.0, 0.004, 0.011):
        folder = tmp_path / str(pause)
        with subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(folder)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        ) as process:
            assert process.stdout is not None
            done = [int(process.stdout.readline()) for _ in range(3)][-1]
            time.sleep(pause)
            process.kill()
        told: list[str] = []
        store = CheckpointStore(folder, 2, report=told.append)
        path = store.latest()
        assert path is not None and told == [] and int(path.name[5:]) >= done
        state: dict[str, Any] = {"x": torch.zeros(300_000), "step": 0}
        store.load(path, state)
        assert state["x"].eq(state["step"]).all() and path.name == f"step-{state['step']}"


def test_a_file_limit_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    store, _ = _two(tmp_path)
    said = tmp_path.with_name(tmp_path.name + "-said")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            store.save(3, {"x": torch.zeros(100_000)})
        except UserError as error:
            said.write_text(str(error))

    assert _in_child(work) == 0
    assert "File too large" in said.read_text() and "step 3" in said.read_text()
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    assert store.latest() == tmp_path / "step-2" and _loaded(store, tmp_path / "step-2") == 2


@contextlib.contextmanager
def _tiny_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with _tiny_disk(folder):
        store, _ = _two(folder)
        with pytest.raises(UserError) as error:
            store.save(3, {"x": torch.zeros(200_000)})
        _sentence(error, "step 3", str(folder), "No space left on device", "--resume")
        assert sorted(os.listdir(folder)) == ["step-1", "step-2"]
        store.save(4, _state(4))
        assert store.latest() == folder / "step-4"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("replaced", [2, 3])
def test_a_failing_call_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, replaced: int, background: bool
) -> None:
    _two(tmp_path)
    store = CheckpointStore(tmp_path, 5, background=background)
    real = getattr(os, call)

    def failing(*arguments: Any) -> Any:
        # of the renames, the one that publishes: for a step that exists, its old folder has been moved by then
        if call == "fsync" or ".tmp-" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(checkpoint.os, call, failing)
    with pytest.raises(UserError) as error:
        store.save(replaced, _state(9))
        store.wait()
    _sentence(error, f"step {replaced}", "No space left on device")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    assert store.latest() == tmp_path / "step-2" and _loaded(store, tmp_path / "step-2") == 2


def test_an_error_in_the_background_shows_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 5, background=True)

    def failing(descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint.os, "fsync", failing)
    store.save(1, _state(1))
    with pytest.raises(UserError, match="step 1 could not be written .*Input/output error"):
        store.save(2, _state(2))
    monkeypatch.undo()
    store.save(2, _state(2))
    assert store.latest() == tmp_path / "step-2"


def test_an_interrupt_during_a_save_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = _two(tmp_path)

    def interrupted(descriptor: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(3, _state(3))
    monkeypatch.undo()
    assert CheckpointStore(tmp_path, 5).latest() == tmp_path / "step-2"


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(UserError) as error:
            CheckpointStore(folder)
        _sentence(error, str(folder), "--run.dir")


def test_a_folder_that_turns_into_a_file_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store, _ = _two(folder)
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(UserError) as error:
        store.save(3, _state(3))
    _sentence(error, "step 3", "Not a directory")


def test_another_models_checkpoint_names_the_first_tensor(tmp_path: Path) -> None:
    store, _ = _two(tmp_path)
    cases: list[tuple[dict[str, Tensor], list[str]]] = [
        ({"weight": torch.ones(19, 40), "bias": torch.ones(())}, ["net.weight", "[30, 40]", "[19, 40]"]),
        ({"weight": torch.ones(19, 40), "bias": torch.ones(2)}, ["net.weight", "and 1 more such tensor)"]),
        ({"weight": torch.ones(40, 30), "bias": torch.ones(())}, ["net.weight", "[30, 40]", "[40, 30]"]),
        ({"weight": torch.ones(30, 40).half(), "bias": torch.ones(())}, ["net.weight", "float32", "float16"]),
        ({"weight": torch.ones(30, 40)}, ["holds net.bias", "[]"]),
        (
            {"weight": torch.ones(30, 40), "bias": torch.ones(()), "gate": torch.ones(3)},
            ["lacks net.gate", "[3]"],
        ),
    ]
    for net, parts in cases:
        with pytest.raises(UserError) as error:
            store.load(tmp_path / "step-2", {"net": net, "step": 0})
        _sentence(error, "another model", "step-2", *parts)
        assert all(tensor.eq(1).all() for tensor in net.values()), "a checkpoint that does not fit was loaded in part"


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /nonexistent/attacked",)


def test_a_forged_index_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = _two(tmp_path)
    ran: list[str] = []
    forged = pickle.dumps(_Attack())
    assert b"system" in forged
    monkeypatch.setattr(os, "system", ran.append)
    index = tmp_path / "step-2" / ".metadata"
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)  # whoever forges the index forges the checksums too
    index.write_bytes(forged)
    with pytest.raises(UserError) as error:
        store.load(tmp_path / "step-2", _state(0))
    _sentence(error, "step-2", "system")
    assert ran == []


def test_the_manifest_tells_a_person_what_is_inside(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(2, _state(2), config={"optim": {"lr": 0.1}}, meta={"stage": "ssr"}, score=51.5)
    manifest = json.loads((tmp_path / "step-2" / "manifest.json").read_text())
    assert manifest["step"] == 2 and manifest["world_size"] == 1 and manifest["score"] == 51.5
    assert manifest["config"] == {"optim": {"lr": 0.1}} and manifest["meta"] == {"stage": "ssr"}
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata"}
    assert all(entry.keys() == {"size", "sha256"} for entry in manifest["files"].values())
    done = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "step-2", capture_output=True)
    assert done.returncode == 0
