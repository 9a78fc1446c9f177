"""The model behind `python -m bench scaling`: what N GPUs need for a step that takes T on one. It measures nothing.

N GPUs are m machines of n. An all-reduce is a reduce-scatter and an all-gather. Each of these halves, of S bytes, takes

    in a machine       launch + (n - 1) / n * S / NVLink + (n - 1) * hop_in
    between machines   launch + (m - 1) / m * S / NICs   + (m - 1) * hop      (each GPU its n-th, by the machine's NICs)
    over all GPUs      launch + both volumes             + (m - 1) * hop + (N - m) * hop_in

NVLink and NICs are the rates below times their efficiency. Modes, G the gradients and P the bf16 working copies:

    ddp     a bucket of gradients: both halves in the machine, both between machines (hierarchical ring)
    fsdp    a unit: all-gather of P in the teacher's and the student's forward pass and, for a block, in the backward
            pass again; reduce-scatter of G; all over all GPUs
    hsdp    the same in the machine, and an all-reduce of the machine's sums between machines
    zero1   as ddp, but the last half in the machine gathers the new P after the update, where nothing hides it

The communication C is hidden behind arithmetic: behind half of the backward pass, which is two thirds of the step
(ddp, zero1), or behind half of the step (fsdp, hsdp). Never hidden is what nothing runs beside: the last bucket, or the
first gather and the last scatter. Exposed = max(tail, C - hidden at most). A GPU is late by an exponential time of mean
d * T a step, and the step waits for the last one: of N that is d * T * (H_N - 1) later than one GPU's own mean, with
H_N = 1 + 1/2 + ... + 1/N. Small blocking collectives (BatchNorm's running statistics, the stop flag; with
sync-batchnorm two for each layer and domain) are never hidden. Sharded modes share the update's memory traffic; fsdp
and hsdp copy what they gather and scatter once more, and are taken to run outside of a CUDA graph, where the host
launches each operator and collective: no step is shorter than that.

    step(N) = T - update saved + copies + exposed + small + d * T * (H_N - 1), at least the host's time
    efficiency = T / step(N); above 100 % if the update that is saved is more than what is added

Left out: NCCL's trees, NVLink SHARP and in-network reduction, other jobs' traffic, the loader's and the file system's
limits, evaluation, checkpoints. The assumed numbers come from no measurement: they are within what is usual, and
latency, efficiency of links and delay are such that ddp agrees with the estimate that the project was planned with.
"""

import math
from dataclasses import dataclass, field, replace

MODES = ("ddp", "fsdp", "hsdp", "zero1")
PLANNING_ONLY = "zero1"
"""A row to plan by: the trainer does not offer it."""
BUCKET = 25 * 2**20
"""Bytes of working copies' gradients in one of DistributedDataParallel's buckets."""
WORKING_BYTES = 2
"""Of a parameter's bf16 working copy."""
RESIDENT = {"master weights": 4, "AdamW's moments": 8, "gradients": 4, "teacher": 4}
"""Bytes a parameter that full sharding divides, all float32."""
MOMENTS_MOVED, TEACHER_MOVED = 30, 10
"""Bytes a parameter that the update reads and writes: AdamW with its working copy, the teacher with its own."""
SMALL = 2
"""Small collectives of every step: BatchNorm's running statistics, and the flag that stops all."""
OPERATORS = 4877
"""Of a step, counted by `python -m bench ledger` at 2+2@512 (row lean, 2026-11-22); nearly the same at every size."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the model needs of the network; `inputs.count_network` counts it from the modules."""

    parameters: int
    tensors: int
    blocks: int
    """Units of FSDP that are gathered again in the backward pass."""
    block_parameters: int
    """Their parameters."""
    units: int
    """What FSDP gathers one by one: blocks, and what stays whole from the forward to the backward pass."""
    batchnorms: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines and links."""

    gpus_per_node: int = 8
    nvlink: float = 450e9
    """Bytes a second, of a GPU in one direction."""
    nics: float = 400e9
    """Bytes a second, of all of a machine's NICs in one direction."""
    hop: float = 3e-6
    """Seconds from a machine to the next."""


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are neither counted nor asked for; a guess each, with its reason."""

    link_efficiency: float = 0.85
    """Of a link's nominal rate that a collective reaches."""
    hop_in: float = 1e-6
    """Seconds from a GPU to the next in a machine."""
    launch: float = 10e-6
    """Seconds that any collective takes."""
    backward: float = 2 / 3
    """Share of the step."""
    overlap: float = 0.5
    """Share of the arithmetic behind which communication hides: it starts late, and takes memory bandwidth."""
    delay: float = 0.0075
    """d: mean delay of a GPU, as a share of the step."""
    memory_rate: float = 3.0e12
    """Bytes a second that the update and copies move: an H100's."""
    host_operator: float = 5e-6
    """Seconds that the host takes to launch an operator."""
    host_collective: float = 50e-6
    """Seconds that the host takes for FSDP's hooks around a collective."""


@dataclass(frozen=True)
class Plan:
    """What is planned."""

    network: Network
    cluster: Cluster
    step: float
    """T, seconds of a step of one GPU."""
    batch: int
    """Images a domain of one GPU."""
    gradient_bytes: int = 4
    """A parameter, in the reduction: 4 (fp32) or 2 (bf16)."""
    sync_batchnorm: bool = False
    assumptions: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True)
class Row:
    """What the model says of a mode on N GPUs."""

    mode: str
    gpus: int
    sent_bytes: float
    """By each GPU in a step, small collectives aside."""
    collectives: int
    """Calls in a step, small ones included."""
    saved_bytes: float
    """Memory that each GPU saves against one GPU's."""
    communication_ms: float
    exposed_ms: float
    """Communication that nothing hides, small collectives included."""
    late_ms: float
    """Waiting for the last GPU."""
    host_ms: float
    """What the host needs for a step outside of a CUDA graph, for the modes that run there; 0 for the others."""
    step_ms: float
    efficiency: float
    """Percent of N times one GPU's images a second."""
    images_per_second: float
    """Images that the student sees, of the source and mixed."""


@dataclass(frozen=True)
class _Traffic:
    """Seconds, bytes sent by a GPU and number of collectives."""

    seconds: float = 0.0
    sent: float = 0.0
    count: int = 0

    def __add__(self, other: "_Traffic") -> "_Traffic":
        return _Traffic(self.seconds + other.seconds, self.sent + other.sent, self.count + other.count)

    def as_one(self) -> "_Traffic":
        """Halves that are one call."""
        return replace(self, count=min(1, self.count))

    def __mul__(self, times: int) -> "_Traffic":
        return _Traffic(times * self.seconds, times * self.sent, times * self.count)


class _Links:
    """The halves of an all-reduce among N GPUs, as the module's docstring has them."""

    def __init__(self, cluster: Cluster, assumed: Assumptions, gpus: int) -> None:
        self.gpus = gpus
        self.inside = min(gpus, cluster.gpus_per_node)
        self.machines = gpus // self.inside
        self.assumed, self.hop = assumed, cluster.hop
        self.nvlink = assumed.link_efficiency * cluster.nvlink
        self.nics = assumed.link_efficiency * cluster.nics

    def within(self, size: float) -> _Traffic:
        """In a machine."""
        share = (self.inside - 1) / self.inside
        return self._of(share * size / self.nvlink + (self.inside - 1) * self.assumed.hop_in, share * size, self.inside)

    def between(self, size: float) -> _Traffic:
        """Of `size` bytes of a machine between machines, each GPU its part."""
        share = (self.machines - 1) / self.machines
        seconds = share * size / self.nics + (self.machines - 1) * self.hop
        return self._of(seconds, share * size / self.inside, self.machines)

    def over_all(self, size: float) -> _Traffic:
        """In one ring through all GPUs."""
        inside, outside = (self.inside - 1) / self.inside, (self.machines - 1) / self.machines
        hops = (self.machines - 1) * self.hop + (self.gpus - self.machines) * self.assumed.hop_in
        seconds = inside * size / self.nvlink + outside * size / self.nics + hops
        return self._of(seconds, (self.gpus - 1) / self.gpus * size, self.gpus)

    def reduce_to_parts(self, size: float) -> _Traffic:
        """Sums over all GPUs, each with its machine's n-th of them."""
        return self.within(size) + (self.between(size) * 2).as_one()

    def all_reduce(self, size: float) -> _Traffic:
        """Sums over all GPUs, each with all of them, in one call."""
        return (self.within(size) * 2 + self.between(size) * 2).as_one()

    def small(self) -> float:
        """Seconds of a blocking all-reduce of a few bytes."""
        return self.all_reduce(0).seconds

    def _of(self, seconds: float, sent: float, members: int) -> _Traffic:
        return _Traffic(self.assumed.launch + seconds, sent, 1) if members > 1 else _Traffic()


def predict(plan: Plan, mode: str, gpus: int) -> Row:
    """What the model says.

    Args:
        plan: the inputs.
        mode: of MODES.
        gpus: N >= 1, at most one machine's or a multiple of them.
    """
    links = _Links(plan.cluster, plan.assumptions, gpus)
    total, tail, hidden = _traffic(plan, mode, links)
    small_count = SMALL + (4 * plan.network.batchnorms if plan.sync_batchnorm else 0)
    small = small_count * links.small()
    exposed = max(tail, total.seconds - hidden) + small
    late = plan.assumptions.delay * plan.step * (math.fsum(1 / number for number in range(1, gpus + 1)) - 1)
    seconds = plan.step + exposed + late - _update_saved(plan, mode, links)
    host = 0.0
    if mode in ("fsdp", "hsdp") and gpus > 1:
        host = _hosts(plan.assumptions, total.count)
        seconds = max(seconds + _copied(plan), host)
    return Row(
        mode,
        gpus,
        total.sent,
        total.count + (small_count if gpus > 1 else 0),
        _memory_saved(plan, mode, links),
        1e3 * (total.seconds + small),
        1e3 * exposed,
        1e3 * late,
        1e3 * host,
        1e3 * seconds,
        100 * plan.step / seconds,
        2 * plan.batch * gpus / seconds,
    )


def _traffic(plan: Plan, mode: str, links: _Links) -> tuple[_Traffic, float, float]:
    """(a step's communication, seconds of it that nothing can hide, seconds that can be hidden)."""
    gradients = plan.gradient_bytes * plan.network.parameters
    working = WORKING_BYTES * plan.network.parameters
    assumed = plan.assumptions
    if mode in ("ddp", "zero1"):
        buckets = math.ceil(working / BUCKET)
        last = min(gradients, BUCKET * plan.gradient_bytes / WORKING_BYTES)
        hidden = assumed.overlap * assumed.backward * plan.step
        reduce = links.all_reduce if mode == "ddp" else links.reduce_to_parts
        gather = links.within(working) if mode == "zero1" else _Traffic()
        total = reduce(gradients / buckets) * buckets + gather
        return total, reduce(last).seconds + gather.seconds, hidden
    half = links.over_all if mode == "fsdp" else links.within
    network, units = plan.network, plan.network.units
    gather, scatter = half(working / units), half(gradients / units)
    again = half(WORKING_BYTES * network.block_parameters / network.blocks) * network.blocks
    if mode == "hsdp":
        scatter = links.reduce_to_parts(gradients / units)
    total = (gather * 2 + scatter) * units + again
    return total, gather.seconds + scatter.seconds, assumed.overlap * plan.step


def _copied(plan: Plan) -> float:
    """Seconds in which gathered and scattered tensors are copied: read and written once each."""
    network = plan.network
    gathered = WORKING_BYTES * (2 * network.parameters + network.block_parameters)
    return 2 * (gathered + plan.gradient_bytes * network.parameters) / plan.assumptions.memory_rate


def _hosts(assumed: Assumptions, collectives: int) -> float:
    """Seconds that the host needs to launch a step outside of a CUDA graph."""
    return OPERATORS * assumed.host_operator + collectives * assumed.host_collective


def _update_saved(plan: Plan, mode: str, links: _Links) -> float:
    """Seconds of the update's memory traffic that other GPUs take over."""
    moved = {"ddp": 0, "zero1": MOMENTS_MOVED}.get(mode, MOMENTS_MOVED + TEACHER_MOVED)
    return _shared(mode, links) * moved * plan.network.parameters / plan.assumptions.memory_rate


def _memory_saved(plan: Plan, mode: str, links: _Links) -> float:
    held = {"ddp": 0, "zero1": RESIDENT["AdamW's moments"]}.get(mode, sum(RESIDENT.values()))
    return _shared(mode, links) * held * plan.network.parameters


def _shared(mode: str, links: _Links) -> float:
    """The part of the sharded state that is elsewhere."""
    return 1 - 1 / (links.gpus if mode == "fsdp" else links.inside)
