"""The tuner's search with planted times: no device, no kernels."""

from types import SimpleNamespace

import pytest

from bench.tune import search
from bench.tune.search import Knob

TABLE = {
    "r": {"a": {"BM": 16, "num_warps": 4}, "b": {"BM": 16}, "l": [{"TW": 8, "BC": 16}, {"TW": 16, "BC": 16}]},
    "other": {"c": {"BM": 16}},
}
TRIED = {
    "r": {
        "a": [{"BM": 32}, {"BM": 64}, {"BM": 128}],
        "b": [{"BM": 32}, {"BM": 64}],
        "l": [[{"BC": 32}], [{"BC": 64}]],
    }
}
A, B, L0, L1 = Knob("r", "a"), Knob("r", "b"), Knob("r", "l", 0), Knob("r", "l", 1)
CASES = [SimpleNamespace(name="small"), SimpleNamespace(name="large")]


class Planted:
    """A rig of planted times, relative to 100: by knob and the candidate's number; by case where it is a tuple."""

    def __init__(self, factors, faults=None, noise=0.0, uses=lambda case, knob: True):
        self.factors, self.faults, self.noise, self.uses = factors, faults or {}, noise, uses
        self.tried: list[tuple[str, dict]] = []

    def number(self, table, knob):
        return search.trials_of(TABLE, TRIED)[knob].index(knob.get(table))

    def fault(self, case, table, may_spill=False):
        self.tried.append((case.name, {knob: self.number(table, knob) for knob in (A, B, L0, L1)}))
        hits = [why for (knob, number), why in self.faults.items() if knob and self.number(table, knob) == number]
        if not hits and None in [knob for knob, _ in self.faults]:
            together = sum(self.number(table, knob) == 1 for knob in (A, B, L0, L1))
            return "only together" if together > 1 else ""
        return "; ".join(hits)

    def times(self, case, tables):
        found = []
        for table in tables:
            entry = {}
            for knob in (A, B, L0, L1):
                if not self.uses(case, knob):
                    continue
                number = self.number(table, knob)
                factor = self.factors.get((knob, number), 1.0) if number else 1.0
                factor = factor[CASES.index(case)] if isinstance(factor, tuple) else factor
                wobble = [1 + self.noise * (-1) ** i * (i % 3) for i in range(10)]
                entry[knob] = [100 * factor * (w if number else 1) for w in wobble]
            found.append(entry)
        return found


def run(rig, cases=CASES, spent=lambda: False):
    return search.search(TABLE, search.trials_of(TABLE, TRIED), cases, rig, spent)


def test_the_planted_best_is_chosen_of_each_kernel():
    planted = {(A, 1): 0.9, (A, 2): 0.7, (A, 3): 0.8, (B, 1): 1.3, (B, 2): 1.2, (L1, 1): 0.5, (L0, 1): 1.1}
    outcome = run(Planted(planted))
    assert outcome.table == {
        "r": {"a": {"BM": 64, "num_warps": 4}, "b": {"BM": 16}, "l": [{"TW": 8, "BC": 16}, {"TW": 16, "BC": 64}]},
        "other": {"c": {"BM": 16}},
    }
    assert TABLE["r"]["a"]["BM"] == 16 and not outcome.dropped and not outcome.unfinished
    first = outcome.choices[0]
    assert (first.knob, first.old["BM"], first.new["BM"]) == (A, 16, 64)
    assert first.old_us == pytest.approx(100) and first.new_us == pytest.approx(70)
    assert run(Planted(planted)) == outcome  # deterministic


def test_cases_count_by_their_geometric_mean():
    outcome = run(Planted({(A, 1): (0.5, 1.5), (A, 2): (0.5, 1.7), (A, 3): (0.9, 0.9), (B, 1): (0.5, 2.5)}))
    assert outcome.choices[0].new["BM"] == 32  # 0.866 < 0.9 < 0.92
    assert outcome.choices[1].new == outcome.choices[1].old


@pytest.mark.parametrize(
    ("factor", "noise", "changed"), [(0.985, 0, 0), (0.979, 0, 1), (0.97, 0.04, 0), (0.9, 0.04, 1)]
)
def test_a_gain_within_the_noise_or_under_two_percent_keeps_the_present(factor, noise, changed):
    outcome = run(Planted({(A, 2): factor}, noise=noise))
    assert (outcome.choices[0].new["BM"] == 64) == changed
    assert outcome.choices[1].new == outcome.choices[1].old


def test_a_kernel_that_a_case_does_not_use_is_judged_on_the_others():
    rig = Planted(
        {(L0, 1): (5.0, 0.5), (L1, 1): 0.1}, uses=lambda c, knob: knob != L1 and (knob != L0 or c == CASES[1])
    )
    outcome = run(rig)
    assert outcome.table["r"]["l"] == [{"TW": 8, "BC": 32}, {"TW": 16, "BC": 16}]
    assert outcome.choices[3].old_us is None


def test_the_faulty_are_found_alone_dropped_and_named():
    rig = Planted({(A, 1): 0.5, (A, 2): 0.6, (B, 1): 0.7}, {(A, 1): "loss is off by 1e-1", (B, 2): "b spills"})
    outcome = run(rig)
    assert outcome.table["r"]["a"]["BM"] == 64 and outcome.table["r"]["b"]["BM"] == 32
    assert [line.split(": ")[-1] for line in outcome.dropped] == ["loss is off by 1e-1", "b spills"]
    assert outcome.dropped[0].startswith("r a {'BM': 32, 'num_warps': 4} on small")
    on_small = [tried for name, tried in rig.tried if name == "small"]
    assert on_small[0] == {A: 0, B: 0, L0: 0, L1: 0}  # the present first
    assert on_small[1] == {A: 1, B: 1, L0: 1, L1: 1}
    assert on_small[2:6] == [{knob: int(knob == one) for knob in (A, B, L0, L1)} for one in (A, B, L0, L1)]
    assert [tried for name, tried in rig.tried if name == "large"][1:] == [
        {A: 0, B: 1, L0: 1, L1: 1},  # what failed on the small case is not tried again
        {A: 2, B: 0, L0: 0, L1: 0},
        {A: 3, B: 0, L0: 0, L1: 0},
    ]


def test_what_fails_only_together_is_dropped_together():
    outcome = run(Planted({(A, 1): 0.5, (A, 2): 0.6}, {(None, 1): "x"}))
    assert outcome.table["r"]["a"]["BM"] == 64
    assert len(outcome.dropped) == 4 and "fails together with the others' candidate 1" in outcome.dropped[0]


def test_a_present_table_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the present table fails on small: no memory"):
        run(Planted({}, {(A, 0): "no memory"}))


@pytest.mark.parametrize(("calls", "measured"), [(0, 0), (3, 0), (5, 1), (100, 2)])
def test_when_the_time_is_over_what_was_found_is_kept(calls, measured):
    """spent() is asked once before a case, before each of three trials, and once before it is timed."""
    asked = []

    def spent():
        asked.append(1)
        return len(asked) > calls

    outcome = run(Planted({(A, 1): (0.5, 1.9), (A, 2): (0.9, 0.5)}), spent=spent)
    assert outcome.table["r"]["a"]["BM"] == {0: 16, 1: 32, 2: 64}[measured]
    assert outcome.unfinished == (f"{2 - measured} of 2 cases not measured" if measured < 2 else "")


def test_a_trial_has_the_tables_own_blocks_first_and_nothing_twice():
    table = {"r": {"k": {"BM": 16, "num_warps": 4}}}
    trials = search.trials_of(
        table, {"r": {"k": [{"BM": 32}, {"BM": 16}, {"BM": 32, "num_warps": 4}, {"num_warps": 8}]}}
    )
    assert trials[Knob("r", "k")] == [
        {"BM": 16, "num_warps": 4},
        {"BM": 32, "num_warps": 4},
        {"BM": 16, "num_warps": 8},
    ]
    assert search.with_trial(table, trials, 9) == table
