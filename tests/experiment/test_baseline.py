"""Runs against a baseline: verdicts, impossible data, missing cohorts, wording, strict JSON."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from truestep.experiment.baseline import check_result, impossible, missing_result, unequal_sums
from truestep.experiment.perf_records import (
    Cohort,
    PerfBatch,
    PerfResult,
    PerfResults,
    PerfRun,
)
from truestep.experiment.statistics import Outcome
from truestep.verdict import Verdict

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
COHORT = Cohort(case_id="digits-three", values={"device.name": "a CPU", "torch.threads": "1"})


def make_run(scale: float = 1.0, **changes: Any) -> PerfRun:
    """A run of 1,000 ms times `scale`, 4 steps, whose parts fit together."""
    values: dict[str, Any] = {
        "e2e_ms": 1000 * scale,
        "stages_ms": {
            "text": 60 * scale,
            "schedule": 0.5,
            "latent": 0.2,
            "denoise": 720 * scale,
            "decode": 210 * scale,
        },
        "denoise_step_ms": {str(i): 179 * scale for i in range(4)},
        "load_ms": 5000.0,
        "memory_mib": 500.0,
        "memory_kind": "resident",
    }
    return PerfRun.model_validate({**values, **changes})


def make_batches(count: int, runs: int, *, noise: float = 0.01, seed: int = 0) -> list[PerfBatch]:
    """Batches of one speed with noise between runs."""
    rng = random.Random(seed)
    return [
        PerfBatch(
            id=at,
            baseline=1,
            runs=tuple(make_run(math.exp(rng.gauss(0, noise))) for _ in range(runs)),
        )
        for at in range(count)
    ]


def check(new: list[PerfRun], batches: list[PerfBatch]) -> PerfResult:
    return check_result(new, batches, cohort=COHORT, case_name="three", steps=4)


def new_runs(speed: float, runs: int = 20, *, seed: int = 99) -> list[PerfRun]:
    rng = random.Random(seed)
    return [make_run(speed * math.exp(rng.gauss(0, 0.01))) for _ in range(runs)]


def test_the_same_speed_is_equivalent() -> None:
    result = check(new_runs(1.0), make_batches(8, 20))
    assert result.verdict is Verdict.EQUIVALENT
    assert not result.faster
    assert result.sentence.startswith("equivalent: three: as fast as its baseline: e2e ")
    assert result.detectable is not None
    assert 0 < result.detectable < 0.03
    assert (result.baseline_batches, result.baseline_runs) == (8, 160)


def test_three_percent_slower_has_drifted_by_interval_alone() -> None:
    result = check(new_runs(1.03), make_batches(8, 20))
    assert result.verdict is Verdict.DRIFTED
    e2e = result.rows[0]
    assert (e2e.name, e2e.outcome, e2e.scope) == ("e2e", Outcome.SLOWER, "processes")
    assert e2e.limit is not None
    assert e2e.value < e2e.limit  # the percent rule sees nothing
    assert result.sentence.startswith("drifted: three: slower: e2e ")
    assert "expected" in result.sentence


def test_false_alarms_of_whole_checks_are_at_most_two_in_a_hundred() -> None:
    alarms = 0
    for seed in range(200):
        result = check(new_runs(1.0, 10, seed=1000 + seed), make_batches(5, 10, seed=seed))
        alarms += result.verdict is Verdict.DRIFTED
    assert alarms <= 4


def test_an_improvement_is_equivalent_with_an_offer() -> None:
    result = check(new_runs(0.9), make_batches(8, 20))
    assert result.verdict is Verdict.EQUIVALENT
    assert result.faster
    assert result.offer == "truestep perf record CASE  # faster: makes it the new baseline"
    assert "faster: e2e" in result.sentence


def test_the_percent_rule_decides_where_runs_are_few() -> None:
    result = check(new_runs(1.4, 3), make_batches(1, 3))
    assert result.verdict is Verdict.DRIFTED
    assert result.rows[0].note == "above the percent rule"


def test_too_few_runs_are_inconclusive_and_say_how_many_would_decide() -> None:
    result = check(new_runs(1.05, 3), make_batches(1, 3))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "too few runs for an interval" in result.sentence
    assert result.needed_runs
    assert f"  # {result.needed_runs} more recorded runs would decide" in result.hint
    assert result.hint.startswith("truestep perf record CASE --runs ")


def test_a_slow_down_beyond_one_process_is_inconclusive_until_there_are_three() -> None:
    slow = new_runs(1.05)
    one = check(slow, make_batches(1, 40))
    assert one.verdict is Verdict.INCONCLUSIVE
    assert "processes differ too" in one.sentence
    assert one.needed_processes
    assert one.needed_processes >= 2
    assert check(slow, make_batches(8, 20)).verdict is Verdict.DRIFTED


def test_above_the_percent_rule_within_a_wild_baseline_is_inconclusive() -> None:
    rng = random.Random(4)
    wild = [
        PerfBatch(id=i, baseline=1, runs=tuple(make_run(s) for _ in range(10)))
        for i, s in enumerate(math.exp(rng.gauss(0, 0.3)) for _ in range(5))
    ]
    base = sorted(b.runs[0].e2e_ms for b in wild)[2]
    result = check([make_run(1.35 * base / 1000)] * 10, wild)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "the baseline itself varies" in result.sentence
    assert result.hint == (
        "truestep perf record CASE --runs 10  # more processes, or a quieter machine"
    )


def test_one_slow_step_is_named() -> None:
    slow = make_run(denoise_step_ms={"0": 179.0, "1": 176.0, "2": 245.0, "3": 120.0})
    result = check([slow] * 12, make_batches(4, 12))
    row = result.rows[-1]
    assert (row.name, row.verdict) == ("step 2", Verdict.DRIFTED)
    assert result.verdict is Verdict.DRIFTED


def test_memory_has_its_rule_and_load_is_only_shown() -> None:
    grown = [run.model_copy(update={"memory_mib": 620.0}) for run in new_runs(1.0)]
    result = check(grown, make_batches(8, 20))
    rows = {row.name: row for row in result.rows}
    assert rows["memory"].verdict is Verdict.DRIFTED
    assert result.sentence.startswith("drifted: three: more memory: memory 620 MiB against 500")
    assert rows["load"].verdict is None


def test_small_stages_are_left_to_the_percent_rule() -> None:
    late = [
        run.model_copy(update={"stages_ms": {**run.stages_ms, "latent": 0.9}})
        for run in new_runs(1.0)
    ]
    result = check(late, make_batches(8, 20))
    assert result.verdict is Verdict.EQUIVALENT
    rows = {row.name: row for row in result.rows}
    assert rows["latent"].note == "slower in every run; <0.1% of run"
    assert result.sentence.endswith(
        "; but latent is +350%, slower in every run; <0.1% of run: the percent rule alone judges it"
    )
    assert rows["schedule"].note == "percent rule alone: <0.1% of run"  # its twin


def with_text(runs: list[PerfRun], factor: float) -> list[PerfRun]:
    """Runs whose text stage alone takes longer, so many times."""
    return [
        run.model_copy(
            update={"stages_ms": {**run.stages_ms, "text": run.stages_ms["text"] * factor}}
        )
        for run in runs
    ]


def test_a_stage_that_is_slower_in_every_run_is_not_equivalent_for_want_of_runs() -> None:
    """At 50 recorded runs, 3 new ones have an interval of the whole run, and none of a stage."""
    recorded = make_batches(2, 25)
    result = check(with_text(new_runs(1.0, 3), 1.4), recorded)
    text = next(row for row in result.rows if row.name == "text")
    assert text.scope == "none"
    assert text.verdict is Verdict.INCONCLUSIVE
    assert text.note == "slower in every run; too few runs"
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "text 8" in result.sentence
    assert "(+4" in result.sentence
    healthy = check(new_runs(1.0, 3), recorded)
    assert healthy.verdict is Verdict.EQUIVALENT
    assert "but" not in healthy.sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"e2e_ms": 0.0}, "e2e_ms is 0"),
        ({"e2e_ms": -5.0}, "e2e_ms is -5"),
        ({"e2e_ms": math.nan}, "e2e_ms is nan"),
        ({"e2e_ms": math.inf}, "e2e_ms is inf"),
        ({"memory_mib": 0.0}, "memory_mib is 0"),
        ({"memory_mib": None}, "memory_mib is missing"),
        ({"denoise_step_ms": {}}, "denoise_step_ms has 0 steps, the case 4"),
        ({"denoise_step_ms": {str(i): 0.0 for i in range(4)}}, "denoise_step_ms 0 is 0"),
        ({"denoise_step_ms": {str(i): 150.0 for i in range(4)}}, "the steps sum to 600 ms"),
        ({"denoise_step_ms": {str(i): 200.0 for i in range(4)}}, "stages_ms denoise says 720"),
        ({"e2e_ms": 700.0}, "the stages sum to 990.7 ms, e2e_ms says 700"),
        ({"stages_ms": {"text": 1.0}}, "stages_ms schedule is missing"),
    ],
)
def test_impossible_runs_are_invalid(changes: dict[str, Any], words: str) -> None:
    result = check([make_run(), make_run(**changes)], make_batches(3, 5))
    assert result.verdict is Verdict.INVALID
    assert result.verdict.exit_code == 1
    assert any(words in problem for problem in result.problems)
    assert "run 1: " in result.sentence


def test_a_possible_run_has_nothing_wrong() -> None:
    assert impossible(make_run(), stages=("text", "denoise"), steps=4) == []


def test_steps_that_are_only_samples_are_not_summed() -> None:
    assert unequal_sums(make_run(denoise_step_ms={"0": 179.0, "3": 179.0})) == {}


def test_parts_that_do_not_add_up_are_impossible_only_where_they_were_measured_here() -> None:
    torn = make_run(denoise_step_ms={str(i): 150.0 for i in range(4)})
    assert list(unequal_sums(torn)) == ["steps"]
    assert impossible(torn) == []
    assert impossible(torn, stages=("text", "denoise")) == list(unequal_sums(torn).values())
    assert list(unequal_sums(make_run(e2e_ms=700.0))) == ["stages"]


def test_no_results_are_invalid() -> None:
    result = check([], make_batches(3, 5))
    assert result.verdict is Verdict.INVALID
    assert result.sentence == "invalid: three: there are no results"


def test_an_impossible_history_is_invalid() -> None:
    bad = PerfBatch(id=7, baseline=1, runs=(make_run(e2e_ms=-1.0),))
    result = check(new_runs(1.0), [*make_batches(2, 5), bad])
    assert result.verdict is Verdict.INVALID
    assert result.problems[0] == "history, batch 7, run 0: e2e_ms is -1"


def test_a_missing_cohort_lists_those_there_are() -> None:
    other = Cohort(case_id="digits-three", values={**COHORT.values, "torch.threads": "8"})
    far = Cohort(case_id="digits-three", values={"device.name": "another", "torch.threads": "9"})
    foreign = Cohort(source="sglang", case_id="qwen", values={})
    result = missing_result(COHORT, [(foreign, 1), (far, 3), (other, 30)], case_name="three")
    assert result.verdict is Verdict.MISSING
    assert result.verdict.exit_code == 3
    assert [a.cohort for a in result.alternatives] == [other.id, far.id]
    difference = result.alternatives[0].differences[0]
    assert (difference.key, difference.actual, difference.reference) == ("torch.threads", "1", "8")
    assert result.sentence == (
        "missing: three: no baseline of this cohort; the nearest of 2 differs in torch.threads"
    )
    assert result.hint == "truestep perf record CASE"  # the verb says which
    none = missing_result(COHORT, [], case_name="three")
    assert none.sentence.endswith("there is no history")


def test_results_are_strict_json_and_have_no_truth_value() -> None:
    broken = check([make_run(e2e_ms=math.nan)], make_batches(1, 3))
    results = PerfResults.of([broken, check(new_runs(1.0), make_batches(8, 20))], repeat="again")
    text = results.model_dump_json()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    plain = json.loads(text, parse_constant=refuse)
    assert (plain["schema_version"], plain["verdict"], plain["exit_code"]) == (1, "invalid", 1)
    again = PerfResults.model_validate_json(text)
    assert again.model_dump_json() == text
    schema = json.loads((SCHEMAS / "perf-1.json").read_text("utf-8"))
    jsonschema.validate(plain, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**plain, "verdict": "fine"}, schema)
    with pytest.raises(TypeError, match="no truth value"):
        bool(broken)
