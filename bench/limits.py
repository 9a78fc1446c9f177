"""Time limits: commands that end with all their processes, a budget that steps share, and cases that would end late."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE_S = 5.0
"""Between SIGTERM and SIGKILL."""
DEAD_S = 10.0
"""Wait for a killed process at most so long: one that hangs in a driver does not die."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked for the end of the whole call."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In the body SIGINT, SIGTERM and SIGHUP raise Stopped; outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Exit code; None: it was cut off."""
    seconds: float


def run_within(command: Sequence[str], seconds: float, folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command in a process group of its own, whose processes are all ended behind it.

    Args:
        command: program and arguments.
        seconds: after these the group gets SIGTERM, and GRACE_S later SIGKILL.
        folder: to run in.
        environment: its variables.

    Raises:
        Stopped: a signal came (see stoppable); the group has been ended.
        OSError: the program cannot be started.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=dict(environment), start_new_session=True)
    code = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _terminate(process)
    except BaseException:
        _terminate(process)
        raise
    finally:
        _signal(process.pid, signal.SIGKILL)  # also what a process that has ended left running
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEAD_S)
    return Ended(code, time.perf_counter() - started)


def _terminate(process: "subprocess.Popen[bytes]") -> None:
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, Stopped):  # a second signal ends the patience
        process.wait(GRACE_S)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


class Budget:
    """Time that steps share: each gets its part of what is left, so that later ones get what earlier ones did not use.

    Args:
        seconds: for everything, from now on.
        clock: seconds since some moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - self._clock())

    def share(self, own: float, later: Sequence[float]) -> float:
        """Seconds for a step.

        Args:
            own: its part.
            later: the parts of those behind it.
        """
        return self.left * own / (own + sum(later))


class CaseLimit:
    """Whether the next case may be begun: as long as the longest one so far would end within `seconds`.

    The first case is begun in any case.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._clock, self._longest = seconds, clock, 0.0
        self._started = self._begun = clock()
        self._first = True

    def another(self) -> bool:
        """To be asked before each case."""
        now = self._clock()
        self._longest = max(self._longest, now - self._begun)
        self._begun, first, self._first = now, self._first, False
        return first or now - self._started + self._longest <= self._seconds
