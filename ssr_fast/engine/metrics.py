"""The numbers of a run: summed on the device, read once a window, written as JSON lines and for TensorBoard."""

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssr_fast.engine.ranks import Ranks
from ssr_fast.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
IMAGES = "images"
WAITED = "waited"
_WINDOW = 64  # most names that are averaged
_SUMMED = (IMAGES, WAITED)  # over the clock's time; they have no column of their own


class MetricLog:
    """The metrics of one stage, appended to `metrics.jsonl` and to `tensorboard/<stage>` in the run directory.

    A window ends at every step that is a multiple of `window`, wherever the run was resumed; then, and only then, the
    device is read, once. What is not finite is written as null.

    Args:
        run_dir: the run directory.
        stage: name of the training stage, in every row.
        window: steps in one row.
        report: gets one line when rows had to be dropped.
        file: name of the file; stages that are trained at the same time have one each.
        ranks: the processes that train together. Rows hold the means over them, images of all, and the waiting of the
            one that waited longest; rank 0 writes them. The methods that take in or give numbers need every rank.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        window: int,
        report: Callable[[str], None] = print,
        file: str = FILE,
        ranks: Ranks | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._path = run_dir / file
        self._board_folder = run_dir / "tensorboard" / stage
        self._stage, self._window, self._report = stage, window, report
        self._ranks = ranks or Ranks()
        self._stream: Any = None
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._names: tuple[str, ...] | None = None
        self._means: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0
        self._images = self._waited = 0.0
        self._clock = time.perf_counter()

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> dict[str, Any] | None:
        """Takes in one step's numbers; at the end of a window writes a row.

        Args:
            step: number of steps done, this one included.
            values: scalars by name, the same names each step. Floating-point tensors are averaged over the window; of
                integer tensors (counters) and Python numbers (the learning rate) the last is written. "images" is the
                number of images in this step, which becomes "images_per_second"; "waited" the seconds for which it
                waited for its batch, which become "data_share", 0 to 1 of the same time.

        Returns:
            the row written, with None for what is not finite, or None inside a window.

        Raises:
            ValueError: the names differ from those of the step before.
            UserError: the row cannot be written.
        """
        self._check_names(values)
        if len(self._means) > _WINDOW:
            raise ValueError(f"{len(self._means)} metrics are averaged, and there is room for {_WINDOW}")
        if self._means:
            stacked = torch.stack([_scalar(values[name]) for name in self._means])
            if self._sums is None:
                self._sums = torch.zeros_like(stacked)
            self._sums = self._sums.to(stacked.device).add_(stacked)
        self._count += 1
        self._images += float(values.get(IMAGES, 0))
        self._waited += float(values.get(WAITED, 0))
        if step % self._window:
            return None
        row = {"stage": self._stage, "step": step, "time": time.time(), **self._read(values)}
        seconds = time.perf_counter() - self._clock
        if IMAGES in values:
            images = self._images * self._ranks.world
            row["images_per_second"] = _finite(images / seconds) if images else None
        if WAITED in values:
            row["data_share"] = _finite(self._longest_wait() / seconds)
        if self._sums is not None:
            self._sums.zero_()
        self._count = 0
        self._write(row)
        self.restart_clock()
        return row

    def evaluation(self, step: int, miou: float, per_class: Mapping[str, float]) -> None:
        """Writes a row with "eval/miou" and "eval/per_class" (percent); its own time does not count as training.

        Raises:
            UserError: the row cannot be written.
        """
        scores = {name: _finite(value) for name, value in per_class.items()}
        self._write(
            {
                "stage": self._stage,
                "step": step,
                "time": time.time(),
                "eval/miou": _finite(miou),
                "eval/per_class": scores,
            }
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measures images per second and the share of waiting from here, after a pause in training."""
        self._images = self._waited = 0.0
        self._clock = time.perf_counter()

    def truncate(self, step: int) -> None:
        """Drops this stage's rows after `step`, which a killed run wrote beyond its last checkpoint.

        Rows of other stages stay; a torn line, which a kill can leave at the end, goes, and is reported.
        """
        if not self._ranks.first:
            return
        self.close()
        self._purge_step = step + 1
        if not self._path.exists():
            return
        kept, damaged = [], 0
        for line in self._path.read_bytes().splitlines():
            row = _parse(line)
            if row is None:
                damaged += 1
            elif row.get("stage") != self._stage or (row.get("step") or 0) <= step:
                kept.append(line + b"\n")
        if damaged:
            self._report(f"{self._path}: dropped {damaged} unreadable line{'s' if damaged > 1 else ''}")
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self._path)
        except OSError as error:
            raise self._unwritable(error) from error

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window as JSON values, exact to the bit; reads the device once. Means over the ranks."""
        sums = [] if self._sums is None else self._over_ranks(self._sums).tolist()
        names = {"means": list(self._means), "sums": [value.hex() for value in sums], "count": self._count}
        return {**names, "world": self._ranks.world}

    def window(self) -> Tensor:
        """This rank's own sums in the unfinished window, float64 [64], unused ones 0: for a resume that is exact."""
        sums = torch.zeros(_WINDOW, dtype=torch.float64)
        if self._sums is not None:
            sums[: len(self._sums)] = self._sums.cpu()
        return sums

    def load_state_dict(self, state: Mapping[str, Any], window: Tensor | None = None) -> None:
        """Continues the window of `state_dict`; the sums move to the device with the next step.

        Args:
            window: this rank's own sums of then, taken in place of the means over the ranks if there are any (not all
                0), and as many ranks as now: fewer would leave some of them out.
        """
        self._means = tuple(state["means"])
        sums = [float.fromhex(text) for text in state["sums"]]
        if window is not None and window.any() and state.get("world") == self._ranks.world:
            sums = window[: len(sums)].tolist()
        self._sums = torch.tensor(sums, dtype=torch.float64) if sums else None
        self._count = state["count"]
        self._names = None
        self.restart_clock()

    def copy_to(self, other: "MetricLog", without: Collection[str]) -> None:
        """Gives another stage's log this one's rows and unfinished window, less the metrics named in `without`.

        Raises:
            UserError: a row cannot be written.
        """
        other.truncate(0)
        for row in map(_parse, self._path.read_bytes().splitlines() if self._path.exists() else ()):
            if row is not None and row.get("stage") == self._stage:
                kept = {name: value for name, value in row.items() if name not in without}
                other._write(kept | {"stage": other._stage})
        columns = [column for column, name in enumerate(self._means) if name not in without]
        other._means = tuple(self._means[column] for column in columns)
        other._sums = None if self._sums is None else self._sums[columns]
        other._count = self._count

    def close(self) -> None:
        """Closes the files; a later row opens them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _check_names(self, values: Mapping[str, Tensor | float]) -> None:
        if self._names is None:
            means = tuple(name for name, value in values.items() if _is_averaged(value))
            if self._count and set(means) != set(self._means):
                raise ValueError(f"the resumed window averages {sorted(self._means)}, this run {sorted(means)}")
            self._names = tuple(values)
            self._means = self._means if self._count else means
            self._sums = self._sums if self._count else None
        elif values.keys() != set(self._names):
            changed = sorted(values.keys() ^ set(self._names))
            raise ValueError(f"the metrics changed within a run: {', '.join(changed)} came or went")

    def _read(self, values: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """The window's means and the last values, with one read of the device."""
        assert self._names is not None
        counters = [name for name in self._names if name not in self._means and isinstance(values[name], Tensor)]
        last = [_scalar(values[name]) for name in counters]
        parts = ([self._over_ranks(self._sums)] if self._sums is not None else []) + (
            [torch.stack(last)] if last else []
        )
        numbers = torch.cat(parts).tolist() if parts else []
        means = [number / self._count for number in numbers[: len(self._means)]]
        found: dict[str, Any] = dict(zip(self._means, means, strict=True))
        found.update(zip(counters, map(int, numbers[len(self._means) :]), strict=True))
        found.update({name: value for name, value in values.items() if name not in found and name not in _SUMMED})
        return {name: _finite(found[name]) for name in self._names if name not in _SUMMED}

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Their means over the ranks."""
        if self._ranks.world == 1:
            return sums
        means = sums.clone()
        self._ranks.mean_(means)
        return means

    def _longest_wait(self) -> float:
        if self._ranks.world == 1:
            return self._waited
        device = self._sums.device if self._sums is not None else None
        longest = torch.tensor(self._waited, dtype=torch.float64, device=device)
        self._ranks.max_(longest)
        return float(longest)

    def _write(self, row: dict[str, Any]) -> None:
        if not self._ranks.first:
            return
        try:
            if self._stream is None:
                self._open()
            self._stream.write(json.dumps(row, allow_nan=False) + "\n")
            self._to_board(row)
        except OSError as error:
            raise self._unwritable(error) from error

    def _open(self) -> None:
        """Opens for appending, behind the last whole line."""
        if self._path.exists():
            content = self._path.read_bytes()
            if content and not content.endswith(b"\n"):
                self._report(f"{self._path}: dropped a torn last line")
                with self._path.open("r+b") as stream:
                    stream.truncate(content.rfind(b"\n") + 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)

    def _to_board(self, row: Mapping[str, Any]) -> None:
        if self._board is None:
            # importing TensorBoard takes seconds, and who only reads the rows need not wait for it
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._board_folder), purge_step=self._purge_step)
        for name, value in row.items():
            if name in ("stage", "step", "time") or value is None:
                continue
            scalars = (
                {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            )
            for tag, scalar in scalars.items():
                if scalar is not None:
                    self._board.add_scalar(tag, scalar, row["step"])

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} cannot be written: {error.strerror or error}; "
            "make room or repair the run directory (--run.dir), then continue with --resume"
        )


def _is_averaged(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _scalar(value: Tensor | float) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().to(torch.float64).reshape(())


def _finite(value: Any) -> Any:
    """A number, or None where JSON has none for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
