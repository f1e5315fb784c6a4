"""The ladder of runs: its places, its exact rank, and how seldom it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from truestep.judge.ladder import ALPHA, NEEDED, Distances, ladder
from truestep.verdict import Verdict


def distances(points: np.ndarray, seeds: int = 0) -> Distances:  # type: ignore[type-arg]
    """Of the run under test, the reference and reruns, as points; seeds are 100 away."""
    between = np.linalg.norm(points[:, None] - points[None], axis=-1)
    names = ["actual", "reference", *(f"r{at}" for at in range(len(points) - 2))]
    return Distances(names, between.tolist(), [(f"s{at}", 100.0) for at in range(seeds)])


def runs(count: int, *, far: float = 0.0, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """Points of one cloud, the first moved by so many of its radii."""
    points = np.random.default_rng(seed).normal(size=(count, 64))
    points[0, 0] += far * 8
    return points


def test_the_number_of_runs_is_what_a_rank_needs() -> None:
    assert pytest.approx(ALPHA) == 1 / (NEEDED + 2)
    assert NEEDED == 18


@pytest.mark.parametrize(
    ("far", "reruns", "seeds", "place", "verdict"),
    [
        (0, 5, 2, "within reruns", Verdict.INCONCLUSIVE),
        (0, 18, 0, "within reruns", Verdict.INCONCLUSIVE),
        (5, 5, 2, "between reruns and other seeds", Verdict.INCONCLUSIVE),
        (5, 17, 2, "between reruns and other seeds", Verdict.INCONCLUSIVE),
        (5, 18, 2, "between reruns and other seeds", Verdict.DRIFTED),
        (5, 18, 0, "beyond reruns", Verdict.DRIFTED),
        (20, 3, 2, "as far as another seed", Verdict.INCONCLUSIVE),
        (20, 18, 2, "as far as another seed", Verdict.DRIFTED),
        (0, 0, 2, "nearer than other seeds", Verdict.INCONCLUSIVE),
        (20, 0, 2, "as far as another seed", Verdict.INCONCLUSIVE),
    ],
)
def test_places(far: float, reruns: int, seeds: int, place: str, verdict: Verdict) -> None:
    told, made = ladder(distances(runs(reruns + 2, far=far), seeds))
    assert (told.place, made) == (place, verdict)
    assert told.text.startswith(f"{place}: ")
    assert ("could decide" in told.text) is (reruns < 18 and place != "within reruns")
    assert len(told.runs) == reruns + 2 + seeds


def test_the_furthest_of_enough_runs_is_undecided_where_it_is_hardly_further() -> None:
    told, made = ladder(distances(runs(20, far=1.2)))
    assert told.p_value == pytest.approx(ALPHA)
    assert told.ratio is not None
    assert 1 < told.ratio < 2
    assert made is Verdict.INCONCLUSIVE
    assert "x as far from the others as the next (2 would decide)" in told.text
    assert "would decide" not in ladder(distances(runs(20, far=5)))[0].text


def test_reruns_that_agree_bit_for_bit_decide_nothing() -> None:
    points = np.zeros((30, 4))
    points[0] = 1
    told, made = ladder(distances(points))
    assert made is Verdict.INCONCLUSIVE
    assert "measure no harmless change" in told.text


def test_reruns_as_far_apart_as_seeds_say_that_they_tell_nothing() -> None:
    told, _ = ladder(distances(runs(8) * 20, seeds=2))
    assert "this ladder tells nothing" in told.text


@pytest.mark.parametrize("spread", ["normal", "cauchy"])
def test_the_rank_is_exact_and_drifted_is_rarer(spread: str) -> None:
    """Of harmless runs the furthest of 20 is the one under test in 1 of 20, whatever the law."""
    draw = np.random.default_rng(0)
    furthest = drifted = 0
    for _ in range(1000):
        points = getattr(draw, f"standard_{spread}")((20, 16))
        told, made = ladder(distances(points))
        furthest += told.p_value == pytest.approx(ALPHA)
        drifted += made is Verdict.DRIFTED
    assert 25 <= furthest <= 75  # 50 expected, 3.6 standard deviations either way
    assert drifted == 0 if spread == "normal" else drifted <= furthest
