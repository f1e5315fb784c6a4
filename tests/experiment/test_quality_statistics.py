"""The statistics of quality: bounds that hold, power, exact rates, what is never certain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from truestep.experiment.quality.statistics import (
    ALPHA,
    MARGIN_SHARE,
    Margin,
    binomial_bounds,
    compare,
    holm,
    margin_of,
    more_often,
    prompts_for_rate,
    rate_of,
    tail_of,
)

Array = NDArray[np.float64]
SCORES = st.floats(-10, 10, allow_nan=False, width=32)


def unrelated(rng: np.random.Generator, gap: float) -> tuple[Array, Array]:
    """32 prompts of 4 seeds, two arms that share only their prompts."""
    prompt = 2 * rng.standard_normal((32, 1))
    ours, theirs = (prompt + rng.standard_normal((32, 4)) for _ in range(2))
    return ours, theirs - gap


def rarely(rng: np.random.Generator, gap: float) -> tuple[Array, Array]:
    """A quarter of the prompts loses all of it."""
    ours, theirs = unrelated(rng, 0.0)
    return ours, theirs - 4 * gap * (rng.random((32, 1)) < 0.25)


def right_or_wrong(rng: np.random.Generator, gap: float) -> tuple[Array, Array]:
    """Scores of 0 and 1."""
    spread = math.sqrt(0.21)
    draws = rng.random((2, 32, 4))
    return (draws[0] < 0.7).astype(float), (draws[1] < 0.7 - gap * spread).astype(float)


@pytest.mark.parametrize("draw", [unrelated, rarely, right_or_wrong])
def test_at_the_margin_passes_are_rare_and_without_a_gap_common(
    draw: Callable[[np.random.Generator, float], tuple[Array, Array]],
) -> None:
    """120 experiments each, bars of the bench with room for chance; it has 2,000 of every shape."""
    rng = np.random.default_rng(3)

    def passes(gap: float) -> int:
        pairs = (draw(rng, gap) for _ in range(120))
        return sum(compare(a, b, margin_of(a)).not_worse for a, b in pairs)

    assert passes(MARGIN_SHARE) <= stats.binom.ppf(0.999, 120, 0.05)
    assert passes(0.0) >= 0.8 * 120


@given(st.lists(st.tuples(SCORES, SCORES, SCORES), min_size=3, max_size=12), st.floats(0.01, 5))
@settings(max_examples=20, deadline=None)
def test_bounds_hold_the_mean_and_both_sides_mirror(
    rows: list[tuple[float, float, float]], value: float
) -> None:
    baseline = np.array(rows)
    candidate = baseline[:, ::-1] * 0.5
    margin = Margin(value, None, 1.0)
    found, mirrored = (
        compare(baseline, candidate, margin),
        compare(candidate, baseline, margin),
    )
    assert found.low <= found.difference <= found.high
    assert found.low == pytest.approx(-mirrored.high, abs=1e-9)
    assert found.p_worse == pytest.approx(mirrored.p_better)
    assert not (found.not_worse and found.p_degraded <= ALPHA)


@given(st.integers(3, 40), st.floats(0.0, 1.0))
@settings(max_examples=15, deadline=None)
def test_a_candidate_that_loses_more_is_never_surer(count: int, loss: float) -> None:
    rng = np.random.default_rng(count)
    baseline = rng.standard_normal((count, 3))
    noisy = baseline + 0.1 * rng.standard_normal((count, 3))
    margin = margin_of(baseline)
    assert (
        compare(baseline, noisy - loss, margin).p_worse >= compare(baseline, noisy, margin).p_worse
    )


@pytest.mark.parametrize(("prompts", "passes"), [(3, False), (9, False), (12, True)])
def test_no_difference_at_all_is_no_certainty_of_a_few_prompts(prompts: int, passes: bool) -> None:
    baseline = np.arange(prompts * 3, dtype=float).reshape(prompts, 3)
    found = compare(baseline, baseline.copy(), Margin(0.5, None, 0.0))
    assert found.not_worse is passes
    assert found.low < 0 < found.high


def test_an_undecided_difference_says_how_many_prompts_would_decide() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.standard_normal((8, 3))
    candidate = baseline - 0.1 + 0.3 * rng.standard_normal((8, 3))
    found = compare(baseline, candidate, margin_of(baseline))
    assert not found.not_worse
    assert found.needed is not None
    assert found.needed > 8
    more = np.tile(baseline, (40, 1)), np.tile(candidate, (40, 1))
    assert compare(*more, margin_of(more[0])).needed is None


def test_the_margin_comes_of_the_baseline_alone_and_can_be_declared() -> None:
    baseline = np.array([[0.0, 2.0], [5.0, 7.0], [1.0, 3.0]])
    assert margin_of(baseline) == Margin(MARGIN_SHARE * math.sqrt(2), MARGIN_SHARE, math.sqrt(2))
    assert margin_of(baseline, declared=0.1).value == 0.1
    assert margin_of(baseline, least=9.0).value == 9.0
    assert margin_of(np.ones((3, 2)), least=9.0).value == 0.0


@pytest.mark.parametrize(
    ("baseline", "candidate", "text"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), "shapes"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "least"),
        (np.zeros((4, 2)), np.full((4, 2), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_an_error(baseline: Array, candidate: Array, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        compare(baseline, candidate, Margin(1.0, None, 1.0))


@given(st.integers(1, 60), st.data())
@settings(max_examples=20, deadline=None)
def test_exact_bounds_are_those_of_the_binomial(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = binomial_bounds(count, total)
    assert low <= count / total <= high
    if count:
        assert stats.binom.sf(count - 1, total, low) == pytest.approx(ALPHA, abs=1e-6)
    if count < total:
        assert stats.binom.cdf(count, total, high) == pytest.approx(ALPHA, abs=1e-6)


def test_an_increase_is_told_by_the_pairs_that_changed() -> None:
    assert more_often(0, 0) == 1.0
    assert more_often(5, 0) == pytest.approx(1 / 32)
    assert more_often(3, 3) == pytest.approx(stats.binom.sf(2, 6, 0.5))
    rate = rate_of([True, False, False, False], [False, True, True, False])
    assert (rate.baseline, rate.candidate, rate.new, rate.gone) == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="is no rate"):
        binomial_bounds(5, 4)


def test_twenty_nine_prompts_without_a_broken_one_are_enough_for_a_tenth() -> None:
    assert prompts_for_rate(0, 0.1) == 29
    assert binomial_bounds(0, 29)[1] <= 0.1 < binomial_bounds(0, 28)[1]


def test_holm_stops_at_the_first_that_is_not_rejected() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == ("b",)
    assert holm({"a": 0.001, "b": 0.02, "c": 0.04}) == ("a", "b", "c")
    assert holm({}) == ()


def test_the_worst_tenth_is_seen_where_the_mean_is_not_moved() -> None:
    rng = np.random.default_rng(5)
    baseline = rng.standard_normal((60, 3))
    same = tail_of(baseline, baseline + 0.01 * rng.standard_normal((60, 3)))
    lost = baseline.copy()
    lost[:12] -= 6.0
    worse = tail_of(baseline, lost)
    assert worse.rate.p_more < 0.01 < same.rate.p_more
    assert worse.high < 0
    assert same.low < 0.1
    assert same.rate.candidate <= 8


def test_scores_that_are_nearly_all_equal_have_no_worst_tenth_of_everything() -> None:
    ones = np.ones((40, 3))
    assert tail_of(ones, ones).rate.candidate == 0
