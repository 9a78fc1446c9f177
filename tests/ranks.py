"""Ranks for a test: the processes of `torchrun ... -m ssr_fast.train`, without torchrun and its seconds of start-up."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ssr_fast.engine import fork_server

Before = tuple[Callable[..., None], tuple[Any, ...]]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: a signal), what it printed, and when (of the same clock)."""

    code: int
    out: str
    err: str
    at: float


class Training:
    """Processes that run ssr_fast.train together, forked from a server that has imported it and done nothing else.

    Args:
        folder: for what they print.
        world: how many.
        options: of the command line.
        before: (function, arguments) of each rank, called as function(rank, *arguments) before its training, to break
            it; the function is of a module.
    """

    def __init__(self, folder: Path, world: int, options: Sequence[str], before: Before | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        fork_server.start("tests.ranks_preload")  # the server is one for all that needs one: as the trainer starts it
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"rank-{time.monotonic_ns()}-{rank}" for rank in range(world)]
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(file, rank, world, port, list(options), before, dict(os.environ)))
            for rank, file in enumerate(self._files)
        ]
        for process in self.processes:
            process.start()

    def printed(self, rank: int = 0) -> str:
        """What a rank has printed by now."""
        file = self._files[rank].with_suffix(".out")
        return file.read_text() if file.exists() else ""

    def send(self, rank: int, number: int) -> None:
        """A signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def end(self, patience: float = 120.0) -> list[Ended]:
        """Waits for all; those that take longer are killed (their code is -9)."""
        until, times = time.monotonic() + patience, dict[int, float]()
        while len(times) < len(self.processes):
            for rank, process in enumerate(self.processes):
                if rank in times:
                    continue
                process.join(0.01)
                if process.exitcode is not None:
                    times[rank] = time.monotonic()
                elif time.monotonic() > until:
                    self.send(rank, signal.SIGKILL)
        found = []
        for rank, (process, file) in enumerate(zip(self.processes, self._files, strict=True)):
            out, err = (file.with_suffix(kind).read_text() for kind in (".out", ".err"))
            found.append(Ended(process.exitcode or 0, out, err, times[rank]))
        return found


def train(folder: Path, world: int, options: Sequence[str], before: Before | None = None) -> list[Ended]:
    """Trains to the end; see Training."""
    return Training(folder, world, options, before).end()


def check(ended: Sequence[Ended], code: int = 0) -> None:
    """All ranks have this exit code, and none a traceback."""
    assert [rank.code for rank in ended] == [code] * len(ended), "\n".join(rank.err for rank in ended)
    assert not any("Traceback" in rank.err for rank in ended), "\n".join(rank.err for rank in ended)


def _rank(
    file: Path, rank: int, world: int, port: int, options: list[str], before: Before | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # the server has that of whoever started it
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    for kind, stream in ((".out", sys.stdout), (".err", sys.stderr)):
        descriptor = os.open(file.with_suffix(kind), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    import torch

    from ssr_fast.commandline import run
    from ssr_fast.train import main

    torch.set_num_threads(1)
    if before is not None:
        before[0](rank, *before[1])
    sys.argv[1:] = options
    code: Any = 99
    try:
        run(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a process ends that has imported nothing of the server's
