"""A batch cut into micro-batches: in order, every part of it, without a copy."""

import dataclasses

import pytest
import torch

from ssr_fast.data.batch import Batch


def whole(images: int, source: bool = True) -> Batch:
    """A batch with every part, in which each number is its own."""

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = int(torch.tensor(shape).prod())
        return torch.arange(count, dtype=torch.float64).reshape(shape).to(dtype)

    of_source = images if source else 0
    return Batch(
        source_image=numbers(of_source, 4, 6, 3, dtype=torch.uint8),
        source_label=numbers(of_source, 4, 6, dtype=torch.uint8),
        target_image=numbers(images, 4, 6, 3, dtype=torch.uint8),
        target_valid=numbers(images, 4, 6) % 5 > 0,
        source_features=numbers(of_source, 2, 3, 5).permute(0, 3, 1, 2),
        target_segments=numbers(images, 4, 6, dtype=torch.int32),
        target_features=numbers(images, 2, 3, 5).permute(0, 3, 1, 2),
        source_places=numbers(of_source, 5, 3, dtype=torch.float64),
        target_places=numbers(images, 5, 3, dtype=torch.float64),
    )


@pytest.mark.parametrize(("images", "count"), [(4, 2), (6, 3), (3, 3), (5, 1)])
def test_all_parts_are_split_in_order_and_none_is_copied(images: int, count: int) -> None:
    batch = whole(images)
    assert len(batch.parts()) == len(dataclasses.fields(Batch))  # a part that is new belongs in here
    shares = batch.split(count)
    assert len(shares) == count
    for name, part in batch.parts().items():
        cut = [share.parts()[name] for share in shares]
        assert torch.equal(torch.cat(cut), part) and {len(share) for share in cut} == {images // count}
        assert all(share.untyped_storage().data_ptr() == part.untyped_storage().data_ptr() for share in cut), name
        assert all(share.stride() == part.stride() and share.dtype == part.dtype for share in cut), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_without_source_gives_each_share_none(count: int) -> None:
    batch = whole(4, source=False)
    for share in batch.split(count):
        assert share.source_image.shape == (0, 4, 6, 3) and share.source_label.shape == (0, 4, 6)
        assert share.source_image.dtype == torch.uint8 and len(share.target_image) == 4 // count
        assert share.source_features is not None and share.source_features.shape == (0, 5, 2, 3)


def test_parts_that_are_absent_stay_absent() -> None:
    batch = dataclasses.replace(whole(4), source_features=None, target_segments=None, target_places=None)
    for share in batch.split(2):
        assert share.parts().keys() == batch.parts().keys() and share.source_features is None


def test_one_share_is_the_batch_itself() -> None:
    batch = whole(3)
    assert batch.split(1) == [batch] and batch.split(1)[0] is batch


@pytest.mark.parametrize(("images", "count"), [(4, 3), (5, 2), (2, 4), (1, 2)])
def test_uneven_shares_are_refused(images: int, count: int) -> None:
    for source in (True, False):
        with pytest.raises(ValueError, match=f"a batch of {images} images a domain cannot be split into {count} equal"):
            whole(images, source).split(count)


def test_shares_of_shares_are_shares() -> None:
    batch = whole(6)
    nested = [part for share in batch.split(3) for part in share.split(2)]
    for one, other in zip(nested, batch.split(6), strict=True):
        assert all(torch.equal(part, other.parts()[name]) for name, part in one.parts().items())
