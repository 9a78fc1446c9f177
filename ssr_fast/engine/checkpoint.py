"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder `step-<n>` of the tensors as torch.distributed.checkpoint (DCP) writes them and a manifest
over them (see manifest.py). It is written as `.tmp-<n>`, synced to disk and renamed, so a folder with its real name is
whole or damaged later; DCP itself would load a flipped bit silently. In a run of several ranks every rank calls, and
the folder is shared.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ssr_fast.engine.manifest import FORMAT, best_of, newest_whole, seal, steps, sync_folder, verify
from ssr_fast.engine.ranks import PATIENCE, Ranks
from ssr_fast.engine.state import OPTIONAL, config_hash, merge_values, split
from ssr_fast.errors import UserError

ON_ERROR = ("stop", "continue")
_ALONE = Ranks()


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


class _NotWritten(Exception):
    """A checkpoint could not be written, for a reason that lies outside of the program; args: the reason."""


class CheckpointStore:
    """The checkpoints of one run directory.

    Opening it removes what a killed process left unfinished, so one run at a time may have it open.

    Args:
        folder: where the `step-<n>` folders stand; made if it is missing. All ranks see the same one.
        keep: number of the newest checkpoints that are kept, beside the one with the best score.
        background: `save` copies the state to host memory and returns; a thread writes it. Errors show at the next
            `save` or `wait`.
        report: gets one line for each thing that the user should know, such as a damaged checkpoint; on rank 0 alone.
        ranks: the processes that train together; each of them makes a store and makes the same calls.
        on_error: when a checkpoint cannot be written: "stop" raises, "continue" reports a line and goes on.

    Raises:
        UserError: the folder cannot be made or written, or a rank does not see it.
        ValueError: `keep` is smaller than 1, or `on_error` unknown.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        background: bool = False,
        report: Callable[[str], None] = print,
        ranks: Ranks = _ALONE,
        on_error: str = "stop",
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self.folder = folder
        self.written: int | None = None
        """The step of the newest checkpoint that this store has written and knows to be on disk."""
        self._keep, self._report, self._ranks, self._on_error = keep, report, ranks, on_error
        ranks.on_first(self._open)
        unseen = _problem_of_any(ranks, None if folder.is_dir() else f"there is no folder {folder}")
        if unseen is not None:
            raise ranks.common(
                UserError(f"{unseen}: give a run directory on a disk that all machines share (--run.dir)")
            )
        # the thread's collectives must not cross those that the main thread makes at the same time
        own = dist.new_group(backend="gloo", timeout=PATIENCE) if background and ranks.world > 1 else ranks.control
        self._writers = dataclasses.replace(ranks, control=own)
        self._executor = ThreadPoolExecutor(max_workers=1) if background else None
        self._pending: tuple[int, Future[list[str]]] | None = None
        self._verified: Path | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        config: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        score: float | None = None,
        final: bool = False,
    ) -> None:
        """Saves the state as `step-<step>`; an older checkpoint of that step is replaced when the new one is whole.

        Checkpoints of later steps are removed: they belong to a continuation that this run does not follow.

        Args:
            step: number of steps done.
            state: nested dict of tensors and JSON values; what differs between ranks is tensors under "rng.<rank>".
            config: the run's resolved config.
            meta: JSON values that `load` hands back.
            score: the higher the better (target mIoU); the best checkpoint is kept.
            final: the last one of the run or before a stop: it is on disk when this returns, and raises if it cannot
                be written, whatever the policy. An earlier one that failed is then only reported.

        Raises:
            UserError: it could not be written (disk full, folder gone) or, with `background`, the one before it; the
                earlier checkpoints are as they were. Raised on every rank.
        """
        self._settle_pending(strict=self._on_error == "stop" and not final)
        tensors, values = split(state)
        plain_config = json.loads(json.dumps(config or {}, default=str))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self._ranks.world,
            "score": score if score is not None and math.isfinite(score) else None,
            "config_hash": config_hash(plain_config),
            "config": plain_config,
            "meta": json.loads(json.dumps(meta or {})),
            "values": json.loads(json.dumps(values)),
        }
        strict = final or self._on_error == "stop"
        if self._executor is None or final:
            self._conclude(step, lambda: self._write(step, tensors, manifest, self._ranks), strict)
            return
        staged: dict[str, Tensor] = {}
        if self._conclude(step, lambda: self._stage(tensors, staged), strict, written=False):
            self._pending = step, self._executor.submit(self._write, step, staged, manifest, self._writers)

    def wait(self) -> None:
        """Waits for a save in the background.

        Raises:
            UserError: it failed, and the policy is "stop".
        """
        self._settle_pending(strict=self._on_error == "stop")

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None; each one skipped is reported in a line with the reason."""
        self.wait()
        return self._ranks.on_first(self._find_latest)

    def best(self) -> Path | None:
        """The checkpoint with the highest score, the newer of two equals, or None where none has a score."""
        self.wait()
        return self._ranks.on_first(lambda: best_of(steps(self.folder)))

    def load(self, path: Path, state: dict[str, Any], optional: Sequence[str] = OPTIONAL) -> Restored:
        """Loads a checkpoint into `state` in place: tensors are copied into, values are replaced.

        The number of ranks may be another one than that which saved it, and sharded tensors may be whole or cut
        otherwise.

        Args:
            path: a `step-<n>` folder, wherever it stands.
            state: the same tree that was saved; `state` is untouched where the checkpoint does not fit.
            optional: dotted prefixes of what may be missing on either side.

        Raises:
            UserError: the folder is damaged or holds another model's state; raised on every rank.
        """
        self.wait()
        # the first rank alone knows what `latest` has read already
        reason = self._ranks.on_first(lambda: None if path == self._verified else verify(path))
        if reason is not None:
            raise self._ranks.common(
                UserError(
                    f"the checkpoint {path} cannot be used: {reason}; resume from another step-<n> folder beside it"
                )
            )
        from ssr_fast.engine.dcp_files import load_tensors, open_checkpoint

        tensors, _ = split(state)
        manifest, found, problem = open_checkpoint(path, tensors, optional)
        problem = _problem_of_any(self._ranks, problem)
        if problem is not None:
            raise self._ranks.common(UserError(problem))
        try:
            load_tensors(path, found, self._ranks.control)
        except OSError as error:
            raise UserError(f"the checkpoint {path} cannot be read ({error.strerror or error}): try again") from error
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
            _settle(self.folder)
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be kept in {self.folder}: {error.strerror or error}; "
                "give a run directory that can be written (--run.dir)"
            ) from error

    def _settle_pending(self, strict: bool) -> None:
        if self._pending is not None:
            step, future = self._pending
            future.exception()  # if the wait is interrupted, the save is still pending
            self._pending = None
            self._conclude(step, future.result, strict)

    def _conclude(self, step: int, outcome: Callable[[], list[str]], strict: bool, written: bool = True) -> bool:
        """Takes the outcome of (a part of) a save, the same on every rank: whether it went well."""
        try:
            with _in_company(self._ranks):
                lines = outcome()
        except _NotWritten as failure:
            if strict:
                raise self._ranks.common(
                    UserError(
                        f"the checkpoint of step {step} could not be written to {self.folder}: {failure}; the earlier "
                        "checkpoints are whole: make room or repair the folder, then continue with --resume"
                    )
                ) from failure
            if self._ranks.first:
                last = newest_whole(self.folder)
                rest = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint"
                self._report(
                    f"the checkpoint of step {step} could not be written ({failure}): training goes on; {rest}"
                )
            return False
        if written:
            self.written = step
        if self._ranks.first:
            for line in lines:
                self._report(line)
        return True

    def _stage(self, tensors: dict[str, Tensor], staged: dict[str, Tensor]) -> list[str]:
        """Copies the tensors to host memory; the copies are complete, for the next step overwrites the tensors."""
        # importing DCP takes seconds, and who only asks for an option's help need not wait for it
        from ssr_fast.engine.dcp_files import host_copies

        problem = None
        try:
            staged.update(host_copies(tensors))
        except (MemoryError, RuntimeError) as error:  # torch's host allocator raises RuntimeError
            problem = f"the state could not be copied to host memory, {' '.join(str(error).split())}"
        problem = _problem_of_any(self._ranks, problem)
        if problem is not None:
            raise _NotWritten(problem)
        return []

    def _write(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any], ranks: Ranks) -> list[str]:
        """Writes and publishes a checkpoint; lines for the user."""
        from ssr_fast.engine.dcp_files import save_tensors

        temporary = self.folder / f".tmp-{step}"
        try:
            ranks.on_first(lambda: _start(temporary))
            save_tensors(temporary, tensors, ranks.control)
            return ranks.on_first(lambda: self._publish(temporary, step, manifest))
        except OSError as error:
            if ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = error.strerror or str(error)
            # what DCP does on all ranks names the rank already, the rest is done by the first one
            named = ranks.world == 1 or reason.startswith("rank ")
            raise _NotWritten(reason if named else f"rank 0: {reason}") from error

    def _publish(self, temporary: Path, step: int, manifest: dict[str, Any]) -> list[str]:
        """Seals the files, gives the folder its name and removes what is no longer kept; lines for the user."""
        if self._ranks.world > 1:
            from ssr_fast.engine.dcp_files import check_complete

            check_complete(temporary)
        seal(temporary, manifest)
        final = self.folder / f"step-{step}"
        replaced = self.folder / f".old-{step}"
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync_folder(self.folder)
        self._verified = None
        shutil.rmtree(replaced, ignore_errors=True)
        return self._prune(step)

    def _prune(self, step: int) -> list[str]:
        entries = steps(self.folder)
        current = {n: path for n, path in entries.items() if n <= step}
        stale = [n for n in entries if n > step]
        lines = []
        if stale:
            lines.append(f"removing the checkpoints of later steps, which this run does not continue: {stale}")
        kept = set(sorted(current)[-self._keep :])
        best = best_of(current)
        for n, path in entries.items():
            if n in kept or path == best:
                continue
            # renamed first: a removal that is cut short must not leave half a checkpoint under a real name
            doomed = self.folder / f".tmp-{n}"
            try:
                os.rename(path, doomed)
            except OSError as error:  # the new one is whole all the same
                lines.append(f"the checkpoint {path}, no longer needed, cannot be removed ({error.strerror or error})")
            shutil.rmtree(doomed, ignore_errors=True)
        return lines

    def _find_latest(self) -> Path | None:
        for _, path in sorted(steps(self.folder).items(), reverse=True):
            reason = verify(path)
            if reason is None:
                self._verified = path
                return path
            self._report(f"skipping the checkpoint {path}: {reason}")
        return None


@contextlib.contextmanager
def _in_company(ranks: Ranks) -> Iterator[None]:
    """Says in a sentence that another rank has died, which gloo tells as a lost connection."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or "gloo" not in str(error):
            raise
        raise UserError(
            f"rank {ranks.rank}: another process of this run has ended, and its own last lines say why; "
            "the checkpoints that were finished are whole: continue with --resume"
        ) from error


def _problem_of_any(ranks: Ranks, problem: str | None) -> str | None:
    """The problem of the first rank that has one, with its number, on every rank: all go on, or none."""
    if ranks.world == 1:
        return problem
    problems: list[str | None] = [None] * ranks.world
    with _in_company(ranks):
        dist.all_gather_object(problems, problem, group=ranks.control)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(problems) if found is not None), None)


def _start(temporary: Path) -> None:
    """An empty folder to write into, and as much room as what earlier saves left unfinished gives back."""
    _settle(temporary.parent)
    temporary.mkdir()  # without its parents: a run directory that was removed is an error, not made anew


def _settle(folder: Path) -> None:
    """Removes what an unfinished save left; where it was replacing a checkpoint, the old one comes back."""
    for entry in sorted(folder.iterdir()):
        final = entry.with_name(entry.name.replace(".old-", "step-", 1))
        if entry.name.startswith(".tmp-") or (entry.name.startswith(".old-") and final.exists()):
            shutil.rmtree(entry)
        elif entry.name.startswith(".old-"):
            os.rename(entry, final)
