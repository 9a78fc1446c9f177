"""The plan: a pure function of (seed, step, rank, world) that partitions an epoch and draws rare classes."""

from types import SimpleNamespace

import numpy as np
import pytest

from ssr_fast.data.plan import Plan, SamplingConfig, acceptable, rare_class_probabilities


def index(count, counts=None, size=(200, 100)):
    samples = tuple(
        SimpleNamespace(width=size[0], height=size[1], counts=None if counts is None else tuple(counts[i]))
        for i in range(count)
    )
    return SimpleNamespace(samples=samples)


def plan(seed=0, sources=7, targets=5, batch=2, crop=(64, 64), counts=None, **sampling):
    sampling.setdefault("rare_class", False)
    return Plan(seed, index(sources, counts), index(targets), None, None, crop, batch, SamplingConfig(**sampling))


def test_pure_function_of_seed_step_rank_and_world():
    one, two = plan(), plan()
    for step in (9, 0, 3, 9):
        assert one(step, 1, 2) == two(step, 1, 2)
    assert plan(seed=1)(3) != plan(seed=0)(3)
    assert one(4) != one(5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_partition_each_epoch(world):
    p = plan(targets=6, batch=1)
    steps = 12 // world
    seen = [p(step, rank, world).target[0].index for step in range(steps) for rank in range(world)]
    first = sorted(seen[:6])
    assert first == list(range(6))
    assert sorted(seen[6:12]) == list(range(6))
    assert seen[:6] != seen[6:12] or plan(seed=3, targets=6, batch=1) is None  # epochs are shuffled anew


def test_the_union_over_ranks_does_not_depend_on_world():
    p = plan(targets=50, batch=1)
    single = [p(step).target[0] for step in range(12)]
    three = [p(step, rank, 3).target[0] for step in range(4) for rank in range(3)]
    assert single == three


def test_crops_lie_inside_the_resized_image():
    p = Plan(
        0, index(3, size=(1914, 1052)), index(3), (1280, 720), None, (512, 512), 4, SamplingConfig(rare_class=False)
    )
    for step in range(20):
        for view in p(step).source:
            assert view.size == (1280, 704)
            for x, y in view.corners:
                assert 0 <= x <= 1280 - 512 and 0 <= y <= 704 - 512


def test_images_smaller_than_the_crop_start_at_the_corner():
    p = plan(crop=(300, 300))
    assert all(view.corners == ((0, 0),) for view in p(0).source)


def test_rare_class_probabilities_match_the_definition_and_skip_absent_classes():
    counts = np.array([900, 99, 0, 1])
    p = rare_class_probabilities(counts, 0.1)
    f = counts / 1000
    expected = np.exp((1 - f) / 0.1) * (counts > 0)
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-12)
    assert p[2] == 0 and p[3] == p.max()


def test_rare_classes_are_drawn_from_files_that_hold_them():
    counts = np.zeros((10, 3), np.int64)
    counts[:, 0] = 19_000
    counts[4, 2] = 1_000
    p = plan(sources=10, counts=counts, rare_class=True, temperature=0.01)
    views = [view for step in range(40) for view in p(step).source]
    rare = [view for view in views if view.rare_class == 2]
    assert len(rare) > 70  # softmax((1 - f) / 0.01) is all but certain to draw class 2
    assert {view.index for view in rare} == {4}
    assert all(view.rare_class != 1 for view in views)


def test_flip_probability():
    flips = [view.flip for step in range(300) for view in plan(flip=0.25)(step).target]
    assert abs(np.mean(flips) - 0.25) < 0.05


def test_acceptable_conditions():
    sampling = SamplingConfig(min_crop_share=0.1, max_class_share=0.75)
    label = np.zeros((10, 10), np.uint8)
    assert not acceptable(label, -1, sampling, 100)  # one class fills it
    label[:4] = 1
    assert acceptable(label, -1, sampling, 100)
    assert not acceptable(label, 2, sampling, 100)
    label[9] = 2
    assert acceptable(label, 2, sampling, 100)
    assert acceptable(label[9:], 2, sampling, 10) is False  # all of what is seen is one class
    loose = SamplingConfig(min_crop_share=0.1, max_class_share=0.9)
    assert acceptable(label[5:], 2, loose, 100)
    assert not acceptable(label[5:], 2, loose, 101)  # less than a tenth of the crop, though a fifth of what is inside
    label[:] = 255
    label[0] = 3
    assert not acceptable(label, -1, sampling, 100)  # all of what is labelled is class 3
