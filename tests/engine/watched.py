"""Forked processes that form a gloo group under a watch, for its tests: how each one ended, and what it said."""

import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from ssr_fast.engine.ranks import Ranks, join
from ssr_fast.engine.watch import Watch
from ssr_fast.errors import UserError

LONGEST_S = 60.0


@dataclass(frozen=True)
class Ended:
    """A process: its exit code (negative: a signal; None: it had to be killed), its output, its id and its life."""

    code: int | None
    text: str
    pid: int
    seconds: float

    @property
    def said(self) -> list[str]:
        """Our own lines in its output, which the store's and gloo's share."""
        return [line for line in self.text.splitlines() if re.match(r"(error: )?(rank \d+: |  |stopped, )", line)]


def run_ranks(folder: Path, world: int, work: Callable[[Ranks], None], leave: tuple[int, ...] = ()) -> list[Ended]:
    """Fork `world` processes that join each other and work.

    Args:
        leave: ranks that are not waited for, but killed when all others have ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _member(folder / f"{rank}.txt", rank, world, port, work)
        pids.append(pid)
    started, ended = time.monotonic(), dict[int, tuple[int | None, float]]()
    while len(ended) < world:
        late = time.monotonic() - started > LONGEST_S
        for rank, pid in enumerate(pids):
            if rank in ended:
                continue
            if late or (rank in leave and all(other in ended or other in leave for other in range(world))):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended[rank] = (None, time.monotonic() - started)
            elif (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = (os.waitstatus_to_exitcode(found[1]), time.monotonic() - started)
        time.sleep(0.02)
    texts = [(folder / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(world)]
    for rank, text in enumerate(texts):
        print(f"--- rank {rank}, process {pids[rank]}: code and seconds {ended[rank]}\n{text}")
    return [Ended(ended[rank][0], texts[rank], pids[rank], ended[rank][1]) for rank in range(world)]


def _member(output: Path, rank: int, world: int, port: int, work: Callable[[Ranks], None]) -> NoReturn:
    """Work as an entry point would: a user's mistake is a line and code 2, any other error a traceback and code 1."""
    code = 99
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            work(join("cpu"))
            code = 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 1
    finally:
        os._exit(code)


def guarded(watch: Watch, loop: Callable[[], None]) -> None:
    """What a session does: run the training loop, and ask the watch about its error."""
    with watch:
        try:
            loop()
        except Exception as error:
            raise watch.explain(error) or error from error


def block_for_ever() -> None:
    """A call into the system that never returns, as a collective on a GPU whose fellow is gone."""
    os.read(os.pipe()[0], 1)
