"""The rule: tails, Holm's correction, structure below the floor in size, and what it says."""

from __future__ import annotations

import math
import random

import pytest

from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.floor import Floor, FloorLookup, analytic_floor
from truestep.judge.rule import RATE, Measured, Outcome, judge, rule_of
from truestep.verdict import Metrics, Verdict

NAME = "step/0000/cond"


def floor(runs: int = 30, *, seed: int = 0) -> Floor:
    dice = random.Random(seed)
    made = tuple(
        NoiseRun(
            kind="jitter",
            detail="d",
            pair="float32/float32",
            tensors=(metrics_of(1e-6 * math.exp(dice.gauss(0, 0.1)), dice.gauss(0, 0.05)),),
        )
        for _ in range(runs)
    )
    found = FloorLookup(NoiseFloor(runs=made), pair="float32/float32").find(NAME, dtype="float32")
    assert found is not None
    return found


def metrics_of(size: float, share: float) -> RunMetrics:
    return RunMetrics(
        name=NAME,
        rel_l2=size,
        max_abs=4 * size,
        structure={"gain": share * size, "frame_energy": 1.2 * size},
    )


def metrics(rel_l2: float, max_abs: float = 0.0) -> Metrics:
    return Metrics(
        count=100,
        rel_l2=rel_l2,
        max_abs=max_abs,
        max_abs_index=(0,),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=2.0,
    )


def one(rel_l2: float, *, max_abs: float = 0.0, **structure: float) -> Outcome:
    (outcome,) = judge([Measured(metrics(rel_l2, max_abs), floor(), structure)])
    return outcome


def test_within_the_floor_is_equivalent() -> None:
    outcome = one(1e-6, gain=1e-8, frame_energy=1.2e-6)
    assert outcome.verdict is Verdict.EQUIVALENT
    assert outcome.ratio < 1
    assert [s.name for s in outcome.statistics] == ["gain", "frame_energy"]


def test_a_floor_as_large_as_the_values_passes_nothing() -> None:
    """Where benign runs differ by half of the values, or a file says so."""
    for size, verdict in ((0.3, Verdict.EQUIVALENT), (0.9, Verdict.INCONCLUSIVE)):
        runs = tuple(
            NoiseRun(
                kind="jitter",
                detail="d",
                pair="float32/float32",
                tensors=(metrics_of(size * (1 + 0.01 * at), 0.0),),
            )
            for at in range(30)
        )
        wide = FloorLookup(NoiseFloor(runs=runs), pair="float32/float32").find(
            NAME, dtype="float32"
        )
        assert wide is not None
        (outcome,) = judge([Measured(metrics(0.08), wide, {})])
        assert outcome.verdict is verdict
    assert outcome.note == "the floor itself is 1 of the values: it says nothing here"
    (outcome,) = judge([Measured(metrics(0.08), wide, {}, raised=True)])
    assert outcome.verdict is Verdict.EQUIVALENT, "what it says in a higher precision decides"


@pytest.mark.parametrize(
    ("spread", "alone", "verdict"),
    [
        (0.02, True, Verdict.EQUIVALENT),
        (2.0, True, Verdict.INCONCLUSIVE),
        (2.0, False, Verdict.EQUIVALENT),
    ],
)
def test_what_only_a_change_of_all_values_would_fail_passes_where_something_else_judges(
    spread: float, alone: bool, verdict: Verdict
) -> None:
    """A few benign runs that differ by much: the floor is small, what it is followed by is not."""
    dice = random.Random(0)
    runs = tuple(
        NoiseRun(
            kind="jitter",
            detail="d",
            pair="float32/float32",
            tensors=(metrics_of(0.05 * math.exp(dice.gauss(0, spread)), 0.0),),
        )
        for _ in range(5)
    )
    wide = FloorLookup(NoiseFloor(runs=runs), pair="float32/float32").find(NAME, dtype="float32")
    assert wide is not None
    assert wide.used.rel_l2 < 0.5
    (outcome,) = judge([Measured(metrics(0.01), wide, raised=not alone)])
    assert outcome.verdict is verdict
    if verdict is Verdict.INCONCLUSIVE:
        assert outcome.note.startswith("only a change of ")
        assert outcome.note.endswith(" times the values would have been seen here")


def test_beyond_the_bound_is_drifted_by_size() -> None:
    outcome = one(5e-6)
    assert outcome.verdict is Verdict.DRIFTED
    assert outcome.metric == "rel_l2"
    assert outcome.ratio > outcome.floor.bound > 1


def test_one_wrong_element_is_drifted() -> None:
    outcome = one(1e-9, max_abs=1e-2)
    assert (outcome.verdict, outcome.metric) == (Verdict.DRIFTED, "max_abs")


def test_structure_drifts_below_the_floor_in_size() -> None:
    outcome = one(1e-6, gain=0.9e-6)
    assert outcome.verdict is Verdict.DRIFTED
    assert outcome.metric == "gain"
    assert outcome.note.startswith("structure: gain 1")
    assert "x floor)" in outcome.note


def test_an_energy_that_is_concentrated_drifts() -> None:
    outcome = one(1.1e-6, frame_energy=6e-6)
    assert (outcome.verdict, outcome.metric) == (Verdict.DRIFTED, "frame_energy")


def test_more_tests_make_each_one_stricter() -> None:
    """A value just beyond the bound of a single test is within that of a thousand."""
    place = floor()
    value = place.tails["rel_l2"].critical(RATE / 2) * 1.01
    (alone,) = judge([Measured(metrics(value), place)])
    crowd = judge([Measured(metrics(value), place)] + [Measured(metrics(1e-6), place)] * 1000)
    assert alone.verdict is Verdict.DRIFTED
    assert crowd[0].verdict is not Verdict.DRIFTED
    assert crowd[0].floor.bound > alone.floor.bound


def test_benign_checks_are_not_called_drifted() -> None:
    """One check in ten thousand may; two thousand checks of forty tensors must not."""
    dice = random.Random(7)
    for seed in range(40):
        place = floor(12, seed=seed)
        for _ in range(50):
            items = []
            for _ in range(40):
                run = metrics_of(1e-6 * math.exp(dice.gauss(0, 0.1)), dice.gauss(0, 0.05))
                items.append(Measured(metrics(run.rel_l2, 8 * run.rel_l2), place, run.structure))
            assert all(o.verdict is not Verdict.DRIFTED for o in judge(items))


def test_too_few_runs_are_inconclusive_and_say_how_many_decide() -> None:
    few = floor(2)
    tail = few.tails["rel_l2"]
    value = 0.8 * tail.critical(RATE / 2)
    (outcome,) = judge([Measured(metrics(value), few)])
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "rel_l2 is between floor and bound: " in outcome.note
    assert outcome.note.endswith("more benign runs would decide")


@pytest.mark.parametrize(
    ("rel_l2", "verdict"),
    [
        (1e-6, Verdict.EQUIVALENT),
        (8e-6, Verdict.INCONCLUSIVE),
        (4e-5, Verdict.DRIFTED),
        (math.nan, Verdict.INVALID),
    ],
)
def test_without_a_measured_floor_size_decides(rel_l2: float, verdict: Verdict) -> None:
    (outcome,) = judge([Measured(metrics(rel_l2), analytic_floor("float32", "float32"))])
    assert outcome.verdict is verdict
    assert ("measure a floor" in outcome.note) == (verdict is Verdict.INCONCLUSIVE)


def test_nan_never_passes() -> None:
    assert one(math.nan).verdict is Verdict.INVALID
    assert one(1e-6, gain=math.nan).verdict is Verdict.INVALID


def test_the_rule_is_one_sentence_with_its_numbers() -> None:
    text = rule_of([one(1e-6).floor], tests=12).text
    assert "size and structure against the measured noise floor (float32/float32)" in text
    assert "1 false alarm in 10,000 checks (Holm over 12 tests)" in text
    assert "analytic" in rule_of([analytic_floor("float32", "float32").used]).text
