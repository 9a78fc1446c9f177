"""`python -m tests.faults.kill_saves [--kills 200] [--ranks 1|2] [--seed N]`: kill -9 in the middle of saves.

Processes train a tiny net, save it in the background at every step or two and are killed: one of them or all, after a
random time or at a random file operation of a save. Each life continues from the newest checkpoint. Checked: no
checkpoint that was confirmed is lost, nothing half-written is taken, no survivor hangs, and every step of every life
has, bit for bit, the state of the run that was never stopped.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ssr_fast.engine import dcp_files  # noqa: F401  (imported once here, not in every life)
from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.manifest import newest_whole, steps, verify
from ssr_fast.engine.ranks import Ranks

SHAPES = {"weight": (7, 5), "bias": (1,), "scale": (), "table": (64, 512)}
SHARDED = ("weight", "bias", "table")  # over 2 ranks: unevenly, with an empty part, evenly
PATIENCE = 60.0
"""Seconds after which processes that have lost one of theirs count as hanging."""
Tree = dict[str, Any]


def initial(rank: int) -> Tree:
    """The state before the first step, whole; `rng` is the rank's own."""
    draw = torch.Generator().manual_seed(1)
    net = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    moments = {name: {"mean": torch.zeros(shape), "square": torch.zeros(shape)} for name, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(100 + rank).get_state()
    own = {"generator": generator, "walk": torch.zeros(3, dtype=torch.float64)}
    count = torch.tensor(0, dtype=torch.int64)
    return {"net": net, "optimizer": moments, "count": count, "rng": {str(rank): own}, "step": 0}


def shard(tree: Tree, world: int) -> Tree:
    """The tree with its sharded tensors as DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    for name in SHARDED:
        tree["net"][name] = distribute_tensor(tree["net"][name], mesh, [Shard(0)])
        for key, moment in tree["optimizer"][name].items():
            tree["optimizer"][name][key] = distribute_tensor(moment, mesh, [Shard(0)])
    return tree


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, name: str, rank: int, world: int) -> Tensor:
    """What of a whole tensor a rank holds."""
    if name not in SHARDED or world == 1:
        return whole
    parts = whole.chunk(world)
    return parts[rank] if rank < len(parts) else whole[:0]


def advance(tree: Tree, rank: int, world: int) -> None:
    """One step in place: AdamW on a gradient that follows from the step's number; every operation is elementwise."""
    step = tree["step"] = tree["step"] + 1
    tree["count"] += 1
    draw = torch.Generator().manual_seed(step)
    for name, shape in SHAPES.items():
        gradient = part(torch.randn(shape, generator=draw), name, rank, world)
        weight, moments = local(tree["net"][name]), tree["optimizer"][name]
        mean, square = local(moments["mean"]), local(moments["square"])
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        weight.mul_(0.999).addcdiv_(mean, square.sqrt() + 1e-8, value=-0.01)
    own = tree["rng"][str(rank)]
    generator = torch.Generator()
    generator.set_state(own["generator"])
    own["walk"] += torch.rand(3, generator=generator, dtype=torch.float64)
    own["generator"].copy_(generator.get_state())


def leaves(tree: Tree) -> Iterator[tuple[str, Tensor]]:
    """(name of the innermost key but for moments, tensor), in a fixed order."""
    for name in SHAPES:
        yield from ((name, x) for x in (tree["net"][name], *tree["optimizer"][name].values()))
    yield "count", tree["count"]
    for own in tree["rng"].values():
        yield from own.items()


def digest(tree: Tree, rank: int, world: int) -> str:
    """Of a rank's part of the state: of a sharded tree's, or of a whole tree's cut into such parts."""
    total = hashlib.sha256(str(tree["step"]).encode())
    for name, x in leaves(tree):
        mine = local(x) if isinstance(x, DTensor) else part(x, name, rank, world)
        total.update(mine.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Reference:
    """The run that is never stopped: digests of each rank's parts after each step, computed as far as needed."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.trees = [initial(rank) for rank in range(world)]
        self.digests = [[digest(tree, rank, world)] for rank, tree in enumerate(self.trees)]

    def at(self, rank: int, step: int) -> str:
        """The digest of a rank after a step."""
        tree, digests = self.trees[rank], self.digests[rank]
        while len(digests) <= step:
            advance(tree, 0 if self.world == 1 else rank, 1)  # on the whole tensors
            digests.append(digest(tree, rank, self.world))
        return digests[step]


@dataclass(frozen=True)
class Doom:
    """How a life ends: after `seconds` of training, or at the file operation `operation` of rank `rank`."""

    rank: int
    everyone: bool
    seconds: float | None
    operation: int | None


def live(folder: Path, ranks: Ranks, life: int, plan: random.Random, doom: Doom | None, last: int | None) -> None:
    """What a process does from its start to its death, or to the step `last`."""
    told: list[str] = []
    store = CheckpointStore(folder / "checkpoints", 2, background=True, report=told.append, ranks=ranks)
    tree = initial(ranks.rank)
    if ranks.world > 1:
        tree = shard(tree, ranks.world)
    path = store.latest()
    if path is not None:
        store.load(path, tree)
    assert told == [], told
    trajectory = os.open(folder / f"trajectory-{ranks.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    confirmed = os.open(folder / f"confirmed-{ranks.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(trajectory, f"{life} {tree['step']} {digest(tree, ranks.rank, ranks.world)}\n".encode())
    if doom is not None and doom.operation is not None and doom.rank == ranks.rank:
        die_at(doom.operation, folder / "checkpoints", doom.everyone)
    known, every = None, plan.choice([1, 2])
    if path is not None and plan.random() < 0.5:
        store.save(tree["step"], tree)  # a checkpoint that stands is replaced
    (folder / f"begun-{ranks.rank}").touch()
    while last is None or tree["step"] < last:
        advance(tree, ranks.rank, ranks.world)
        os.write(trajectory, f"{life} {tree['step']} {digest(tree, ranks.rank, ranks.world)}\n".encode())
        final = tree["step"] == last or plan.random() < 0.05
        if final or tree["step"] % every == 0:
            store.save(tree["step"], tree, config={"life": life}, score=plan.random(), final=final)
        if plan.random() < 0.3:
            store.wait()
        if store.written is not None and store.written != known:
            known = store.written
            os.write(confirmed, f"{known}\n".encode())
            os.fsync(confirmed)


def die_at(operation: int, folder: Path, everyone: bool) -> None:
    """This process (or its whole group) dies at its n-th operation from now on that touches a file of the folder."""
    left = [operation]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL) if everyone else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(world: int, meeting: Path, work: Callable[[Ranks], None]) -> list[int]:
    """Forks the processes of a life, in a group of their own; their ids."""
    children: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, children[0] if children else 0)
                ranks = Ranks()
                if world > 1:
                    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
                    ranks = Ranks(rank, world, rank, dist.new_group(backend="gloo"))
                work(ranks)
                code = 0
            except BaseException as error:
                code = 1 if world > 1 and "another process of this run has ended" in str(error) else 2
                if code == 2:
                    traceback.print_exc()
            finally:
                os._exit(code)
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    return children


def end(children: list[int]) -> tuple[list[int], float]:
    """Waits for all; exit codes (negative: signal; those that hang are killed, and have code 3), seconds it took."""
    began, codes, hanging = time.monotonic(), {}, set()
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = 3 if child in hanging else os.waitstatus_to_exitcode(status)
            elif time.monotonic() - began > PATIENCE:
                hanging.add(child)
                os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    return [codes[child] for child in children], time.monotonic() - began


@dataclass
class Tally:
    """What all lives together showed."""

    kills: int = 0
    of_all: int = 0
    at_operation: int = 0
    unfinished: int = 0
    replacing: int = 0
    states: int = 0
    last: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


def check(folder: Path, world: int, reference: Reference, life: int, tally: Tally) -> None:
    """What a life left, before the next one opens the folder."""
    checkpoints = folder / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.exists() else []
    tally.unfinished += any(name.startswith((".tmp-", ".old-")) for name in names)
    tally.replacing += any(name.startswith(".old-") for name in names)
    confirmed = 0
    for rank in range(world):
        for line in complete_lines(folder / f"confirmed-{rank}"):
            confirmed = max(confirmed, int(line))
        seen = list(complete_lines(folder / f"trajectory-{rank}"))
        (folder / f"trajectory-{rank}").unlink(missing_ok=True)
        for number, line in enumerate(seen):
            _, step, found = line.split()
            tally.states += 1
            tally.last = max(tally.last, int(step))
            if found != reference.at(rank, int(step)):
                what = "resumed" if number == 0 else "went on"
                tally.faults.append(f"life {life}: rank {rank} {what} with another state at step {step}")
            if number == 0 and int(step) < tally_confirmed(folder):
                tally.faults.append(f"life {life}: resumed at step {step}, before a confirmed one")
    for step, path in steps(checkpoints).items():
        reason = verify(path)
        if reason is not None:
            tally.faults.append(f"life {life}: step-{step} has its name and is not whole: {reason}")
    newest = newest_whole(checkpoints)
    kept = [int(name[5:]) for name in (newest, *(f"step-{n[5:]}" for n in names if n.startswith(".old-"))) if name]
    if max(kept, default=0) < confirmed:
        tally.faults.append(f"life {life}: step {confirmed} was confirmed, the newest whole one is {newest}")
    (folder / "confirmed").write_text(str(confirmed))


def tally_confirmed(folder: Path) -> int:
    """The newest step that was confirmed before this life."""
    file = folder / "confirmed"
    return int(file.read_text()) if file.exists() else 0


def complete_lines(file: Path) -> list[str]:
    """The lines of a file, without one that a kill cut short."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def kill_saves(folder: Path, kills: int, world: int, seed: int) -> Tally:
    """Lives until so many were killed, and one more that ends by itself."""
    torch.set_num_threads(1)
    draw, tally, reference, life = random.Random(seed), Tally(), Reference(world), 0
    while tally.kills < kills and not tally.faults:
        life += 1
        by_time = draw.random() < 0.5
        everyone = world == 1 or draw.random() < 0.5
        seconds, operation = (
            (draw.uniform(0, 0.15), None) if by_time else (None, draw.randrange(1, draw.choice([30, 100])))
        )
        doom = Doom(draw.randrange(world), everyone, seconds, operation)
        codes = live_and_die(folder, world, life, f"{seed}-{life}", doom, tally)
        tally.kills += 1
        tally.of_all += everyone
        tally.at_operation += not by_time
        if -signal.SIGKILL not in codes or any(code not in (-signal.SIGKILL, 1) for code in codes):
            tally.faults.append(f"life {life}: the processes ended with {codes}")
        check(folder, world, reference, life, tally)
    if not tally.faults:
        end_well(folder, world, f"{seed}-end", tally, reference, life + 1)
    return tally


def live_and_die(folder: Path, world: int, life: int, seed: str, doom: Doom, tally: Tally) -> list[int]:
    """One life; exit codes of its processes."""
    for rank in range(world):
        (folder / f"begun-{rank}").unlink(missing_ok=True)
    children = start(
        world,
        folder / f"meeting-{life}",
        lambda ranks: live(folder, ranks, life, random.Random(seed), doom, None),
    )
    if doom.seconds is not None:
        patience = time.monotonic() + PATIENCE
        while not all((folder / f"begun-{rank}").exists() for rank in range(world)) and time.monotonic() < patience:
            time.sleep(0.0005)
        time.sleep(doom.seconds)
        for child in children if doom.everyone else [children[doom.rank]]:
            os.kill(child, signal.SIGKILL)
    codes, took = end(children)
    if doom.seconds is not None and not doom.everyone:
        tally.slowest = max(tally.slowest, took)
    return codes


def end_well(folder: Path, world: int, seed: str, tally: Tally, reference: Reference, life: int) -> None:
    """A life that is not killed, and its last checkpoint in one process."""
    last = tally.last + 5
    children = start(
        world,
        folder / f"meeting-{life}",
        lambda ranks: live(folder, ranks, life, random.Random(seed), None, last),
    )
    codes, _ = end(children)
    if codes != [0] * world:
        tally.faults.append(f"the last life ended with {codes}")
        return
    check(folder, world, reference, life, tally)
    tree, store = initial(0), CheckpointStore(folder / "checkpoints", 2)
    path = store.latest()
    if path is None or path.name != f"step-{last}":
        tally.faults.append(f"the last checkpoint is {path}, not that of step {last}")
        return
    store.load(path, tree)
    whole = reference.trees[0]  # all tensors whole, but for the rank's own ones
    reference.at(0, last)
    if any(not torch.equal(x, y) for (_, x), (_, y) in zip(leaves(tree), leaves(whole), strict=True)):
        tally.faults.append("the last checkpoint differs from the run that was never stopped")


def main() -> int:
    """The exit code: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill_saves")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill_saves-") as name:
        tally = kill_saves(Path(name), options.kills, options.ranks, options.seed)
    for fault in tally.faults:
        print(fault)
    print(
        f"{tally.kills} kills, {options.ranks} rank(s), seed {options.seed}: {tally.of_all} of all ranks, "
        f"{tally.at_operation} at a file operation, {tally.unfinished} left an unfinished save ({tally.replacing} of "
        f"them replacing a checkpoint); {tally.states} states compared up to step {tally.last}; survivors ended within "
        f"{tally.slowest:.2f} s; {len(tally.faults)} faults; {time.monotonic() - began:.0f} s"
    )
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
