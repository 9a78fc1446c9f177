"""A pytest plugin (`-p bench.record_tests`): what became of each test, in bench/results/<device>/tests.json.

The file is written anew as the tests go on, failures with their text at once: a run that is cut off leaves what it had.
SIGTERM ends the run as Ctrl-C does, with pytest's summary. After a failure that broke the device's context a worker
ends, so that the other tests run in a new one; without workers the whole run ends, and says why.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EVERY_S = 2.0
TEXT = 4000
"""Characters of a failure that are kept, its last ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option --record."""
    group = parser.getgroup("record")
    group.addoption("--record", metavar="FILE", help="instead of bench/results/<device>/tests.json")


def pytest_configure(config: pytest.Config) -> None:
    """Register what records, and in each process that runs tests what watches the device."""
    worker = hasattr(config, "workerinput")
    if not worker:
        config.pluginmanager.register(Recorder(config), "recorder")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    if worker or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(DeviceWatch(worker), "device-watch")


class Recorder:
    """Keeps the outcome of each test and writes it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._rows, self._written = config, dict[str, dict[str, Any]](), 0.0
        self._content: dict[str, Any] = {}
        self._path = Path()
        self._collected: int | None = None

    def pytest_sessionstart(self) -> None:
        """Find out what this runs on, and where the file goes."""
        import torch

        from bench import document
        from bench.harness import Setting

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._content = document.document([], Setting(device), None)
        given = self._config.getoption("record")
        self._path = Path(given) if given else document.default_path("tests", self._content["device"])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without workers the number of tests is known here."""
        self._collected = len(session.items) or self._collected

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """With workers each of them collects."""
        self._collected = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Enter an outcome: of the call, or of what failed or was skipped around it."""
        row = self._rows.get(report.nodeid)
        if report.when != "call" and report.passed:
            return
        if row is not None and row["outcome"] in ("failed", "error"):
            return  # the first failure of a test is its cause
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        row = {"name": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
        if report.skipped:
            row["reason"] = _reason(report)
        elif report.failed:
            row["text"] = report.longreprtext[-TEXT:]
        self._rows[report.nodeid] = row
        if report.failed:
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            if terminal is not None:
                terminal.write_line(f"\n{outcome.upper()} {report.nodeid}: {_last_line(row['text'])}")
        if report.failed or time.monotonic() - self._written > EVERY_S:
            self._write(complete=False)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """The last time; whole if all tests that were collected have an outcome."""
        if self._content:
            self._write(complete=self._collected is not None and len(self._rows) >= self._collected)

    def _write(self, complete: bool) -> None:
        from bench import document

        rows = list(self._rows.values())
        counts = Counter(row["outcome"] for row in rows)
        reasons = Counter(row["reason"] for row in rows if "reason" in row)
        more = {"collected": self._collected, "counts": dict(counts), "reasons": dict(reasons.most_common())}
        document.write(self._path, {**self._content, "complete": complete, **more, "rows": rows})
        self._written = time.monotonic()


def _reason(report: pytest.TestReport) -> str:
    found = report.longrepr
    return str(found[2] if isinstance(found, tuple) else found).removeprefix("Skipped: ")


def _last_line(text: str) -> str:
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[0][:200] if lines else (text.strip().splitlines() or [""])[-1][:200]


class DeviceWatch:
    """Looks at the device behind each failed test of this process."""

    def __init__(self, worker: bool) -> None:
        self._worker, self._failed = worker, False

    def pytest_runtest_makereport(self, call: "pytest.CallInfo[None]") -> None:
        """Remember that something failed."""
        self._failed |= call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """End this process if its context is broken: every later test would fail for nothing."""
        if not self._failed:
            return
        self._failed = False
        if why := device_problem():
            if self._worker:
                os._exit(1)  # the others take its tests; the failure has been reported
            pytest.exit(f"{nodeid} broke the device's context ({why}): the tests behind it were not run", 1)


def device_problem() -> str:
    """What CUDA says instead of an answer; empty if it answers, or was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return ""
