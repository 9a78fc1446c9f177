"""Time limits: a command ends with all its processes, signals end the call, a budget is shared out."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import limits


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    """Whether it runs; a zombie, which nobody in a container may collect, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(file: Path) -> bool:
    pid, deadline = int(file.read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def child_that_survives(file: Path, then: str) -> list[str]:
    """Forks a process that ignores SIGTERM and writes its id; goes on with `then`."""
    return python(
        f"import os, pathlib, signal, time\nif os.fork() == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"    pathlib.Path({str(file)!r} + '.part').write_text(str(os.getpid()))\n"
        f"    os.rename({str(file)!r} + '.part', {str(file)!r})\n    time.sleep(100)\n    os._exit(0)\n"
        f"while not os.path.exists({str(file)!r}): time.sleep(0.01)\n{then}"
    )


def test_exit_codes_and_time(tmp_path):
    ended = limits.run_within(python("raise SystemExit(7)"), 60, tmp_path, os.environ)
    assert ended.code == 7 and 0 < ended.seconds < 60
    with pytest.raises(OSError):
        limits.run_within([str(tmp_path / "absent")], 60, tmp_path, os.environ)


@pytest.mark.parametrize("then", ["raise SystemExit(3)", "time.sleep(100)"])
def test_no_process_of_the_group_survives(then, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GRACE_S", 0.2)
    file = tmp_path / "pid"
    ended = limits.run_within(child_that_survives(file, then), 60 if "3" in then else 3, tmp_path, os.environ)
    assert ended.code == (3 if "3" in then else None)
    assert gone(file)


def test_sigterm_comes_first_and_sigkill_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GRACE_S", 20.0)
    polite = (
        "import signal, sys, time\ndef end(*_):\n    open('said', 'w').write('bye')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\ntime.sleep(100)"
    )
    ended = limits.run_within(python(polite), 3, tmp_path, os.environ)
    assert ended.code is None and ended.seconds < 20 and (tmp_path / "said").read_text() == "bye"
    monkeypatch.setattr(limits, "GRACE_S", 0.3)
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)"
    ended = limits.run_within(python(deaf), 2, tmp_path, os.environ)
    assert ended.code is None and ended.seconds < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_group_and_the_call(number, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GRACE_S", 0.2)
    file = tmp_path / "pid"

    def send() -> None:
        while not file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    before = signal.getsignal(number)
    with pytest.raises(limits.Stopped, match=signal.Signals(number).name), limits.stoppable():
        sender.start()
        limits.run_within(child_that_survives(file, "time.sleep(100)"), 100, tmp_path, os.environ)
    sender.join()
    assert gone(file) and signal.getsignal(number) is before


def test_a_budget_is_shared_by_parts_and_what_is_not_used_goes_on():
    now = [100.0]
    budget = limits.Budget(60, lambda: now[0])
    assert budget.share(10, [20, 30]) == pytest.approx(10)
    now[0] += 1  # nine seconds were not used: they go to both
    assert budget.share(20, [30]) == pytest.approx(20 + 9 * 20 / 50)
    now[0] += 33
    assert budget.share(30, []) == pytest.approx(26) == budget.left
    now[0] += 100
    assert budget.left == 0 == budget.share(1, [])


def test_no_case_is_begun_that_would_end_late():
    now = [0.0]
    limit = limits.CaseLimit(10, lambda: now[0])
    asked = []
    for seconds in (1, 4, 2, 3):
        asked.append(limit.another())
        now[0] += seconds
    # 1 -> 1 + 1; 5 -> 5 + 4; 7 + 4 is too late
    assert asked == [True, True, True, False]
    assert limits.CaseLimit(0, lambda: now[0]).another()  # the first case is begun in any case


def test_stoppable_leaves_other_threads_alone():
    found = []

    def body() -> None:
        with limits.stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


CALL = """
import sys
from bench import gpu
step = lambda name, code: gpu.Step(name, name, 10, lambda s: [sys.executable, "-c", code], list)
long = "import time; print('begun', flush=True); time.sleep(100)"
sys.exit(gpu.main([], [step("first", "pass"), step("long", long), step("last", "")]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_tables_are_printed_after_a_signal_too(number):
    process = subprocess.Popen([sys.executable, "-c", CALL], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "begun\n":
            process.send_signal(number)
    assert process.wait(60) == 130
    text = "".join(lines)
    table = text[text.rindex("\nstep") :].split()
    assert table[table.index("first") + 1] == "passed" and table[table.index("long") + 1] == "cut"
    assert (
        "last" not in table and "nothing was measured" in text and f"stopped by {signal.Signals(number).name}" in text
    )
