"""Intervals and the percent rule on planted samples: false alarms, power, exactness."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from truestep.experiment.perf_statistics import (
    LIMITS,
    Limit,
    expect,
    median_interval,
    needed,
    prediction_rank,
)
from truestep.experiment.statistics import Outcome, median


def batch(
    rng: random.Random, runs: int, *, within: float, between: float, slower: float = 0.0
) -> list[float]:
    """Times of one process in ms: a level of its own, noise, and now and then a hiccup."""
    level = rng.gauss(0, between) + math.log1p(slower)
    hiccup = [rng.expovariate(1 / 0.3) if rng.random() < 0.05 else 0.0 for _ in range(runs)]
    return [1000 * math.exp(level + rng.gauss(0, within) + h) for h in hiccup]


def share(
    *,
    batches: int,
    runs: int,
    new: int,
    within: float,
    between: float,
    slower: float,
    outcome: Outcome,
) -> float:
    """How often, of 600 planted histories, a new batch has this outcome."""
    rng = random.Random(f"{batches} {runs} {new} {within} {between} {slower}")
    hits = 0
    for _ in range(600):
        history = [batch(rng, runs, within=within, between=between) for _ in range(batches)]
        fresh = median(batch(rng, new, within=within, between=between, slower=slower))
        hits += expect(history, new=new).outcome(fresh) is outcome
    return hits / 600


@pytest.mark.parametrize(
    ("batches", "between"),
    [(1, 0.0), (3, 0.0), (3, 0.01), (5, 0.01), (10, 0.0), (10, 0.01)],
)
def test_the_same_speed_raises_no_alarm(batches: int, between: float) -> None:
    planted = {"batches": batches, "runs": 20, "new": 10, "within": 0.02, "between": between}
    for outcome in (Outcome.SLOWER, Outcome.FASTER):
        assert share(**planted, slower=0.0, outcome=outcome) <= 0.015  # type: ignore[arg-type]


def test_three_percent_are_found_with_enough_runs() -> None:
    planted = {"runs": 20, "new": 20, "within": 0.02, "between": 0.003, "slower": 0.03}
    few = share(batches=3, **planted, outcome=Outcome.SLOWER)  # type: ignore[arg-type]
    enough = share(batches=12, **planted, outcome=Outcome.SLOWER)  # type: ignore[arg-type]
    assert enough >= 0.8
    assert few < enough


def test_an_improvement_is_found_too() -> None:
    planted = {"runs": 20, "new": 20, "within": 0.02, "between": 0.003, "slower": -0.05}
    assert share(batches=10, **planted, outcome=Outcome.FASTER) >= 0.9  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "new"), [(6, 3), (9, 4), (7, 1)])
def test_the_rank_is_exact(count: int, new: int) -> None:
    """Every order of old and new values is as likely: count those with the median outside."""
    places = list(combinations(range(count + new), new))
    for level in (0.5, 0.8, 0.9, 0.99):
        rank = prediction_rank(count, new=new, level=level)
        below = dict.fromkeys(range(1, count + 1), 0)
        for place in places:
            middle = place[(new + 1) // 2 - 1]
            olds_below = middle - ((new + 1) // 2 - 1)
            for r in below:
                below[r] += olds_below < r
        allowed = (1 - level) / 2 * len(places)
        fitting = [r for r in below if r <= (count + 1) // 2 and below[r] <= allowed + 1e-9]
        assert rank == max(fitting, default=0)


def test_too_few_runs_say_how_many_would_decide() -> None:
    history = [[100.0 + i for i in range(5)]]
    assert expect(history, new=5).scope == "none"
    assert expect(history, new=5).outcome(500.0) is Outcome.UNDECIDED
    more = needed(history, new=5, value=101.0)
    assert more is not None
    assert prediction_rank(5 + more.runs, new=5) >= 1
    assert prediction_rank(5 + more.runs - 1, new=5) == 0
    assert more.processes == math.ceil(more.runs / 5)


def test_one_process_is_only_a_suspicion() -> None:
    rng = random.Random(3)
    history = [batch(rng, 40, within=0.01, between=0.0)]
    found = expect(history, new=10)
    assert (found.scope, found.outcome(1080.0)) == ("runs", Outcome.SLOWER)
    more = needed(history, new=10, value=1080.0)
    assert more is not None
    assert more.processes >= 2
    assert more.runs == 40 * more.processes
    assert needed(history, new=10, value=1000.0) is None  # inside: nothing to decide


def test_medians_that_agree_by_chance_do_not_narrow_the_interval() -> None:
    rng = random.Random(5)
    runs = sorted(batch(rng, 30, within=0.02, between=0.0))
    twins = [
        [v * 1000 / median(part) for v in part] for part in (runs[::3], runs[1::3], runs[2::3])
    ]
    found = expect(twins, new=10)
    assert found.low < 995
    assert found.high > 1005


def test_fewer_new_runs_widen_the_interval() -> None:
    rng = random.Random(7)
    history = [batch(rng, 20, within=0.02, between=0.001) for _ in range(8)]
    wide, narrow = expect(history, new=1), expect(history, new=20)
    assert wide.high / wide.low > narrow.high / narrow.low


def test_no_history_is_no_interval() -> None:
    found = expect([], new=3)
    assert (found.scope, found.runs) == ("none", 0)
    assert math.isnan(found.base)
    assert prediction_rank(0, new=3) == 0


def test_the_percent_rule_is_the_larger_of_both() -> None:
    assert Limit(0.25, 20.0).bound(1000.0) == 1250.0
    assert Limit(0.25, 20.0).bound(10.0) == 30.0
    assert [LIMITS[k].relative for k in ("e2e", "denoise_stage", "other_stage")] == [
        0.25,
        0.25,
        0.8,
    ]
    assert [LIMITS[k].relative for k in ("step", "aggregate")] == [0.3, 0.2]


def test_the_interval_of_a_batch_needs_eight_runs() -> None:
    assert median_interval([1.0] * 7) is None
    assert median_interval([float(i) for i in range(8)]) == (0.0, 7.0)
