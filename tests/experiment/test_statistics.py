"""Paired ratios, their interval, outcomes, and rounds that would decide."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.experiment.statistics import (
    Interval,
    Outcome,
    interval,
    median,
    order_of,
    outcome,
    paired_ratios,
    rounds_for_width,
    rounds_to_decide,
    sign_rank,
    within,
)

ARMS = ("baseline", "candidate", "control")


def simulated(
    rounds: int, *, factor: float = 1.0, drift: float = 0.0, cold: float = 0.0, seed: int = 0
) -> list[list[tuple[str, float]]]:
    """Rounds with two speeds of the machine, heavy tails, drift, and a cold first arm."""
    dice = random.Random(seed)
    found, number = [], 0
    for index in range(rounds):
        row = []
        for arm in order_of(ARMS, seed=f"{seed}/{index}"):
            seconds = math.exp(dice.gauss(0, 0.03)) * (1.5 if dice.random() < 0.15 else 1.0)
            seconds *= 1 + drift * number / (6 * rounds)
            seconds *= factor if arm == "candidate" else 1.0
            if arm == "baseline" and index < 3:
                seconds *= 1 + cold
            row.append((arm, seconds))
            number += 1
        found.append(row)
    return found


def called(rounds: list[list[tuple[str, float]]], arm: str = "candidate") -> bool:
    return interval(paired_ratios(rounds, actual=arm, reference="baseline")).excludes_one


def test_a_round_is_an_order_and_its_mirror_and_depends_on_the_seed_alone() -> None:
    first = order_of(ARMS, seed="0/cell/0")
    assert first[:3] == first[:2:-1]
    assert set(first[:3]) == set(ARMS)
    assert first == order_of(ARMS, seed="0/cell/0")
    assert len({tuple(order_of(ARMS, seed=f"0/cell/{i}")) for i in range(60)}) == 6


def test_ratios_are_of_runs_in_the_same_half() -> None:
    rounds = [[("a", 2.0), ("b", 1.0), ("b", 4.0), ("a", 6.0)]]
    assert paired_ratios(rounds, actual="a", reference="b") == [2.0, 1.5]
    broken = [[("a", 2.0), ("b", 0.0), ("b", math.nan), ("a", 6.0)]]
    assert paired_ratios(broken, actual="a", reference="b") == []


def test_the_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert math.isnan(median([]))


@pytest.mark.parametrize(
    ("count", "rank"), [(0, 0), (7, 0), (8, 1), (10, 1), (20, 4), (60, 20), (120, 46)]
)
def test_the_ranks_are_those_of_the_binomial(count: int, rank: int) -> None:
    assert sign_rank(count) == rank
    if rank:
        left_out = sum(math.comb(count, i) for i in range(rank)) / 2**count
        assert left_out <= 0.005 < left_out + math.comb(count, rank) / 2**count


def test_few_ratios_have_no_interval() -> None:
    found = interval([1.0] * 7)
    assert (found.low, found.high, found.half_width) == (0.0, math.inf, math.inf)
    assert outcome(found, margin=0.05) is Outcome.UNDECIDED
    assert rounds_to_decide(found, rounds=3, margin=0.05) is None


@given(st.lists(st.floats(0.1, 10.0), min_size=8, max_size=80))
def test_the_interval_holds_the_median_and_turns_over_with_the_arms(ratios: list[float]) -> None:
    found, turned = interval(ratios), interval([1 / r for r in ratios])
    assert found.low <= found.ratio <= found.high
    assert turned.low == pytest.approx(1 / found.high)
    assert turned.high == pytest.approx(1 / found.low)


def test_nothing_is_called_where_nothing_changed() -> None:
    assert sum(called(simulated(20, seed=i)) for i in range(100)) <= 5
    assert sum(called(simulated(20, seed=i, drift=0.5)) for i in range(100)) <= 5
    assert sum(called(simulated(20, seed=i, cold=0.5)) for i in range(100)) <= 5


def test_a_small_slow_down_is_found_in_60_rounds_and_the_control_stays_quiet() -> None:
    runs = [simulated(60, factor=1.03, seed=i) for i in range(100)]
    assert sum(called(rounds) for rounds in runs) >= 90
    assert sum(called(rounds, "control") for rounds in runs) <= 5


def test_outcomes() -> None:
    assert outcome(Interval(0.9, 0.8, 0.99, 20), margin=0.05) is Outcome.FASTER
    assert outcome(Interval(1.1, 1.01, 1.2, 20), margin=0.05) is Outcome.SLOWER
    assert outcome(Interval(1.0, 0.98, 1.02, 20), margin=0.05) is Outcome.SAME
    assert outcome(Interval(1.0, 0.9, 1.02, 20), margin=0.05) is Outcome.UNDECIDED
    assert within(Interval(1.02, 1.01, 1.03, 20), margin=0.05)


def test_rounds_that_would_decide() -> None:
    wide = Interval(1.02, 1.02 / 1.04, 1.02 * 1.04, 20)
    needed = rounds_to_decide(wide, rounds=10, margin=0.05)
    assert needed == math.ceil(10 * (math.log(1.04) / math.log(1.05 / 1.02)) ** 2)
    equal = Interval(1.0, 1 / 1.1, 1.1, 20)
    assert rounds_to_decide(equal, rounds=10, margin=0.05) == 39
    assert rounds_for_width(equal, rounds=10, width=0.01) == 909
