"""The search: candidate i of every kernel in one run, since the kernels of an op do not depend on one another.

Nothing here knows of a device: what runs a table and what times tables is handed in.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ssr_kernels.tables import Blocks, Row

LEAST_GAIN = 0.02
"""A candidate that gains less than this of its kernel's time is not worth a changed table."""

Table = dict[str, Row]


@dataclass(frozen=True)
class Knob:
    """One entry of an op's table: the blocks of a kernel, or one of its list of blocks."""

    row: str
    kernel: str
    place: int | None = None

    def __str__(self) -> str:
        return f"{self.row} {self.kernel}" + ("" if self.place is None else f"[{self.place}]")

    def get(self, table: Table) -> Blocks:
        """The entry."""
        found = table[self.row][self.kernel]
        blocks: Blocks = found if self.place is None else found[self.place]
        return blocks

    def put(self, table: Table, blocks: Blocks) -> Table:
        """A copy of the table with other blocks in this place."""
        table = copy.deepcopy(table)
        if self.place is None:
            table[self.row][self.kernel] = dict(blocks)
        else:
            table[self.row][self.kernel][self.place] = dict(blocks)
        return table


def trials_of(table: Table, candidates: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[Knob, list[Blocks]]:
    """Each entry that has candidates, with what to try: the table's own blocks first, then those that differ."""
    found: dict[Knob, list[Blocks]] = {}
    for row, kernels in candidates.items():
        for kernel, options in kernels.items():
            listed = isinstance(table[row][kernel], list)
            for place, choices in enumerate(options) if listed else [(None, options)]:
                knob = Knob(row, kernel, place)
                own = knob.get(table)
                others = [{**own, **choice} for choice in choices]
                if tried := [blocks for number, blocks in enumerate(others) if blocks not in [own, *others[:number]]]:
                    found[knob] = [own, *tried]
    return found


def with_trial(table: Table, trials: Mapping[Knob, Sequence[Blocks]], number: int) -> Table:
    """The table with candidate `number` of every entry that has so many."""
    for knob, choices in trials.items():
        if number < len(choices):
            table = knob.put(table, choices[number])
    return table


Times = dict[Knob, list[float]]
"""Device time of each entry's kernel in each repetition, microseconds; without those that a case does not use."""


class Rig(Protocol):
    """What runs an op on a device."""

    def fault(self, case: Any, table: Table, may_spill: bool = False) -> str:
        """Run a case twice; why the table is of no use: it raised, spilled, was wrong or not repeatable. Or nothing."""

    def times(self, case: Any, tables: Sequence[Table]) -> list[Times]:
        """Run a case with each table in turn, again and again: the same number of repetitions of each."""


@dataclass
class Choice:
    """What was found of one entry of the table."""

    knob: Knob
    old: Blocks
    new: Blocks
    old_us: float | None = None
    """Median of each case, geometric mean over the cases; None: no case measured it."""
    new_us: float | None = None


@dataclass
class Outcome:
    """What a search found."""

    table: Table
    choices: list[Choice] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Candidates that are of no use, with the reason."""
    unfinished: str = ""
    """What the time did not suffice for."""


def search(
    table: Table, trials: Mapping[Knob, Sequence[Blocks]], cases: Sequence[Any], rig: Rig, spent: Callable[[], bool]
) -> Outcome:
    """The best blocks of each entry over the cases.

    Args:
        table: the op's present one.
        trials: what to try of each entry, its present blocks first.
        cases: sizes on which to judge; each must be able to run the present table.
        rig: runs and times tables.
        spent: whether the time is over; asked before each case and each trial.
    """
    outcome = Outcome(table)
    left = {knob: list(range(1, len(choices))) for knob, choices in trials.items()}
    measured: list[dict[tuple[Knob, int], tuple[list[float], list[float]]]] = []
    for number, case in enumerate(cases):
        if not spent():
            if why := rig.fault(case, table, may_spill=True):
                raise RuntimeError(f"the present table fails on {case.name}: {why}")
            _drop_faulty(table, trials, left, case, rig, spent, outcome)
        if spent():
            outcome.unfinished = f"{len(cases) - number} of {len(cases)} cases not measured"
            break
        measured.append(_measure(table, trials, left, case, rig))
    for knob, choices in trials.items():
        outcome.choices.append(_choose(knob, choices, left[knob], measured))
        outcome.table = knob.put(outcome.table, outcome.choices[-1].new)
    return outcome


def _numbers(left: Mapping[Knob, Sequence[int]]) -> list[int]:
    return sorted({number for numbers in left.values() for number in numbers})


def _drop_faulty(
    table: Table,
    trials: Mapping[Knob, Sequence[Blocks]],
    left: dict[Knob, list[int]],
    case: Any,
    rig: Rig,
    spent: Callable[[], bool],
    outcome: Outcome,
) -> None:
    """Run candidate i of every entry at once; where that fails each alone, and leave out what fails."""
    for number in _numbers(left):
        if spent():
            return
        together = [knob for knob in trials if number in left[knob]]
        why = rig.fault(case, with_trial(table, {knob: trials[knob] for knob in together}, number))
        if not why:
            continue
        alone = {knob: rig.fault(case, knob.put(table, trials[knob][number])) for knob in together}
        guilty = [knob for knob, fault in alone.items() if fault]
        for knob in guilty or together:  # none alone: they fail together, and which of them is not known
            left[knob].remove(number)
            reason = alone[knob] or f"fails together with the others' candidate {number}: {why}"
            outcome.dropped.append(f"{knob} {trials[knob][number]} on {case.name}: {reason}")


def _measure(
    table: Table, trials: Mapping[Knob, Sequence[Blocks]], left: Mapping[Knob, Sequence[int]], case: Any, rig: Rig
) -> dict[tuple[Knob, int], tuple[list[float], list[float]]]:
    """(entry, candidate) -> its times and those of the present blocks, repetition by repetition."""
    numbers = _numbers(left)
    chosen = [{knob: trials[knob] for knob in trials if number in left[knob]} for number in numbers]
    tables = [with_trial(table, choice, number) for choice, number in zip(chosen, numbers, strict=True)]
    own, *others = rig.times(case, [table, *tables])
    return {
        (knob, number): (found[knob], own[knob])
        for number, choice, found in zip(numbers, chosen, others, strict=True)
        for knob in choice
        if knob in found and knob in own
    }


def _choose(
    knob: Knob,
    choices: Sequence[Blocks],
    left: Sequence[int],
    measured: Sequence[Mapping[tuple[Knob, int], tuple[list[float], list[float]]]],
) -> Choice:
    """The candidate of the least geometric mean relative to the present blocks, if the gain is beyond the noise."""
    choice = Choice(knob, choices[0], choices[0])
    ratios: dict[int, float] = {}
    for number in left:
        pairs = [found[knob, number] for found in measured if (knob, number) in found]
        if not pairs:
            continue
        middle, high = (statistics.geometric_mean(marks) for marks in zip(*map(_marks, pairs), strict=True))
        choice.old_us = choice.new_us = statistics.geometric_mean(statistics.median(own) for _, own in pairs)
        if middle <= 1 - LEAST_GAIN and high < 1:
            ratios[number] = middle
    if ratios and choice.old_us is not None:
        best = min(ratios, key=lambda number: ratios[number])
        choice.new, choice.new_us = choices[best], choice.old_us * ratios[best]
    return choice


def _marks(pair: tuple[list[float], list[float]]) -> Iterator[float]:
    """Median and 80th percentile of candidate over present, each repetition against its neighbour."""
    ratios = [candidate / own for candidate, own in zip(*pair, strict=True)]
    return iter((statistics.median(ratios), statistics.quantiles(ratios, n=5, method="inclusive")[3]))
