"""Where the processes of a run are: the innermost frames of a thread, and the table that explains a hang."""

import os
import sys
from collections import Counter
from collections.abc import Mapping

import torch.distributed as dist

from ssr_fast.engine.beats import LEFT, Beat

_SHOWN = 5  # frames
_COLLECTIVE = 3  # innermost frames among which one of torch.distributed means that it waits there
_BACKWARD = "autograd/graph.py"  # which waits in C++ for the gradients of the other ranks, and shows nothing of it
_HERE = f"{os.path.dirname(dist.__file__)}{os.sep}"


def frames_of(thread: int) -> tuple[str, ...]:
    """The innermost frames of a thread, innermost first: "torch/distributed/distributed_c10d.py:3007 all_reduce".

    Args:
        thread: its identifier, as threading.get_ident() gives it.
    """
    found: list[str] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and len(found) < _SHOWN:
        name, code = frame.f_code.co_filename, frame.f_code
        short = f"torch/distributed/{name[len(_HERE) :]}" if name.startswith(_HERE) else "/".join(name.split("/")[-2:])
        found.append(f"{short}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(found)


def in_collective(beat: Beat) -> bool:
    """Whether its main thread waits in torch.distributed, or in a backward pass that may wait there."""
    return any(frame.startswith(("torch/distributed/", _BACKWARD)) for frame in beat.frames[:_COLLECTIVE])


def table(beats: Mapping[int, Beat], world: int) -> str:
    """Where each rank is, in two lines each, and who waits for whom.

    Args:
        beats: of the ranks that have begun, with the frames of those that answered.
    """
    lines = []
    for rank in range(world):
        if rank not in beats:
            lines.append(f"  rank {rank}: has not begun to train")
        elif beats[rank].state == LEFT:
            lines.append(f"  {beats[rank]}: has left in good order")
        else:
            where = " < ".join(beats[rank].frames) or "gave no answer"
            lines += [f"  {beats[rank]}: {beats[rank].place}, for {beats[rank].seconds:.0f} s", f"    {where}"]
    return "\n".join([*lines, *([f"  {_conclusion(beats, world)}"] if world > 1 else [])])


def holders(beats: Mapping[int, Beat], world: int) -> list[int]:
    """The ranks that hold the others up; empty if none stands out.

    Where some wait in a collective, these are the others. Else (a GPU's collectives are waited for anywhere) they are
    those that are not where most are; between two places with as many ranks, those that have not moved for longer.
    """
    here = {rank: beat for rank, beat in beats.items() if beat.state != LEFT}
    waiting = [rank for rank, beat in here.items() if in_collective(beat)]
    if waiting:
        busy = [rank for rank in range(world) if rank not in waiting and (rank in here or rank not in beats)]
        if busy or len(here) < world:
            return busy or [rank for rank in range(world) if rank not in here]
    if missing := [rank for rank in range(world) if rank not in beats]:
        return missing
    places = Counter(beat.place for beat in here.values()).most_common()
    if len(places) < 2:
        return []
    if places[0][1] > places[1][1]:
        return sorted(rank for rank, beat in here.items() if beat.place != places[0][0])
    oldest = max(here.values(), key=lambda beat: beat.seconds)
    return sorted(rank for rank, beat in here.items() if beat.place == oldest.place)


def _conclusion(beats: Mapping[int, Beat], world: int) -> str:
    behind = holders(beats, world)
    if not behind:
        return "no rank is behind the others: they wait for the network or the GPUs, or each for another collective"
    others = [rank for rank in range(world) if rank not in behind and (rank not in beats or beats[rank].state != LEFT)]
    if not others:
        return f"{_ranks(behind)} cannot go on"
    return f"{_ranks(others)} {'waits' if len(others) == 1 else 'wait'} for {_ranks(behind)}"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
