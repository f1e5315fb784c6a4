"""Tables of the guidance benches: what a cell says of few pairs, old clocks and mixed verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from bench import bench_exact, bench_guidance


def row(pairs: list[list[float]], **changes: Any) -> dict[str, Any]:
    values = {"model": "wan", "tokens": 256, "text": 20, "plan": "batched", "rel_l2": 1e-7}
    return {**values, "cpu_s": pairs, "wall_s": pairs, **changes}


def test_a_ratio_is_of_paired_times_with_an_interval_from_eight_pairs_on() -> None:
    pairs = [[1.0 + i, (1.0 + i) * r] for i, r in enumerate((0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.9))]
    assert bench_guidance.shown(row(pairs)) == "0.80 (0.70 to 0.90)*"
    assert bench_guidance.shown(row([*pairs, [2.0, 1.6]])) == "0.80 (0.70 to 0.90)"


def test_wall_time_is_marked_where_there_is_no_other() -> None:
    old = row([[2.0, 1.0]] * 8)
    del old["cpu_s"]
    assert bench_guidance.shown(old) == "0.50 (0.50 to 0.50)†"


def test_a_plan_that_was_not_measured_is_an_empty_cell() -> None:
    text = bench_guidance.table([row([[1.0, 0.5]] * 8, plan=bench_guidance.ALL, rel_l2=3e-7)])
    assert (
        text.splitlines()[-1]
        == "| wan | 256 | 20 | 8 |  |  |  |  | 0.50 (0.50 to 0.50) | 3.0e-07 |"
    )


def test_one_drift_decides_a_cell() -> None:
    same = {"verdict": "equivalent", "ratio": 0.9, "rel_l2": 1e-7}
    apart = {"verdict": "drifted", "ratio": 69.0, "rel_l2": 2e-5}
    none = {"verdict": "identical", "ratio": 0.0, "rel_l2": 0.0}
    assert bench_exact.worst([same, apart]) == "drifted (69.00, 2e-05)"
    assert bench_exact.worst([none, none]) == "identical"


@pytest.mark.parametrize("name", bench_guidance.PLANS)
def test_plans_are_options_of_accelerate(name: str) -> None:
    import inspect

    from truestep import accelerate

    assert set(bench_guidance.PLANS[name]) <= set(inspect.signature(accelerate).parameters)
