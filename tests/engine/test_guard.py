"""The stop signal."""

import os
import signal
import threading

import pytest

from ssr_fast.engine.guard import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_note_and_the_handlers_come_back(number: signal.Signals) -> None:
    former = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == number.name
    assert {n: signal.getsignal(n) for n in former} == former


def test_a_second_interrupt_stops_at_once_and_restores_the_handlers() -> None:
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


def test_another_thread_is_told_that_it_cannot_handle_signals() -> None:
    lines: list[str] = []
    requested: list[str | None] = []

    def work() -> None:
        with StopSignal(lines.append) as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [None] and len(lines) == 1 and "main thread" in lines[0]
