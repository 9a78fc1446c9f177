"""Batches by DALI: the same pixels as the torch loader's path, in order, owned, and no process left behind."""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ssr_fast.data import dali_loader
from ssr_fast.data.dali_loader import Output, not_supported_reasons
from ssr_fast.errors import UserError
from tests.data.dali_source import CPU, EVERY, JPEG, PIXELS, PLACES, VALID, Fake, assert_steps, load

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    bool(not_supported_reasons(CPU)), reason="; ".join(not_supported_reasons(CPU)) or "DALI can be used"
)


@pytest.mark.parametrize("slots, queue, first", [(1, 1, 0), (3, 2, 7), (2, 5, 1000)])
def test_every_part_has_the_torch_paths_bits(slots: int, queue: int, first: int) -> None:
    source = Fake(EVERY, slots)
    batches = list(load(source, first, first + 4, queue=queue))
    assert len(batches) == 4
    assert_steps(source, batches, first)
    for part in ("source_image", "target_image"):
        assert batches[0][part].shape == (slots, 3, 33, 47)
        assert batches[0][part].is_contiguous(memory_format=torch.channels_last)
    drawn = [source.drawn(output, s, k) for output in (PIXELS, JPEG) for s in range(first, first + 4) for k in range(2)]
    assert {flip for *_, flip in drawn} == {False, True}
    assert {image.shape[0] < 33 for image, *_ in drawn} == {False, True}


@pytest.mark.parametrize("outputs", [(PIXELS, VALID), (JPEG,), (PLACES,)], ids=["target only", "jpeg", "no image"])
def test_any_set_of_parts(outputs: tuple[Output, ...]) -> None:
    source = Fake(outputs)
    assert_steps(source, list(load(source, 3, 6)), 3)


@pytest.mark.parametrize(
    "options", [{"quality": 80}, {"quality": 95, "progressive": True}, {"exif": "rotated"}], ids=str
)
def test_other_jpeg_files_have_pillows_bits_too(options: dict[str, Any]) -> None:
    if "exif" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    source = Fake((JPEG,), options=options)
    assert_steps(source, list(load(source, 0, 4)), 0)


def test_all_values_are_normalised_to_the_same_bits() -> None:
    class Values(Fake):
        def drawn(self, output: Output, step: int, slot: int) -> tuple[NDArray[np.uint8], tuple[int, int], bool]:
            return np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2), (0, 0), bool(slot)

    source = Values((PIXELS,), crop=(1, 256))
    assert_steps(source, list(load(source, 0, 1)), 0)


def test_processes_give_the_same_batches_and_resume_at_any_step() -> None:
    source, reports = Fake(EVERY, slots=3), []
    batches = list(load(source, 5, 17, workers=2, report=reports.append))  # kept while later ones are made
    assert len(batches) == 12
    assert_steps(source, batches, 5)
    assert len(reports) == 1 and "2 worker processes" in reports[0] and "a queue of 2 batches" in reports[0]


def test_every_tensor_has_its_memory_for_itself() -> None:
    source = Fake(EVERY)
    batches = list(load(source, 0, 6))
    starts = [part.untyped_storage().data_ptr() for batch in batches for part in batch.values()]
    assert len(set(starts)) == len(starts) == 6 * len(EVERY)
    for batch in batches[1:]:
        for part in batch.values():
            part.zero_()
    assert_steps(source, batches[:1], 0)


def test_no_steps_start_nothing() -> None:
    assert list(load(None, 4, 4, workers=2)) == []


@pytest.mark.parametrize("workers, copies", [(0, 1), (1, 2)])
def test_the_memory_is_that_of_the_shapes(workers: int, copies: int) -> None:
    source = Fake((PIXELS, PLACES), slots=4, crop=(512, 1024))
    line = dali_loader._memory(source, source(0, 0), CPU, workers, 8)
    read, made = 512 * 1024 * 3 + 1 + 8 * 3 * 8, 512 * 1024 * 3 * 4 + 8 * 3 * 8
    assert f"{copies * 32 * read / 2**20:.1f} MiB and" in line and f"batches {32 * made / 2**20:.1f} MiB" in line


class Broken(Fake):
    """Cannot read step 6; its JPEG of step 6 is damaged if `jpeg` is among its outputs."""

    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        arrays = super().__call__(step, slot)
        if step == 6 and slot == self.slots - 1:
            if self.outputs[0].kind != "jpeg":
                raise UserError("images/6.png cannot be decoded; restore it")
            arrays = (arrays[0][: len(arrays[0]) // 3], *arrays[1:])
        return arrays


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("queue", [1, 4])
def test_an_error_of_the_source_comes_after_the_good_steps(workers: int, queue: int) -> None:
    source, good = Broken((PIXELS,), slots=3), []
    with pytest.raises(UserError) as caught:
        for batch in load(source, 4, 20, workers, queue):
            good.append(batch)
    assert str(caught.value) == "images/6.png cannot be decoded; restore it"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert len(good) == 2
    assert_steps(source, good, 4)


def test_an_error_in_the_first_sample_comes_as_it_is() -> None:
    with pytest.raises(UserError, match="^images/6.png cannot be decoded; restore it$"):
        next(load(Broken((PIXELS,), slots=1), 6, 8, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_jpeg_names_step_and_files(workers: int) -> None:
    source, good = Broken((JPEG, PIXELS), slots=2), []
    with pytest.raises(UserError) as caught:
        for batch in load(source, 4, 20, workers, 4):
            good.append(batch)
    text = str(caught.value)
    assert text.startswith("an image of step 6 cannot be decoded (") and "one of 6-0.jpg, 6-1.jpg has" in text
    assert "\n" not in text and "Traceback" not in text and "pipeline" not in text
    assert_steps(source, good, 4)
    assert len(good) == 2


class Faulty(Fake):
    def __call__(self, step: int, slot: int) -> tuple[NDArray[Any], ...]:
        if step == 2:
            raise KeyError("a fault of ours")
        return super().__call__(step, slot)


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_faults_keep_their_traceback(workers: int) -> None:
    with pytest.raises(Exception, match="a fault of ours") as caught:
        list(load(Faulty((PIXELS,)), 0, 9, workers))
    assert not isinstance(caught.value, UserError)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not_supported_reasons(CPU) == []
    assert not_supported_reasons(torch.device("mps")) == ["DALI loads for CPUs and NVIDIA GPUs, and the device is mps"]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "an AMD GPU" in not_supported_reasons(GPU)[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install nvidia-dali-cuda130" in not_supported_reasons(CPU)[0]


def test_a_dali_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libdali.so: cannot open\n shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    (reason,) = not_supported_reasons(CPU)
    assert reason.endswith("cannot be imported (OSError: libdali.so: cannot open shared object file)")


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_brings_the_same_batches(workers: int) -> None:
    source = Fake(EVERY, slots=3)
    batches = list(load(source, 5, 15, workers, device=GPU))
    assert len(batches) == 10
    for step, batch in enumerate(batches, 5):
        for output in source.outputs:
            got, expected = batch[output.part], source.expected(output, step)
            if output.kind == "array":
                assert got.is_pinned() and torch.equal(got, expected)
                continue
            assert got.is_cuda and got.is_contiguous(memory_format=torch.channels_last)
            if output.kind == "pixels":
                assert torch.equal(got.cpu(), expected)
            else:  # nvJPEG is not libjpeg-turbo; one grey level is at most 1 / 57
                assert (got.cpu() - expected).abs().max() < 3.01 / 57
