"""Noise floor look-up and the rule by size."""

from __future__ import annotations

import math

import pytest

from truestep.noise import (
    FREE_RUN,
    FloorLookup,
    NoiseFloor,
    NoiseRun,
    RunMetrics,
    analytic_floor,
    bound_for,
    free_running,
    judge,
    minimum_floor,
    runs_to_decide,
    size_rule,
)
from truestep.verdict import Metrics, Verdict


def run(kind: str, pair: str = "float32/float32", **values: float) -> NoiseRun:
    tensors = tuple(
        RunMetrics(name=name.replace("__", "/"), rel_l2=value, max_abs=4 * value)
        for name, value in values.items()
    )
    return NoiseRun(kind=kind, detail="d", pair=pair, tensors=tensors)


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


FLOOR = NoiseFloor(
    runs=(
        run("repeat", step__0000__cond=0.0, step__0009__cond=0.0),
        run("batch", step__0000__cond=1e-6, step__0009__cond=4e-6),
        run("precision", "bfloat16/float32", step__0000__cond=5e-3),
    )
)


def look(name: str, pair: str = "float32/float32", dtype: str = "float32") -> float:
    found = FloorLookup(FLOOR, pair=pair).find(name, dtype=dtype)
    assert found is not None
    return found.rel_l2


def test_the_floor_is_the_largest_benign_run_of_the_pair() -> None:
    assert look("step/0000/cond") == 1e-6
    assert look("step/0000/cond", "bfloat16/float32", "bfloat16") == 5e-3


def test_other_steps_share_the_stage_and_say_so() -> None:
    found = FloorLookup(FLOOR, pair="float32/float32").find("step/0004/cond", dtype="float32")
    assert found is not None
    assert found.rel_l2 == 4e-6
    assert "other steps" in found.detail


def test_another_pair_or_stage_has_no_measured_floor() -> None:
    assert (
        FloorLookup(FLOOR, pair="float16/float32").find("step/0000/cond", dtype="float16") is None
    )
    assert FloorLookup(FLOOR, pair="float32/float32").find("step/0000/uncond", dtype="f") is None
    assert FloorLookup(None, pair="float32/float32").find("step/0000/cond", dtype="float32") is None


def test_a_zero_floor_is_lifted_to_the_analytic_minimum() -> None:
    zero = NoiseFloor(runs=(run("repeat", schedule__sigmas=0.0),))
    found = FloorLookup(zero, pair="float32/float32").find("schedule/sigmas", dtype="float32")
    assert found is not None
    assert found.rel_l2 == minimum_floor("float32") == 2 * 2.0**-23
    assert "analytic minimum" in found.detail


def test_few_runs_widen_the_bound_and_the_count_that_decides_is_consistent() -> None:
    assert bound_for(1) > bound_for(4) > bound_for(100) > 1
    for ratio in (1.1, 1.5, 2.0, 3.9):
        needed = runs_to_decide(ratio)
        assert bound_for(needed) < ratio
        assert bound_for(max(needed - 2, 1)) >= ratio


@pytest.mark.parametrize(
    ("rel_l2", "max_abs", "verdict"),
    [
        (4e-6, 0.0, Verdict.EQUIVALENT),
        (8e-6, 0.0, Verdict.INCONCLUSIVE),
        (4e-5, 0.0, Verdict.DRIFTED),
        (1e-9, 1e-2, Verdict.DRIFTED),  # one wrong element in a sea of right ones
    ],
)
def test_the_rule_by_size(rel_l2: float, max_abs: float, verdict: Verdict) -> None:
    floor = FloorLookup(FLOOR, pair="float32/float32").find("step/0009/cond", dtype="float32")
    assert floor is not None
    found, ratio, metric, note = judge(metrics(rel_l2, max_abs), floor)
    assert found is verdict
    assert ratio > 0
    assert metric == ("max_abs" if max_abs else "rel_l2")
    assert ("benign runs would decide" in note) == (verdict is Verdict.INCONCLUSIVE)


def test_nan_metrics_never_pass() -> None:
    floor = analytic_floor("float32", "float32")
    assert judge(metrics(math.nan), floor)[0] is Verdict.INVALID


def test_the_analytic_floor_scales_with_the_coarser_side_and_is_named() -> None:
    fine, coarse = analytic_floor("float32", "float32"), analytic_floor("float32", "bfloat16")
    assert coarse.rel_l2 > 1000 * fine.rel_l2
    assert coarse.source == "analytic"
    assert "no floor was measured" in coarse.detail
    assert "analytic" in size_rule([coarse]).text


def test_exact_dtypes_have_no_slack() -> None:
    floor = analytic_floor("int64", "int64")
    assert judge(metrics(1e-9), floor)[0] is Verdict.DRIFTED


def test_free_runs_are_kept_apart() -> None:
    floor = NoiseFloor(runs=(run("repeat", **{FREE_RUN: 1e-3, "latent__final": 1e-7}),))
    free = free_running(floor)
    assert free is not None
    assert [(m.name, m.rel_l2) for m in free.runs[0].tensors] == [("latent/final", 1e-3)]
    assert free_running(FLOOR) is None
