"""What a process and all below it use: CPU seconds and memory, from Linux's /proc."""

import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
_PARENT, _TIMES = 1, slice(11, 15)  # fields of /proc/<pid>/stat behind the name: ppid; utime, stime, cutime, cstime


def tree(root: int) -> list[int]:
    """Process `root` and its living descendants; those whose parent died in between are not found."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdecimal() and (fields := _stat(int(folder.name))):
            children[int(fields[_PARENT])].append(int(folder.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1]]
    return found


def cpu_seconds(root: int) -> float:
    """User and system time of the tree so far, dead children that were waited for too; in ticks of 10 ms a process."""
    ticks = sum(int(value) for pid in tree(root) for value in _stat(pid)[_TIMES])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(root: int) -> tuple[int, int]:
    """(PSS, PSS without mapped files) of the tree in bytes.

    PSS counts a page that n processes share as 1/n in each, so that the sum over a tree counts it once. Pages of mapped
    files lie in the page cache, which the kernel takes back when memory is short: the second number is without them.
    """
    total, own = 0, 0
    for pid in tree(root):
        try:
            text = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has just ended
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        total += int(sizes["Pss"])
        own += int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"])
    return 1024 * total, 1024 * own


def _stat(pid: int) -> list[str]:
    """The fields behind the name, which is in parentheses and may hold anything; empty for a process that has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


class PeakMemory:
    """Samples `memory` of another process's tree while the body runs.

    Attributes:
        peak, own: the largest PSS seen, and the largest without mapped files, bytes; 0 if there was no sample.
        samples: how many there were.
    """

    def __init__(self, root: int, every: float = 0.2) -> None:
        self.peak, self.own, self.samples = 0, 0, 0
        self._root, self._every, self._stop = root, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            total, own = memory(self._root)
            self.peak, self.own = max(self.peak, total), max(self.own, own)
            self.samples += 1
