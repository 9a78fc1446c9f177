"""A loss that is not finite on one rank: all ranks skip the step without a trace, or end the run with one sentence."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.ranks_run import RUN, check_same, errors, resume, spoil, states
from tests.faults.test_resume import rows
from tests.ranks import check, train

pytestmark = pytest.mark.usefixtures("own_cache")


def skips(tmp_path: Path, mode: str, who: Sequence[int], factor: float, steps: Sequence[int], accumulate: int) -> None:
    """Spoil the last micro-batch of some steps."""
    shares = [accumulate * (step + 1) - 1 for step in steps]
    run = tmp_path / "run"
    options = [f"--parallel.mode={mode}", f"--optim.accumulate={accumulate}", "--run.log_every=1"]
    ended = train(tmp_path, 2, [*RUN, *options, "--run.dir", str(run)], (spoil, (who, factor, shares, tmp_path)))
    check(ended)
    check_states([states(tmp_path, rank) for rank in (0, 1)], steps, mode)
    trained = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 9))
    for number, row in enumerate(trained):
        assert row["skipped"] == sum(step <= number for step in steps)
        assert (row["skipped_in_row"] > 0) == (number in steps)
        assert (row["grad_norm"] is None) == (row["loss"] is None) == (number in steps)


def check_states(found: list[list[dict]], steps: Sequence[int], mode: str) -> None:
    """What the ranks held before and after each step: equal on all of them, and unchanged by a skipped step."""
    for number, ranks in enumerate(zip(*found, strict=True)):
        first = ranks[0]
        assert {rank["step"] for rank in ranks} == {number}
        assert any("exp_avg_sq" in name for name in first["before"]) and any(
            "teacher" in name for name in first["before"]
        )
        for when in ("before", "after"):
            for rank in ranks[1:]:
                same = [name for name in first[when] if mode == "ddp" or name.startswith("statistics")]
                assert same and [name for name in same if rank[when][name] != first[when][name]] == []
        for rank in ranks:
            changed = {name for name in rank["before"] if rank["after"][name] != rank["before"][name]}
            assert (changed == set()) == (number in steps), (number, sorted(changed))


@pytest.mark.parametrize(
    ("mode", "who", "factor", "steps", "accumulate"),
    [
        ("ddp", (1,), math.nan, (3,), 2),
        pytest.param("fsdp", (1,), math.nan, (3,), 1, marks=pytest.mark.slow),
        pytest.param("ddp", (0,), math.inf, (3,), 1, marks=pytest.mark.slow),
        pytest.param("ddp", (1,), math.nan, (0, 2, 3, 7), 1, marks=pytest.mark.slow),
        pytest.param("ddp", (0, 1), math.nan, (5,), 1, marks=pytest.mark.slow),
        pytest.param("fsdp", (0,), -math.inf, (2, 5), 1, marks=pytest.mark.slow),
        pytest.param("fsdp", (1,), math.nan, (1, 3), 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_skipped_on_all_ranks(
    mode: str, who: tuple[int, ...], factor: float, steps: tuple[int, ...], accumulate: int, tmp_path: Path
) -> None:
    skips(tmp_path, mode, who, factor, steps, accumulate)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_too_many_end_the_run_with_one_sentence_and_it_goes_on_from_before(mode: str, tmp_path: Path) -> None:
    options = [*RUN, "--run.log_every=1", "--guard.abort_after=2", f"--parallel.mode={mode}", "--run.dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    check(train(tmp_path, 2, [*options, str(whole)]))
    ended = train(tmp_path, 2, [*options, str(parts)], (spoil, ((1,), math.nan, (4, 5), tmp_path)))
    check(ended, 2)
    assert [len(errors(rank)) for rank in ended] == [1, 0], [rank.err for rank in ended]
    (line,) = errors(ended[0])
    last = re.escape(str(parts / "checkpoints" / "step-3"))
    assert re.match(rf"error: .*2 steps in a row were skipped .*the last good checkpoint is {last};.*--resume", line), (
        line
    )
    check(resume(tmp_path, parts))
    check_same(parts, whole)


def test_no_step_that_ever_succeeds_is_one_sentence(tmp_path: Path) -> None:
    options = [*RUN, "--run.log_every=2", "--run.dir", str(tmp_path / "run")]
    ended = train(tmp_path, 2, options, (spoil, ((0,), math.nan, (0, 1), tmp_path)))
    check(ended, 2)
    assert [len(errors(rank)) for rank in ended] == [1, 0], [rank.err for rank in ended]
    assert "the gradient was not finite in any of the first 2 steps" in ended[0].err
