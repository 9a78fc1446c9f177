"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder `step-<n>` of the tensors as torch.distributed.checkpoint (DCP) writes them, `manifest.json`
(every file's size and sha256, the step, the config, the plain values of the state) and `manifest.sha256` over that.
It is written as `.tmp-<n>`, synced to disk and renamed, so a folder with its real name is whole or damaged later; DCP
itself would load a flipped bit silently. In a run of several ranks every rank calls, and the folder is shared.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ssr_fast.engine.state import OPTIONAL, config_hash, merge_values, split
from ssr_fast.errors import UserError

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
FORMAT = 1
_BLOCK = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What `CheckpointStore.load` found beside the state."""

    step: int
    """The step at which the checkpoint was saved."""
    world_size: int
    """Number of ranks that saved it."""
    config: dict[str, Any]
    """The resolved config of the run that saved it; `state.compare` shows what changed."""
    meta: dict[str, Any]
    """What that run gave as `meta`."""
    missing: tuple[str, ...]
    """Optional tensors (random generators) and plain values that it does not have; those were left alone."""


class CheckpointStore:
    """The checkpoints of one run directory.

    Opening it removes what a killed process left unfinished, so one run at a time may have it open.

    Args:
        folder: where the `step-<n>` folders stand; made if it is missing.
        keep: number of the newest checkpoints that are kept, beside the one with the best score.
        background: `save` copies the state to host memory and returns; a thread writes it. Errors show at the next
            `save` or `wait`.
        report: gets one line for each thing that the user should know, such as a damaged checkpoint.

    Raises:
        UserError: the folder cannot be made or written.
        ValueError: `keep` is smaller than 1.
    """

    def __init__(
        self, folder: Path, keep: int = 2, *, background: bool = False, report: Callable[[str], None] = print
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self._keep = keep
        self._report = report
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if distributed else 0
        self._world_size = dist.get_world_size() if distributed else 1
        if self._rank == 0:
            self._open()
        # DCP's collectives carry Python objects; a CPU group keeps them off the training's own communicator
        self._group = dist.new_group(backend="gloo") if distributed else None
        self._executor = ThreadPoolExecutor(max_workers=1) if background else None
        self._pending: Future[None] | None = None
        self._verified: Path | None = None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        config: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Saves the state as `step-<step>`; an older checkpoint of that step is replaced when the new one is whole.

        Checkpoints of later steps are removed: they belong to a continuation that this run does not follow.

        Args:
            step: number of steps done.
            state: nested dict of tensors and JSON values; what differs between ranks stands under "rng.<rank>".
            config: the run's resolved config.
            meta: JSON values that `load` hands back.
            score: the higher the better (target mIoU); the best checkpoint is kept.

        Raises:
            UserError: it could not be written (disk full, folder gone); the earlier checkpoints are as they were.
        """
        self.wait()
        tensors, values = split(state)
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self._world_size,
            "score": score if score is not None and math.isfinite(score) else None,
            "config_hash": config_hash(config or {}),
            "config": json.loads(json.dumps(config or {}, default=str)),
            "meta": json.loads(json.dumps(meta or {})),
            "values": json.loads(json.dumps(values)),
        }
        if self._executor is None:
            self._write(step, tensors, manifest)
            return
        # importing DCP takes seconds, and who only asks for an option's help need not wait for it
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged: Any = stager.stage(tensors)
        self._pending = self._executor.submit(self._write, step, staged, manifest)

    def wait(self) -> None:
        """Waits for a save in the background and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None; each one skipped is reported in a line with the reason."""
        self.wait()
        return self._on_first_rank(self._find_latest)

    def best(self) -> Path | None:
        """The checkpoint with the highest score, the newer of two equals, or None where none has a score."""
        self.wait()
        return self._on_first_rank(lambda: _best(_steps(self.folder)))

    def load(self, path: Path, state: dict[str, Any], optional: Sequence[str] = OPTIONAL) -> Restored:
        """Loads a checkpoint into `state` in place: tensors are copied into, values are replaced.

        Args:
            path: a `step-<n>` folder, wherever it stands.
            state: the same tree that was saved; `state` is untouched where the checkpoint does not fit.
            optional: dotted prefixes of what may be missing on either side.

        Raises:
            UserError: the folder is damaged or holds another model's state.
        """
        self.wait()
        # the first rank alone knows what `latest` has read already
        reason = self._on_first_rank(lambda: None if path == self._verified else verify(path))
        if reason is not None:
            raise UserError(
                f"the checkpoint {path} cannot be used: {reason}; resume from another step-<n> folder beside it"
            )
        manifest = _read_manifest(path)
        from ssr_fast.engine.dcp_files import load_tensors, misfit, saved_tensors

        tensors, _ = split(state)
        saved = saved_tensors(path)
        problem = misfit(tensors, saved, optional)
        if problem is not None:
            raise UserError(
                f"the checkpoint {path} is of another model or method: {problem}; "
                "resume with the options of the run that saved it, or start in a new run directory"
            )
        found = {name: tensor for name, tensor in tensors.items() if name in saved}
        load_tensors(path, found, self._group)
        absent = merge_values(state, manifest["values"])
        return Restored(
            step=manifest["step"],
            world_size=manifest["world_size"],
            config=manifest["config"],
            meta=manifest["meta"],
            missing=tuple([name for name in tensors if name not in found] + absent),
        )

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError("it is not writable")
            for entry in sorted(self.folder.iterdir()):
                if entry.name.startswith(".tmp-"):
                    shutil.rmtree(entry)
                elif entry.name.startswith(".old-"):
                    _settle_replaced(entry)
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be kept in {self.folder}: {error.strerror or error}; "
                "give a run directory that can be written (--run.dir)"
            ) from error

    def _write(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        from ssr_fast.engine.dcp_files import save_tensors

        temporary = self.folder / f".tmp-{step}"
        try:
            self._on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
            save_tensors(temporary, tensors, self._group)
            self._on_first_rank(lambda: self._publish(temporary, step, manifest))
        except OSError as error:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error.strerror or error}; "
                "the earlier checkpoints are whole: make room or repair the folder, then continue with --resume"
            ) from error

    def _publish(self, temporary: Path, step: int, manifest: dict[str, Any]) -> None:
        """Seals the files, gives the folder its name and removes what is no longer kept."""
        files = {
            entry.name: {"size": entry.stat().st_size, "sha256": _sha256(entry)}
            for entry in sorted(temporary.iterdir())
        }
        text = json.dumps({**manifest, "files": files}, indent=1).encode()
        _write_synced(temporary / MANIFEST, text)
        _write_synced(temporary / DIGEST, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode())
        _sync_folder(temporary)
        final = self.folder / f"step-{step}"
        replaced = self.folder / f".old-{step}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        _sync_folder(self.folder)
        self._verified = None
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)

    def _prune(self, step: int) -> None:
        entries = _steps(self.folder)
        current = {n: path for n, path in entries.items() if n <= step}
        stale = [n for n in entries if n > step]
        if stale:
            self._report(f"removing the checkpoints of later steps, which this run does not continue: {stale}")
        kept = set(sorted(current)[-self._keep :])
        best = _best(current)
        for n, path in entries.items():
            if n not in kept and path != best:
                # renamed first: a removal that is cut short must not leave half a checkpoint under a real name
                doomed = self.folder / f".tmp-{n}"
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _find_latest(self) -> Path | None:
        for _, path in sorted(_steps(self.folder).items(), reverse=True):
            reason = verify(path)
            if reason is None:
                self._verified = path
                return path
            self._report(f"skipping the checkpoint {path}: {reason}")
        return None

    def _on_first_rank(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and gives its result, or raises its error, on every rank."""
        if self._group is None:
            return action()
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def verify(path: Path) -> str | None:
    """Reads a whole checkpoint and says why it cannot be used, or None where every byte is as it was written."""
    try:
        text = (path / MANIFEST).read_bytes()
        digest = (path / DIGEST).read_bytes()
        if digest != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
            return f"{MANIFEST} does not match {DIGEST}"
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads format {FORMAT}"
        for name, wanted in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if _sha256(path / name) != wanted["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if path.is_dir() else "there is no such folder"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    return manifest


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step."""
    matches = ((re.fullmatch(r"step-(\d+)", entry.name), entry) for entry in folder.iterdir())
    return {int(match[1]): entry for match, entry in matches if match}


def _best(steps: dict[int, Path]) -> Path | None:
    scores: list[tuple[float, int]] = []
    for step, path in steps.items():
        try:
            score = _read_manifest(path).get("score")
        except (OSError, ValueError):
            continue  # damaged: `latest` says so when it matters
        if score is not None:
            scores.append((score, step))
    return steps[max(scores)[1]] if scores else None


def _settle_replaced(entry: Path) -> None:
    """A save was cut short while it replaced a checkpoint: the old one comes back unless the new one is there."""
    final = entry.with_name(entry.name.replace(".old-", "step-", 1))
    if final.exists():
        shutil.rmtree(entry)
    else:
        os.rename(entry, final)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
