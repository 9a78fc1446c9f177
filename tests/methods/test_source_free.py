"""Source-free adaptation against brute-force definitions, and the rules of a step."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ssr_fast.methods import source_free
from ssr_fast.methods.segments import Vote, at_stride, gather_rows, groups, vote
from ssr_fast.methods.source_free import ClassConfidence
from ssr_kernels import counter
from ssr_kernels.contrast import contrast_loss, loss_backends, sample_pairs
from tests.methods.support import K, make_batch, make_source_free, without_source
from tests.syncfree import NoHostSync

VARIANTS = {
    "contrast": {},
    "vote": {"vote": True},
    "alone": {"contrast": 0.0},
    "vote alone": {"contrast": 0.0, "vote": True},
    "before its start": {"contrast_start": 10},
}


def batch_of(seed=0):
    """Target images in which every segment has one colour, so that the network tells segments apart."""
    batch = without_source(make_batch(seed=seed))
    colors = torch.randint(0, 256, (12, 3), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    return dataclasses.replace(batch, target_image=colors[batch.target_segments.long()])


@pytest.fixture
def two_classes(monkeypatch):
    """Every other segment is of class 1, the rest of class 0: a network without training may see one class only."""

    def planted(samples, *arguments):
        rank = torch.arange(samples.segment.shape[1]).expand_as(samples.segment)
        return Vote(torch.where(samples.segment > 0, rank % 2, -1), samples.segment.to(torch.int64))

    monkeypatch.setattr(source_free, "vote", planted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_needs_no_sync_and_no_generator(variant, monkeypatch, two_classes):
    monkeypatch.setenv("SSR_FAST_KERNELS", "reference")  # no mode sees into compiled code
    method, batch = make_source_free(**VARIANTS[variant]), batch_of()
    before = torch.get_rng_state()
    with NoHostSync():
        terms = method.losses(batch, 3)
        terms["loss"].backward()
    assert torch.equal(before, torch.get_rng_state())
    assert all(value.ndim == 0 and math.isfinite(float(value.detach())) for value in terms.values())
    assert terms.keys() == {"loss", *method.own_metrics}
    assert (float(terms["loss/contrast"]) > 0) == (variant in ("contrast", "vote"))


def test_a_step_contrasts_what_triton_takes(monkeypatch):
    """Otherwise `auto` would run the PyTorch form on every GPU, and only be slow."""
    calls, op = [], source_free.contrast_loss

    def recorded(*arguments):
        calls.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(source_free, "contrast_loss", recorded)
    make_source_free().losses(batch_of(), 3)["loss"].backward()
    ((*tensors, _),) = calls
    assert all(tensor.is_contiguous() for tensor in tensors) and tensors[0].shape[1] <= loss_backends.MAX_WIDTH
    assert tensors[0].dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_the_student_and_the_projection_alone(variant, two_classes):
    method = make_source_free(**VARIANTS[variant])
    method.losses(batch_of(), 0)["loss"].backward()
    trained = {id(p) for module in method.trainable().values() for p in module.parameters()}
    with_gradient = {id(p) for p in method.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient <= trained
    assert any(id(p) in with_gradient for p in method.projection.parameters()) == (variant in ("contrast", "vote"))
    assert ("projection" in method.saved()) == ("extra" in method.trainable()) == (method.config.contrast > 0)
    assert {"student", "teacher", "confidence"} <= method.saved().keys()


def test_equal_inputs_give_bit_equal_losses_and_gradients():
    def once():
        method = make_source_free(vote=True)
        losses = [method.losses(batch_of(step), step)["loss"] for step in range(3)]
        losses[-1].backward()
        return [float(loss.detach()) for loss in losses], [p.grad for p in method.student.parameters()]

    (losses, grads), (again, grads_again) = once(), once()
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True) if a is not None)


def test_the_teacher_moves_at_one_rate_from_the_first_step():
    method = make_source_free(momentum=0.9)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    start = [p.clone() for p in method.teacher.net.parameters()]
    method.teacher.follow(method.student, 0)
    for before, after in zip(start, method.teacher.net.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.1)


def test_class_confidence_by_brute_force(seed):
    confidence = ClassConfidence(4, 0.75)
    labels, sure = torch.randint(0, 3, (2, 5, 6)), torch.rand(2, 5, 6)
    for _ in range(2):
        confidence.update(labels, sure)
    for number in range(3):
        now = sure[labels == number].mean()
        assert math.isclose(confidence.mean[number], 1.0 * 0.75**2 + now * (1 - 0.75**2), rel_tol=1e-5)
    assert confidence.mean[3] == 1.0  # a class that does not occur keeps its mean
    limits = confidence.thresholds(0.8)
    assert math.isclose(limits.max(), 0.8, rel_tol=1e-6)
    torch.testing.assert_close(limits / limits[0], confidence.mean / confidence.mean[0])


def test_at_stride_takes_the_ids_under_the_centres():
    segments = torch.arange(12 * 20, dtype=torch.int32).view(1, 12, 20)
    small = at_stride(segments, (3, 5))
    assert torch.equal(small, segments[:, 2::4, 2::4])
    assert torch.equal(at_stride(segments, (12, 20)), segments)


def test_votes_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    segments = torch.from_numpy(rng.integers(0, 9, (3, 10, 12)).astype(np.int32)) * 7000
    labels, sure = torch.from_numpy(rng.integers(0, 3, (3, 10, 12))), torch.from_numpy(rng.random((3, 10, 12)) < 0.8)
    labels[:, :5] = 1  # so that there are majorities
    key = torch.zeros((), dtype=torch.int64)
    samples = sample_pairs(segments, key, 5, 4)
    voted = vote(samples, segments, labels, sure, 3, 0.51)
    painted = voted.paint(segments)
    found = 0
    for image in range(3):
        classes = {0: -1}
        for rank, name in enumerate(samples.segment[image].tolist()):
            inside = segments[image] == name
            counts = np.bincount(labels[image][inside & sure[image]].numpy(), minlength=3)
            wanted = int(counts.argmax()) if counts.max() >= 0.51 * int(inside.sum()) else -1
            assert voted.klass[image, rank] == wanted
            classes[name] = wanted
            found += wanted >= 0
        for name in segments[image].unique().tolist():
            assert (painted[image][segments[image] == name] == classes.get(name, -1)).all()
    assert found > 0 and (voted.klass < 0).any()


def test_an_image_without_segments_votes_for_nothing():
    segments = torch.zeros(1, 6, 6, dtype=torch.int32)
    samples = sample_pairs(segments, torch.zeros((), dtype=torch.int64), 3, 2)
    voted = vote(samples, segments, torch.ones(1, 6, 6, dtype=torch.int64), segments == 0, 3, 0.6)
    assert (voted.klass == -1).all() and (voted.paint(segments) == -1).all()
    assert (groups(samples) == -1).all()


def test_rows_and_groups_are_those_of_the_samples(seed):
    feature = torch.randn(2, 3, 6, 7)
    segments = torch.randint(0, 4, (2, 6, 7), dtype=torch.int32)
    samples = sample_pairs(segments, torch.zeros((), dtype=torch.int64), 3, 5)
    rows = gather_rows(feature, samples.pixel).view(2, 3, 5, 3)
    group = groups(samples)
    for image, rank, place in np.ndindex(2, 3, 5):
        pixel = int(samples.pixel[image, rank, place])
        assert (group[image, rank, place] == (image * 3 + rank if pixel >= 0 else -1)).all()
        if pixel >= 0:
            assert torch.equal(rows[image, rank, place], feature[image, :, pixel // 7, pixel % 7])
            assert segments[image, pixel // 7, pixel % 7] == samples.segment[image, rank]


def test_labels_weights_and_contrast_by_brute_force():
    method, batch = make_source_free(vote=True, ignore_top=0.25, ignore_bottom=0.0), batch_of()
    batch.target_valid[:, :, :10] = False
    target = torch.randn(2, 3, 64, 96)
    key = counter.fold(torch.zeros((), dtype=torch.int64), 3)
    before = method.confidence.mean.clone()
    pseudo = method.label(batch, target, key)
    logits = method.teacher(target)
    surest, klass = logits.softmax(1).max(1)
    limits = 0.1 * method.confidence.mean / method.confidence.mean.max()
    assert not torch.equal(before, method.confidence.mean)
    small = at_stride(batch.target_segments, (16, 24))
    samples = sample_pairs(small, key, 8, 6)
    voted = vote(samples, small, klass, surest >= limits[klass], K, 0.51)
    painted = voted.paint(batch.target_segments)
    plain = make_source_free(ignore_top=0.25, ignore_bottom=0.0)
    unvoted = plain.label(batch, target, key)
    assert torch.equal(pseudo.label, torch.where(painted >= 0, painted.to(torch.uint8), unvoted.label))
    assert (painted >= 0).any() and not torch.equal(pseudo.label, unvoted.label)
    for found in (pseudo, unvoted):
        assert (found.weight[:, :16] == 0).all() and (found.weight[:, :, :10] == 0).all()
    inside = (painted >= 0)[:, 16:, 10:]
    assert (pseudo.weight[:, 16:, 10:][inside] == 1).all()

    fused = torch.randn(2, 16, 16, 24)
    embedding = method.projection(gather_rows(fused, samples.pixel))
    wanted = contrast_loss(
        embedding,
        groups(samples).flatten(),
        voted.klass[:, :, None].expand(2, 8, 6).flatten(),
        0.1,
        backend="reference",
    )
    torch.testing.assert_close(method.contrast(fused, pseudo), wanted)
