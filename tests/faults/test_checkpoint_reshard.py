"""What n ranks saved is loaded by m: sharded, whole, uneven and empty parts, every dtype, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ssr_fast.engine.checkpoint import CheckpointStore
from ssr_fast.engine.ranks import Ranks
from ssr_fast.engine.state import rng_state
from tests.engine.forked import run_ranks


def _whole() -> dict[str, Tensor]:
    """The tensors of a run: first dimensions that 2 and 4 ranks share evenly, unevenly, and not at all."""
    draw = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (7, 3, 2), dtype=torch.uint8, generator=draw)
    return {
        "even": torch.randn(8, 3, generator=draw),
        "uneven": torch.randn(7, 5, generator=draw),
        "three": torch.randn(3, 2, generator=draw),
        "one": torch.randn(1, 9, generator=draw),
        "none": torch.zeros(0, 4),
        "bf16": raw.view(torch.bfloat16).squeeze(-1).clone(),
        "int64": torch.randint(-(2**62), 2**62, (5,), generator=draw),
        "bool": torch.rand(6, generator=draw) > 0.5,
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(2**62 + 1),
    }


def _cut(whole: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The tensors as a rank holds them: cut along the first dimension, 0-dim ones on every rank."""
    if mesh is None:
        return {name: x.clone() for name, x in whole.items()}
    return {name: distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()]) for name, x in whole.items()}


def _bits(tensor: Tensor) -> list[int]:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def _mesh(ranks: Ranks, sharded: bool) -> DeviceMesh | None:
    return init_device_mesh("cpu", (ranks.world,)) if sharded else None


def _save(folder: Path, ranks: Ranks, sharded: bool, background: bool) -> None:
    store = CheckpointStore(folder, ranks=ranks, background=background)
    state = {"net": _cut(_whole(), _mesh(ranks, sharded)), "rng": {str(ranks.rank): rng_state()}, "step": 3}
    store.save(3, state)
    for x in state["net"].values():  # type: ignore[attr-defined]
        (x.to_local() if isinstance(x, DTensor) else x).zero_()
    store.wait()


def _load(folder: Path, ranks: Ranks, sharded: bool, saved_by: int) -> None:
    net = _cut({name: torch.zeros_like(x) for name, x in _whole().items()}, _mesh(ranks, sharded))
    held = dict(net)
    own = rng_state()
    state: dict[str, Any] = {"net": net, "rng": {str(ranks.rank): own}, "step": 0}
    store = CheckpointStore(folder, ranks=ranks)
    path = store.latest()
    assert path is not None
    restored = store.load(path, state)
    assert restored.world_size == saved_by and state["step"] == 3
    # a rank that was not there keeps its own generators, and is told so
    new = [] if ranks.rank < saved_by else [f"rng.{ranks.rank}.{name}" for name in own]
    assert sorted(restored.missing) == sorted(new)
    for name, x in _whole().items():
        assert state["net"][name] is held[name], f"{name} was not loaded in place"
        assert _bits(state["net"][name]) == _bits(x), name


@pytest.mark.parametrize(
    ("before", "after", "sharded_before", "sharded_after"),
    [
        (1, 2, False, True),
        (2, 1, True, False),
        (2, 4, True, True),
        (4, 2, True, True),
        (4, 1, True, False),
        (2, 2, True, False),
        (2, 2, False, True),
    ],
)
def test_any_number_of_ranks_continues_any_other(
    tmp_path: Path, before: int, after: int, sharded_before: bool, sharded_after: bool
) -> None:
    folder = tmp_path / "run"
    background = after % 2 == 0  # both ways of writing, without doubling the cases

    def save(ranks: Ranks) -> None:
        _save(folder, ranks, sharded_before, background)

    def load(ranks: Ranks) -> None:
        _load(folder, ranks, sharded_after, before)

    for work, world in ((save, before), (load, after)):
        if world == 1:
            work(Ranks())
        else:
            run_ranks(folder, world, work)


def _trained(seed: int, mesh: DeviceMesh | None) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A small net after two steps of AdamW; its layers' 5 and 1 rows are not shared evenly by 2 ranks."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
    if mesh is not None:
        fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(2):
        net(torch.full((3, 4), 0.1 * (step + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def _tree(net: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    kept = {name: optimizer.state[p] for name, p in net.named_parameters()}
    return {"net": net.state_dict(), "optimizer": kept}


def test_fully_sharded_training_continues_in_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def save(ranks: Ranks) -> None:
        store = CheckpointStore(folder, ranks=ranks, background=True)
        state = _tree(*_trained(0, init_device_mesh("cpu", (2,))))
        assert isinstance(state["net"]["1.bias"], DTensor)
        store.save(2, state)
        store.wait()

    run_ranks(folder, 2, save)
    wanted, state = _tree(*_trained(0, None)), _tree(*_trained(1, None))
    path = CheckpointStore(folder).latest()
    assert path is not None
    assert CheckpointStore(folder).load(path, state).missing == ()
    for name, x in wanted["net"].items():
        torch.testing.assert_close(state["net"][name], x)  # the gradients were averaged in another order
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(state["optimizer"][name][key], wanted["optimizer"][name][key])
