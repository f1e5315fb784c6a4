"""Noise floors: look-up, fitted tails, two outcomes, and what few runs can say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.floor import (
    Floor,
    FloorLookup,
    analytic_floor,
    free_running,
    minimum_floor,
    pair_for,
    sample_sizes,
)
from truestep.judge.tail import Tail, modes
from truestep.keys import FREE_RUN, spread_key, stage_key


def run(
    kind: str, pair: str = "float32/float32", gain: float | None = None, **values: float
) -> NoiseRun:
    tensors = tuple(
        RunMetrics(
            name=name.replace("__", "/"),
            rel_l2=value,
            max_abs=4 * value,
            structure={} if gain is None else {"gain": gain * value},
        )
        for name, value in values.items()
    )
    return NoiseRun(kind=kind, detail="d", pair=pair, tensors=tensors)


FLOOR = NoiseFloor(
    runs=(
        run("repeat", step__0000__cond=0.0, step__0009__cond=0.0),
        run("batch", step__0000__cond=1e-6, step__0009__cond=4e-6),
        run("precision", "bfloat16/float32", step__0000__cond=5e-3),
    )
)


def find(
    name: str, pair: str = "float32/float32", dtype: str = "float32", floor: NoiseFloor = FLOOR
) -> Floor:
    found = FloorLookup(floor, pair=pair).find(name, dtype=dtype)
    assert found is not None
    return found


def many(count: int, *, spread: float = 0.1, seed: int = 0) -> NoiseFloor:
    """A floor of `count` jitter runs, log-normal around 1e-6, with a gain of 5 % of the size."""
    dice = random.Random(seed)
    return NoiseFloor(
        runs=tuple(
            run(
                "jitter",
                gain=dice.gauss(0, 0.05),
                step__0000__cond=1e-6 * math.exp(dice.gauss(0, spread)),
            )
            for _ in range(count)
        )
    )


def test_the_floor_is_the_largest_benign_run_of_the_pair() -> None:
    assert find("step/0000/cond").used.rel_l2 == 1e-6
    assert find("step/0000/cond", "bfloat16/float32", "bfloat16").used.rel_l2 == 5e-3


def test_other_steps_share_the_stage_and_say_so() -> None:
    found = find("step/0004/cond")
    assert found.used.rel_l2 == 4e-6
    assert "other steps" in found.used.detail


def test_another_pair_or_stage_has_no_measured_floor() -> None:
    lookup = FloorLookup(FLOOR, pair="float16/float32")
    assert lookup.find("step/0000/cond", dtype="float16") is None
    lookup = FloorLookup(FLOOR, pair="float32/float32")
    assert lookup.find("step/0000/uncond", dtype="float32") is None
    lookup = FloorLookup(None, pair="float32/float32")
    assert lookup.find("step/0000/cond", dtype="float32") is None


def test_a_zero_floor_is_lifted_to_the_analytic_minimum() -> None:
    zero = NoiseFloor(runs=(run("repeat", schedule__sigmas=0.0),))
    found = find("schedule/sigmas", floor=zero)
    assert found.used.rel_l2 == minimum_floor("float32") == 2 * 2.0**-23
    assert "analytic minimum" in found.used.detail
    assert found.tails["rel_l2"].surprise(10 * minimum_floor("float32")) < 1e-9


def test_exact_dtypes_have_no_slack() -> None:
    zero = NoiseFloor(runs=(run("repeat", schedule__experts=0.0),))
    assert find("schedule/experts", dtype="int64", floor=zero).tails["rel_l2"].surprise(1e-12) == 0


def test_nothing_up_to_the_largest_benign_value_is_surprising() -> None:
    tail = find("step/0000/cond", floor=many(12)).tails["rel_l2"]
    assert tail.surprise(tail.largest) == 1.0
    assert tail.surprise(tail.largest * 1.09) == 1.0
    assert tail.surprise(tail.largest * 1.2) < 0.5
    assert tail.surprise(math.nan) == 0.0


def test_few_runs_make_wider_tails() -> None:
    criticals = [
        find("step/0000/cond", floor=many(n, seed=3)).tails["rel_l2"].critical(1e-6)
        for n in (1, 4, 20, 200)
    ]
    assert criticals == sorted(criticals, reverse=True)
    assert criticals[-1] < 2e-6 < criticals[0]


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1e-9, 1e3),
    st.floats(0.05, 1.0),
    st.floats(2, 200),
    st.integers(1, 100),
    st.floats(1e-9, 1e-3),
)
def test_critical_is_where_the_surprise_is_the_rate(
    scale: float, spread: float, freedom: float, count: int, rate: float
) -> None:
    tail = Tail(scale, spread, freedom, count, largest=0.0)
    critical = tail.critical(rate)
    if critical / scale < 1e5:
        lifted = Tail(scale, spread, freedom, count, largest=scale)
        assert lifted.surprise(critical) == pytest.approx(rate, rel=1e-4)


def test_the_fitted_tail_keeps_its_false_alarm_rate() -> None:
    """Benign values drawn from the same law are surprising at 1 % about once in a hundred."""
    dice = random.Random(1)
    alarms = trials = 0
    for seed in range(60):
        tail = find("step/0000/cond", floor=many(30, spread=0.2, seed=seed)).tails["rel_l2"]
        for _ in range(50):
            trials += 1
            alarms += tail.surprise(1e-6 * math.exp(dice.gauss(0, 0.2))) < 0.01
    assert 0.002 < alarms / trials < 0.02


def test_a_gain_is_set_against_the_gains_of_benign_runs() -> None:
    tail = find("step/0000/cond", floor=many(40)).tails["gain"]
    assert tail.surprise(0.05e-6) > 0.1
    assert tail.surprise(-1e-6) < 1e-6  # a gain as large as the whole noise


def test_two_outcomes_are_recognised() -> None:
    assert modes([1e-6, 1.2e-6, 3e-3, 3.1e-3]) == ([1e-6, 1.2e-6], [3e-3, 3.1e-3])
    assert modes([1e-6, 2e-6, 0.0]) == ([], [1e-6, 2e-6])
    values = [1e-6, 1.1e-6, 0.9e-6, 3e-3, 3e-3 * 1.01]
    flips = NoiseFloor(runs=tuple(run("repeat", step__0000__cond=v) for v in values))
    found = find("step/0000/cond", floor=flips)
    assert "two outcomes: 3 runs near 1.0e-06, 2 near 3.0e-03" in found.used.detail
    assert found.tails["rel_l2"].surprise(3.05e-3) > 0.1
    assert found.tails["rel_l2"].surprise(3e-2) < 1e-4


def test_runs_to_decide_are_enough() -> None:
    tail = find("step/0000/cond", floor=many(3)).tails["rel_l2"]
    value = tail.critical(1e-6) * 0.7
    assert tail.surprise(value) > 1e-6 >= tail.surprise(value, known=True)
    needed = tail.runs_to_decide(value, 1e-6)
    assert Tail(tail.scale, tail.spread, tail.freedom + needed, needed, 0.0).surprise(value) < 1e-6


def test_equal_runs_are_one_piece_of_evidence() -> None:
    twice = NoiseFloor(runs=(run("batch", step__0000__cond=1e-6),) * 5)
    once = NoiseFloor(runs=(run("batch", step__0000__cond=1e-6),))
    name = "step/0000/cond"
    assert find(name, floor=twice).tails["rel_l2"] == find(name, floor=once).tails["rel_l2"]


def test_the_analytic_floor_scales_with_the_coarser_side_and_is_named() -> None:
    fine, coarse = analytic_floor("float32", "float32"), analytic_floor("float32", "bfloat16")
    assert coarse.used.rel_l2 > 1000 * fine.used.rel_l2
    assert coarse.used.source == "analytic"
    assert "no floor was measured" in coarse.used.detail


def test_names_are_grouped() -> None:
    assert stage_key("step/0007/cond") == "step/*/cond"
    assert stage_key("float32/step/0007/cond") == "float32/step/*/cond"
    assert spread_key("step/0007/uncond") == spread_key("step/0000/cond") == "step/*/prediction"
    assert spread_key("float32/step/0007/cond") == "float32/step/*/prediction"
    assert spread_key("latent/final") == spread_key("step/0003/latent")
    assert spread_key("text/cond") == spread_key("text/uncond")
    assert pair_for("float32/step/0000/cond", "bfloat16/bfloat16") == "float32/float32"
    assert pair_for("step/0000/cond", "bfloat16/bfloat16") == "bfloat16/bfloat16"


def test_samples_are_weighed_by_the_first_run_that_has_noise_everywhere() -> None:
    assert sample_sizes(FLOOR.runs) == {"step/0000/cond": 1e-6, "step/0009/cond": 4e-6}
    assert sample_sizes(FLOOR.runs[:1]) == {}


def test_free_runs_are_kept_apart() -> None:
    floor = NoiseFloor(runs=(run("repeat", **{FREE_RUN: 1e-3, "latent__final": 1e-7}),))
    free = free_running(floor)
    assert free is not None
    assert [(m.name, m.rel_l2) for m in free.runs[0].tensors] == [("latent/final", 1e-3)]
    assert free_running(FLOOR) is None


def test_a_run_by_other_instructions_that_is_further_off_is_an_outcome_of_its_own() -> None:
    near = [run("jitter", step__0000__cond=1e-7 * (1 + i / 20)) for i in range(6)]
    alone = NoiseFloor(runs=tuple(near))

    def bound(other: float) -> float:
        floor = NoiseFloor(runs=(*near, run("instructions", step__0000__cond=other)))
        found = FloorLookup(floor, pair="float32/float32").find("step/0000/cond", dtype="float32")
        assert found is not None
        return found.tails["rel_l2"].critical(1e-7)

    lookup = FloorLookup(alone, pair="float32/float32").find("step/0000/cond", dtype="float32")
    assert lookup is not None
    plain = lookup.tails["rel_l2"].critical(1e-7)
    assert bound(1.2e-7) == pytest.approx(plain, rel=0.2)  # like the others: one of them
    for other in (1e-6, 3e-6):  # a third instruction set may be 1.5 times as far off as the second
        assert 1.5 * other < bound(other) < 10 * other


def test_the_spread_is_that_of_the_values_that_the_scale_is_of() -> None:
    """A recurrent detector: one kind is far off, and other machines lie between it and the rest."""
    near = [run("jitter", step__0000__cond=size * 1e-7) for size in (5.6, 7.4, 9.7, 10.2)]
    far = run("batch", step__0000__cond=59.5e-7)
    between = [run("instructions", step__0000__cond=size * 1e-7) for size in (21.5, 54.6)]

    def tail(*runs: NoiseRun) -> Tail:
        return find("step/0000/cond", floor=NoiseFloor(runs=runs)).tails["rel_l2"]

    bridged, gap = tail(*near, far, *between), tail(*near, far)
    assert gap.scale == pytest.approx(59.5e-7)  # two outcomes: the larger one, and its own spread
    assert gap.spread < 0.25
    assert bridged.scale < 30e-7  # one outcome, and the spread of all of it
    assert bridged.spread > 0.4
    assert bridged.surprise(82e-7, known=True) > 1e-4
    assert bridged.surprise(1e-4) < 1e-5


def test_a_gain_may_be_as_large_as_a_residual_of_another_machine_makes_it() -> None:
    near = [run("jitter", gain=0.3, step__0000__cond=1e-7 * (1 + i / 20)) for i in range(6)]
    other = run("instructions", gain=0.3, step__0000__cond=8e-7)
    here = find("step/0000/cond", floor=NoiseFloor(runs=tuple(near))).tails["gain"]
    both = find("step/0000/cond", floor=NoiseFloor(runs=(*near, other))).tails["gain"]
    assert both.scale == pytest.approx(0.3 * 8e-7, rel=0.05)
    assert here.scale < both.scale / 3


def test_a_step_without_runs_of_its_own_is_given_the_spread_between_steps() -> None:
    names = [f"step__{step:04d}__cond" for step in range(3)]
    alike = [dict.fromkeys(names, 1e-6 * (1 + at / 50)) for at in range(5)]
    apart = [
        {name: value * 2.0**step for step, (name, value) in enumerate(run_.items())}
        for run_ in alike
    ]
    bounds = []
    for values in (alike, apart):
        floor = NoiseFloor(runs=tuple(run(f"kind {at}", **v) for at, v in enumerate(values)))
        tail = find("step/0007/cond", floor=floor).tails["rel_l2"]
        own = find("step/0001/cond", floor=floor).tails["rel_l2"]
        assert tail.spread >= own.spread
        bounds.append(tail.critical(1e-6) / tail.largest)
    assert bounds[1] > 1.5 * bounds[0]
