"""Advice when a step does not fit into the GPU's memory: the arithmetic, and the sentence, from fabricated readings."""

import itertools

import pytest
import torch

from ssr_fast.engine.memory import GIB, MemoryUse, largest_batch, out_of_memory, requested_bytes, smaller_crop, split
from ssr_fast.errors import UserError

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
)


def used(capacity=80.0, resident=4.0, peak=78.0, requested=2.5, others=0.5):
    sizes = {"capacity": capacity, "resident": resident, "peak": peak, "requested": requested, "others": others}
    return MemoryUse(**{name: round(size * GIB) for name, size in sizes.items()})


def advice(use, batch_size=8, accumulate=1, crop=(512, 512), recompute=False):
    error = torch.OutOfMemoryError(MESSAGE)
    options = {"batch_size": batch_size, "accumulate": accumulate, "crop": crop, "recompute": recompute}
    made = out_of_memory(error, used=use, **options, where="step 12 on cuda:3")
    assert isinstance(made, UserError) and made.__cause__ is error
    assert "\n" not in str(made) and str(made).startswith("out of memory in step 12 on cuda:3, at least ")
    return str(made)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (MESSAGE, 2.5 * GIB),
        ("Tried to allocate 20.00 MiB (GPU 0; ...)", 20 * 2**20),
        ("Tried to allocate 512 bytes.", 512),
        ("Tried to allocate 1.25 TiB.", 1.25 * 2**40),
        ("CUDA out of memory.", 0),
        ("", 0),
        ("Tried to allocate more than 1EB memory.", 0),
    ],
)
def test_what_was_requested_is_read_from_the_message(text, size):
    assert requested_bytes(torch.OutOfMemoryError(text)) == size


def test_the_largest_batch_is_by_the_steps_own_bytes():
    # own bytes 40 of 8 images, room 26: 5.2 images
    use = used(capacity=40, resident=12, peak=50, requested=2, others=2)
    assert use.need == 52 * GIB and use.room == 26 * GIB and use.share() == pytest.approx(26 / 40)
    assert largest_batch(use, 8) == 5
    text = advice(use)
    assert "8 -> at most 5, an image pair takes 5.0 GiB or more" in text
    assert "--data.batch_size 4 --optim.accumulate 2 keeps" in text and "BatchNorm" in text
    assert "at least 52.0 GiB of the GPU's 40.0 GiB needed (12.0 GiB before the step" in text
    assert "--run.recompute_blocks true" in text and "--data.crop" not in text
    assert "--run.recompute_blocks" not in advice(use, recompute=True)
    assert "--data.batch_size 4 --optim.accumulate 6 keeps" in advice(use, accumulate=3)


def test_a_batch_is_split_into_equal_parts_that_fit():
    for batch, fits in itertools.product(range(1, 13), repeat=2):
        part = split(batch, fits)
        assert 1 <= part <= min(fits, batch) and batch % part == 0
        assert not any(batch % larger == 0 for larger in range(part + 1, min(fits, batch) + 1))


def test_a_prime_batch_goes_one_by_one():
    assert "--data.batch_size 1 --optim.accumulate 7 keeps" in advice(used(), batch_size=7)


def test_the_batch_that_failed_is_never_recommended():
    # the numbers say that it fits: the memory is in pieces, or more was to come
    use = used(peak=60, requested=5)
    assert use.need + use.others < use.capacity
    assert largest_batch(use, 8) == 7
    assert "expandable_segments" in advice(use)
    assert "expandable_segments" not in advice(used())
    assert "expandable_segments" not in advice(used(peak=60, requested=0))  # it may have asked for anything


def test_a_batch_of_one_lowers_the_crop_by_area():
    use = used(capacity=24, resident=4, peak=28, requested=0, others=0)  # room 20 of 24
    text = advice(use, batch_size=1, crop=(512, 1024))
    assert "--data.crop 512 1024 -> at most 448 928" in text  # sqrt(20 / 24) = 0.913
    assert "--data.batch_size" not in text and "--run.recompute_blocks true" in text
    assert smaller_crop((512, 1024), 20 / 24) == (448, 928)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("crop", [(512, 512), (500, 300), (1024, 64), (33, 33), (64, 64)])
def test_a_smaller_crop_is_smaller(crop, share):
    smaller = smaller_crop(crop, share)
    if smaller is None:
        assert min(crop) * share**0.5 < 32 or min(crop) <= 32
        return
    assert all(side % 32 == 0 and 0 < side < whole for side, whole in zip(smaller, crop, strict=True))
    assert smaller[0] * smaller[1] <= share * crop[0] * crop[1]


def test_not_even_one_image_fits():
    text = advice(used(capacity=24, resident=4, peak=300, requested=24, others=0))  # room 20 of 320, of 8 images
    assert "not one image a domain fits, an image pair takes 40.0 GiB or more" in text
    assert "--data.batch_size 1 --optim.accumulate 8 keeps" in text
    assert "and lower --data.crop 512 512 -> at most 352 352" in text  # half the area


def test_the_rest_alone_does_not_fit():
    text = advice(used(capacity=24, resident=23.5, peak=23.6, requested=0.1, others=0.5))
    assert "no batch fits beside that: shard the student (--parallel.mode fsdp), or take a smaller" in text
    assert "--data.batch_size" not in text and "other processes" not in text


def test_another_process_holds_the_memory():
    text = advice(used(capacity=24, resident=14, peak=15, requested=1, others=18))
    assert "18.0 GiB held by other processes" in text
    assert "no batch fits beside that: end the other processes on this GPU" in text and "fsdp" in text
    text = advice(used(capacity=24, resident=4, peak=12, requested=1, others=12))  # room 8 of 9
    assert "12.0 GiB held by other processes" in text and "end the other processes" in text and "at most 7" in text
    assert "other processes" not in advice(used(others=0.5))  # CUDA itself


@pytest.mark.parametrize("readings", [{"peak": 3.0, "requested": 0.5}, {"peak": 4.0, "requested": 0.0}])
def test_readings_that_say_nothing_give_a_guess_that_is_called_one(readings):
    use = used(**readings)
    assert use.share() is None and largest_batch(use, 8) is None
    text = advice(use)
    assert "a guess" in text and "--data.batch_size 4 --optim.accumulate 2" in text and "at most" not in text
    assert "at least 4.0 GiB" in text  # what was there before the step was needed anyway


def test_nothing_left_to_lower():
    text = advice(used(peak=3, requested=0), batch_size=1, crop=(32, 32), recompute=True)
    assert text.endswith(": take a smaller --model.backbone or a GPU with more memory")


def test_the_readings_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 68 * GIB)
    use = MemoryUse.read(torch.OutOfMemoryError(MESSAGE), torch.device("cuda", 3), 4 * GIB)
    assert use == used(peak=68, others=9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80 * GIB)  # read a moment apart
    assert MemoryUse.read(torch.OutOfMemoryError(""), torch.device("cuda", 3), 0).others == 0
