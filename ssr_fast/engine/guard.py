"""A stop signal that is handled between steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context manager in which SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) only leave a note in `requested`.

    A second SIGINT raises KeyboardInterrupt: the user does not want to wait. The former handlers come back at the end.
    Python lets only the main thread handle signals; in another one nothing is installed, and `report` is told so.
    """

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self.requested: str | None = None
        """Name of the first signal received, such as "SIGTERM", or None."""
        self._report = report
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            self._report("signals cannot be handled outside of the main thread: a stop will not save a checkpoint")
            return self
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # None is a handler that was not installed from Python, and that Python cannot install again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number).name
