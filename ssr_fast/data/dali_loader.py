"""The DALI loader: NVIDIA DALI's processes read the samples, its operators decode, pad, flip and normalise them.

One pipeline serves both devices: on "cpu" everything runs on the host; on "cuda" JPEG is decoded by nvJPEG and the rest
runs on the GPU. Images come out as float32, since DALI has no bfloat16: the network casts. What is relied on was tried
with DALI 2.4.0 (tests/data/test_dali_loader.py): its arithmetic operators give the bits of augment.normalise_batch,
which crop_mirror_normalize and normalize do not, and its CPU decoder those of Pillow, of a region as of a whole file.

B samples of one batch, H W pixels of the crop.
"""

import importlib
import importlib.util
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssr_fast.data.dali_processes import start, start_worker
from ssr_fast.data.geometry import MEAN, STD
from ssr_fast.data.workers import LoaderDied
from ssr_fast.errors import UserError

_ARRAYS = {"array": 1, "pixels": 2, "jpeg": 4}  # arrays that a source hands over for an output of each kind
_MARK = "ssr_fast.UserError: "  # DALI passes on no more of a worker's error than its text


@dataclass(frozen=True)
class Output:
    """One part of a batch, and what the source hands over for it.

    Attributes:
        part: a field of Batch, such as "source_image".
        kind: "array" goes into the batch as it is: one array. "pixels" is flipped and normalised: uint8 [H, W, 3], cut
            and padded but not flipped, and flip uint8 [1]. "jpeg" is decoded, padded, flipped and normalised: the
            file's bytes uint8 [n], corner int32 [2] (y, x) of the crop, int32 [2] (height, width) of what of it lies
            inside of the image, and flip uint8 [1].
    """

    part: str
    kind: Literal["array", "pixels", "jpeg"]


class SlotSource(Protocol):
    """The samples of a run: a pure function of (step, slot) that can be pickled.

    Attributes:
        outputs: the parts of a batch.
        slots: B.
        crop: (height, width) of the images that come out.
    """

    @property
    def outputs(self) -> tuple[Output, ...]: ...

    @property
    def slots(self) -> int: ...

    @property
    def crop(self) -> tuple[int, int]: ...

    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        """The arrays of one sample, of each output in order.

        Raises:
            UserError: a file cannot be read.
        """
        ...

    def files(self, step: int) -> list[str]:
        """The image files of a batch, to name them when one cannot be decoded."""
        ...


def not_supported_reasons(device: torch.device) -> list[str]:
    """Why DALI cannot load for this device; empty if it can."""
    return [reason for reason in (_package_problem(), _device_problem(device)) if reason]


def load_dali(
    source: SlotSource,
    first: int,
    last: int,
    *,
    device: torch.device,
    workers: int,
    queue: int,
    report: Callable[[str], None],
) -> Generator[dict[str, Tensor], None, None]:
    """Batches of the steps first .. last - 1, in order, whatever the number of workers.

    Close the iterator, or let go of it, and its processes end.

    Args:
        source: the samples.
        first, last: steps.
        device: where the images come out.
        workers: processes that read, and threads that decode; 0 reads in this process, with one thread.
        queue: batches that are made in advance, at least 1.
        report: gets one line: device, workers, and the memory that the queues hold.

    Yields:
        {part: tensor}: images float32 [B, 3, H, W] on the device, normalised, channels-last in memory; arrays
        [B, ...] on the host, page-locked if the device is a GPU. Every tensor has its memory for itself.

    Raises:
        UserError: a file cannot be read or decoded (once the batches before it were yielded), or a process died.
    """
    if first >= last:
        return
    report(_memory(source, source(first, 0), device, workers, queue))
    pipeline = _pipeline(source, first, last, device, workers, queue)
    processes = start(pipeline)
    failure: Exception | None = None
    try:
        for step in range(first, last):
            if failure is None:
                try:
                    processes.call(pipeline.schedule_run)
                except LoaderDied:
                    raise
                except Exception as error:  # DALI raises Exception itself
                    failure = _users(error) or error
            if failure is not None and pipeline.empty():
                raise failure from None
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            yield _batch(source, _outputs(pipeline, stream, source, step), device, stream)
    finally:
        processes.close()


def _pipeline(source: SlotSource, first: int, last: int, device: torch.device, workers: int, queue: int) -> Any:
    """The pipeline, not yet built."""
    dali = importlib.import_module("nvidia.dali")
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    parallel = {"py_num_workers": workers, "py_start_method": "spawn"} if workers else {}
    pipeline = dali.Pipeline(
        batch_size=source.slots,
        num_threads=max(1, workers),
        device_id=index,
        prefetch_queue_depth=queue,
        **parallel,
    )
    with pipeline:
        pipeline.set_outputs(*_graph(source, _Samples(source, first, last), device.type == "cuda", workers, queue))
    return pipeline


def _graph(source: SlotSource, samples: "_Samples", gpu: bool, workers: int, queue: int) -> list[Any]:
    """DALI's graph, one node for each output of the source."""
    fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    layout = [name for output in source.outputs for name in _layouts(output)]
    parallel = {"parallel": True, "prefetch_queue_depth": queue} if workers else {}
    arrays = iter(fn.external_source(source=samples, num_outputs=len(layout), batch=False, layout=layout, **parallel))
    mean, std = (types.Constant(np.array(values, np.float32)) for values in (MEAN, STD))
    fill = np.rint(MEAN).tolist()
    outputs = []
    for output in source.outputs:
        first = next(arrays)
        if output.kind == "array":
            outputs.append(fn.copy(first))  # parallel workers hand over memory that they write to again
            continue
        if output.kind == "pixels":
            image = first.gpu() if gpu else first
        else:
            image = fn.decoders.image_slice(
                first,
                next(arrays),
                next(arrays),
                axis_names="HW",
                adjust_orientation=False,  # labels are drawn on stored pixels
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo does
                device="mixed" if gpu else "cpu",
            )
            policy = {"out_of_bounds_policy": "pad", "fill_values": fill}
            image = fn.slice(image, start=[0, 0], shape=list(source.crop), axes=[0, 1], **policy)
        image = fn.flip(image, horizontal=fn.cast(next(arrays), dtype=types.INT32))
        outputs.append((fn.cast(image, dtype=types.FLOAT) - mean) / std)
    return outputs


def _layouts(output: Output) -> tuple[str, ...]:
    return ("HWC" if output.kind == "pixels" else "", *[""] * (_ARRAYS[output.kind] - 1))


def _outputs(pipeline: Any, stream: Any, source: SlotSource, step: int) -> Any:
    """DALI's outputs of a step.

    Raises:
        UserError: an image of it cannot be decoded.
    """
    try:
        return pipeline.outputs(stream)
    except RuntimeError as error:
        if "decoders.image_slice" not in str(error):
            raise
        reason = str(error).rpartition("encountered:")[2].split("Current pipeline")[0].split("C++ context")[0]
        files = ", ".join(source.files(step))
        raise UserError(
            f"an image of step {step} cannot be decoded ({' '.join(reason.split()).rstrip(' :')}): one of {files} has "
            "changed or was damaged since it was checked; restore it from its source"
        ) from None


def _batch(source: SlotSource, outputs: Any, device: torch.device, stream: Any) -> dict[str, Tensor]:
    """Copies of DALI's outputs."""
    plugin = importlib.import_module("nvidia.dali.plugin.pytorch")
    batch = {}
    for output, values in zip(source.outputs, outputs, strict=True):
        values = values.as_tensor()
        shape, dtype = tuple(values.shape()), plugin.to_torch_type[values.dtype]
        if output.kind == "array":
            owned = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
            batch[output.part] = plugin.feed_ndarray(values, owned)
        else:
            owned = torch.empty(shape, dtype=dtype, device=device)
            batch[output.part] = plugin.feed_ndarray(values, owned, cuda_stream=stream).permute(0, 3, 1, 2)
    return batch


class _Samples:
    """DALI's callable: one sample of the source. It is unpickled in DALI's processes, and nowhere else."""

    def __init__(self, source: SlotSource, first: int, last: int) -> None:
        self.source, self.first, self.last = source, first, last

    def __call__(self, info: Any) -> tuple[NDArray[Any], ...]:
        step = self.first + info.iteration
        if step >= self.last:
            raise StopIteration
        try:
            arrays = self.source(step, info.idx_in_batch)
        except UserError as error:
            raise RuntimeError(f"{_MARK}{error}") from error
        return tuple(np.ascontiguousarray(array) for array in arrays)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        start_worker()


def _users(error: BaseException | None) -> UserError | None:
    """The UserError that a sample raised, from what DALI made of it; None if there was none."""
    while error is not None:
        if str(error).startswith(_MARK):
            return UserError(str(error).removeprefix(_MARK))
        error = error.__cause__
    return None


def _memory(
    source: SlotSource, sample: tuple[NDArray[Any], ...], device: torch.device, workers: int, queue: int
) -> str:
    """The line for the user. With workers DALI keeps `queue` batches that are read and as many that it works on."""
    read, arrays, made = sum(array.nbytes for array in sample), iter(sample), 0
    for output in source.outputs:
        first = [next(arrays) for _ in range(_ARRAYS[output.kind])][0]
        made += first.nbytes if output.kind == "array" else 12 * source.crop[0] * source.crop[1]
    read, made = (size * queue * source.slots for size in (read * (2 if workers else 1), made))
    return (
        f"for {device}: {workers or 'no'} worker processes, {max(1, workers)} decoding threads, a queue of "
        f"{queue} batches; read samples take about {read / 2**20:.1f} MiB and finished batches {made / 2**20:.1f} MiB "
        "(computed from the shapes of the first sample)"
    )


def _package_problem() -> str | None:
    """Why DALI cannot be imported."""
    try:
        if importlib.util.find_spec("nvidia.dali") is None:
            return _MISSING
        importlib.import_module("nvidia.dali")
    except ModuleNotFoundError:
        return _MISSING
    except Exception as error:  # whatever a package that was built for another system raises
        text = " ".join(str(error).split())
        return f"the DALI that is installed cannot be imported ({type(error).__name__}: {text})"
    return None


_MISSING = "NVIDIA DALI is not installed (pip install nvidia-dali-cuda130, or the extra ssr_fast[dali])"


def _device_problem(device: torch.device) -> str | None:
    """Why DALI cannot bring images to this device."""
    if device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None):
        return None
    name = "an AMD GPU" if device.type == "cuda" else device.type
    return f"DALI loads for CPUs and NVIDIA GPUs, and the device is {name}"
