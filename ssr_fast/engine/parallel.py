"""How a method's nets run on one process or many: one ordered function, each step with its reason.

- single: one process.
- ddp: every process holds everything and sees other samples; gradients are averaged once a step.
- fsdp: parameters, gradients and optimiser state of the trained nets and of the teacher are cut into shards, one a
  process, and gathered block by block where they are needed (PyTorch's fully_shard).
- hsdp: the same within groups of processes, ddp across the groups.

Frozen nets (SAM, the reference of the feature distance) are whole on every process in each mode.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssr_fast.data.batch import Batch
from ssr_fast.engine.attention import apply_attention
from ssr_fast.engine.compiling import compile_blocks
from ssr_fast.engine.precision import apply_precision, computed_dtype
from ssr_fast.engine.ranks import Ranks, launched
from ssr_fast.engine.run_config import RunConfig
from ssr_fast.methods.method import Method
from ssr_fast.models.mit import Block
from ssr_fast.models.segmentor import Segmentor, SegmentorOutput, build_segmentor

SHARDED = ("fsdp", "hsdp")
GROUPED = ("ddp", *SHARDED)
"""What needs a process group, also of a process alone."""
MODES = ("auto", "single", *GROUPED)
REDUCED = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BUCKET = 64 << 20


@dataclass(kw_only=True)
class ParallelConfig:
    """Several processes, which torchrun starts; the options `--parallel.*`."""

    mode: str = "auto"
    """single, ddp (every process holds the nets), fsdp (they are sharded over all processes), hsdp (sharded within
    groups of processes, ddp across them), or auto: ddp under torchrun with several processes, else single."""
    shard: int = 0
    """Processes of a group of hsdp; 0: those of one machine."""
    reduce: str = "fp32"
    """Type in which gradients are summed over the processes: fp32, or bf16 for half of the bytes."""
    sync_batchnorm: bool = False
    """BatchNorm's statistics over the batches of all processes; else each process normalises by its own batch, as the
    published recipes do, and the running statistics are averaged."""
    hang_timeout: int = 600
    """Seconds for which a process may stay at one place of the program; then the run ends and says which process waits
    where. 0: for ever."""
    processes: int | None = None
    """Processes that train together; unset: as many as torchrun has started. It is kept with the run: a run that is
    resumed by another number of them keeps the images of a step (--optim.accumulate)."""

    def problems(self, where: str) -> list[str]:
        """Sentences about illegal values; empty if all is well."""
        found = []
        if self.mode not in MODES:
            return [f"--{where}.mode must be one of {', '.join(MODES)} (it is {self.mode})"]
        if self.reduce not in REDUCED:
            found.append(f"--{where}.reduce must be one of {', '.join(REDUCED)} (it is {self.reduce})")
        for name in ("shard", "hang_timeout"):
            if getattr(self, name) < 0:
                found.append(f"--{where}.{name} must not be negative (it is {getattr(self, name)})")
        world = launched()
        if self.mode == "single" and world > 1:
            found.append(
                f"--{where}.mode single is one process and torchrun has started {world}: start it without, or give "
                f"--{where}.mode auto"
            )
        if self.processes is not None and self.processes != world:
            found.append(
                f"--{where}.processes {self.processes} is not what was started ({world}): start that many with "
                "torchrun --nproc-per-node, or leave it out"
            )
        if self.shard and self.mode != "hsdp":
            found.append(f"--{where}.shard {self.shard} has no effect with --{where}.mode {self.mode}: leave it out")
        elif self.mode == "hsdp" and world % self.group(world):
            found.append(f"--{where}.shard {self.group(world)} does not divide the {world} processes")
        return found

    def picked(self, world: int) -> str:
        """The mode for a number of processes."""
        return ("ddp" if world > 1 else "single") if self.mode == "auto" else self.mode

    def group(self, world: int) -> int:
        """Processes of a group of hsdp."""
        return self.shard or int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))


class Wrapped:
    """A method as it runs on the processes that train together.

    Args:
        method: made ready by `wrap`.
        mode: of MODES, not auto.
        ddp: what computes the method's losses and averages its gradients over the processes; None in other modes.
        ranks: these processes.
        late: the type in which the gradients of several micro-batches of working copies, which have been added up in
            float32, are averaged at the end (`reduce`); None: in the last one's backward pass.
    """

    def __init__(
        self,
        method: Method,
        mode: str = "single",
        ddp: DistributedDataParallel | None = None,
        ranks: Ranks | None = None,
        late: torch.dtype | None = None,
    ) -> None:
        self.method, self.mode = method, mode
        self._ddp, self._ranks, self._late = ddp, ranks or Ranks(), late
        self._plain: Segmentor | None = None
        self.sharded = mode in SHARDED
        """Whether a process holds parts of the nets only."""
        self._shards: list[Any] = list(_trained(method)) if self.sharded else []

    def __call__(self, batch: Batch, begun: bool) -> dict[str, Tensor]:
        """See Method.compute."""
        terms: dict[str, Tensor] = (self._ddp or self.method.compute)(batch, begun)
        return terms

    @contextlib.contextmanager
    def share(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one of the micro-batches of a step; gradients are averaged over the processes
        after the last one alone."""
        for net in self._shards:
            net.set_requires_gradient_sync(last)
        kept = self._ddp is not None and (self._late is not None or not last)
        with self._ddp.no_sync() if self._ddp is not None and kept else contextlib.nullcontext():
            yield

    def reduce(self) -> None:
        """After the last micro-batch and the hand-over of its gradients: average those that `share` has not."""
        if self._late is None:
            return
        parameters = (p for part in self.method.trainable().values() for p in part.parameters())
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket]).to(self._late)
            self._ranks.mean_(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def student(self) -> Segmentor:
        """The student with all its values on this process: what is evaluated and shipped. Every process must ask."""
        student = self.method.student
        if not self.sharded:
            return student
        if self._plain is None:
            device = next(iter(student.buffers())).device
            self._plain = build_segmentor(student.config, student.class_count).to(device)
        values = student.state_dict()
        self._plain.load_state_dict({name: _full(value) for name, value in values.items()})
        return self._plain


def wrap(
    method: Method,
    run: RunConfig,
    precision: str,
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    shares: int = 1,
) -> Wrapped:
    """Make a method on its device run as the options say; before its optimiser is built.

    Args:
        precision: what pick_precision has given.
        parallel, ranks: None for a process alone.
        shares: micro-batches of a step.
    """
    parallel, ranks = parallel or ParallelConfig(mode="single"), ranks or Ranks()
    mode = parallel.picked(ranks.world)
    sharded = mode in SHARDED
    method.student.backbone.recompute_blocks = run.recompute_blocks  # first: working copies take it over
    apply_precision(method, precision, copies=not sharded)  # makes the nets that the step runs; shards have types
    apply_attention(method, run.attention)
    if parallel.sync_batchnorm and ranks.world > 1:
        from ssr_fast.engine.sync_norm import synchronise_batchnorm

        synchronise_batchnorm(method, ranks)  # before compilation, which reads it
    if run.compile_blocks:
        compile_blocks(method, hooked=sharded)  # what is compiled has its final types, and knows of no other process
    if mode == "single":
        return Wrapped(method)
    if mode == "ddp":
        reduced = REDUCED[parallel.reduce]
        ddp = replicate(method, reduced, ranks)  # last: it sees all gradients
        return Wrapped(method, mode, ddp, ranks, late=reduced if shares > 1 and method.copies else None)
    shard(method, precision, REDUCED[parallel.reduce], parallel.group(ranks.world) if mode == "hsdp" else 0)
    return Wrapped(method, mode)


class _Compute(nn.Module):
    """The method's losses as a forward pass, which is all that DistributedDataParallel knows to wrap."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch | None, begun: bool) -> dict[str, Tensor]:
        if batch is not None:
            return self.method.compute(batch, begun)
        # a zero that is differentiated by each parameter, the last one first
        zero = torch.zeros((), device=self.method.key.device)
        for parameter in _differentiated(self.method):
            zero = zero + parameter.sum().float() * 0.0
        return {"loss": zero}


def replicate(method: Method, reduced: torch.dtype, ranks: Ranks) -> DistributedDataParallel:
    """Average over the processes the gradients of what the step differentiates: the working copies, if there are."""
    compute = _Compute(method)
    differentiated = {id(parameter) for parameter in _differentiated(method)}
    names = [name for name, parameter in compute.named_parameters() if id(parameter) not in differentiated]
    names += [name for name, _ in compute.named_buffers()]  # the guard averages the statistics; others are equal
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(compute, names)
    with _side_stream(method.key.device):
        wrapped = DistributedDataParallel(
            compute,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=method.waits(),
        )
    # convolutions' gradients come channels-last, and their weights are not: a copy of a few MB
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    wrapped.register_comm_hook((reduced, ranks.world), _averaged)
    if not method.waits():
        # the first backward pass decides, by the order in which gradients come, which of them are summed together, and
        # by that the order of the sums of three processes or more: it must be the same one where a run is resumed
        wrapped(None, False)["loss"].backward()
        wrapped.zero_grad(set_to_none=True)
    return wrapped


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Make DistributedDataParallel inside of this: on a GPU's default stream, its backward pass cannot be captured."""
    if device.type != "cuda":
        yield
        return
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, some 64 MB at a time."""
    bucket, size = list[Tensor](), 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _averaged(state: tuple[torch.dtype, int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients over the processes, summed in a type of its own."""
    dtype, world = state
    gradients = bucket.buffer()
    summed = gradients.to(dtype).div_(world) if gradients.dtype != dtype else gradients.div_(world)
    future = dist.all_reduce(summed, async_op=True).get_future()

    def back(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(done.value()[0]) if summed is not gradients else gradients

    return future.then(back)


def _differentiated(method: Method) -> Iterator[nn.Parameter]:
    """The parameters that a backward pass gives gradients to, and the optimiser (or `hand_over`) reads."""
    for name, net in method.computed().items():
        if _is_trained(method, net):
            yield from (p for p in method.running(name).parameters() if p.requires_grad)


def _trained(method: Method) -> Iterator[nn.Module]:
    """The nets that the optimiser changes."""
    return (net for net in method.computed().values() if _is_trained(method, net))


def _is_trained(method: Method, net: nn.Module) -> bool:
    trained = {id(p) for part in method.trainable().values() for p in part.parameters()}
    return any(id(p) in trained for p in net.parameters())


def shard(method: Method, precision: str, reduced: torch.dtype, group: int) -> None:
    """Cut the trained nets and the teacher into shards over all processes, or, for group > 0, over so many each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    _show_output()
    world = dist.get_world_size()
    device = next(method.student.buffers()).device.type
    shape, names = ((world // group, group), ("replicate", "shard")) if group else ((world,), ("shard",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    dtype = computed_dtype(precision)
    policies = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False),
        MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=reduced, cast_forward_inputs=False),
    )
    for net in _trained(method):
        _shard_net(net, mesh, policies, keep=True)
    if (teacher := method.average()) is not None:
        _shard_net(teacher, mesh, policies, keep=False)  # no backward pass comes, and the average is taken of shards


@functools.cache
def _show_output() -> None:
    """Let fully_shard find the tensors in what a segmentor returns."""
    from torch.export import register_dataclass

    register_dataclass(SegmentorOutput)


def _shard_net(net: nn.Module, mesh: object, policies: tuple[object, object], keep: bool) -> None:
    """Blocks, and BatchNorm in its float32, are units of their own; the rest is one with the root.

    Args:
        keep: what is small, or comes last, whole between forward and backward pass.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in list(net.modules()):
        if isinstance(module, _BatchNorm):
            fully_shard(module, mesh=mesh, mp_policy=policies[1], reshard_after_forward=not keep)  # type: ignore
            register_fsdp_forward_method(module, "followed_by_relu")
        elif isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policies[0])  # type: ignore
    fully_shard(net, mesh=mesh, mp_policy=policies[0], reshard_after_forward=not keep)  # type: ignore
    if isinstance(net, Segmentor):
        register_fsdp_forward_method(net, "decode")


def _full(value: Tensor) -> Tensor:
    """A tensor with all its values, whether it is cut into shards or not."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
