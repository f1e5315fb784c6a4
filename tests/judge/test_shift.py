"""What moved an end: stages decide, not its distance."""

from __future__ import annotations

import pytest

from truestep.floors import FREELY, NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.repeats import UNSTEADY
from truestep.judge.shift import SEED_SHARE, Ends, explained, is_moved, with_shift
from truestep.verdict import (
    Comparison,
    Cost,
    Divergence,
    FloorUsed,
    Metrics,
    Row,
    Rule,
    Side,
    Verdict,
)

USED = FloorUsed(rel_l2=1e-6, max_abs=1e-6, bound=2.0, source="measured", pair="float32/float32")


def row(verdict: Verdict, rel_l2: float, name: str = "latent/final", stage: str = "final") -> Row:
    metrics = Metrics(
        count=8,
        rel_l2=rel_l2,
        max_abs=rel_l2,
        max_abs_index=(0,),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )
    return Row(
        name=name,
        verdict=verdict,
        stage=stage,
        metrics=metrics,
        floor=USED,
        ratio=rel_l2 / USED.rel_l2,
    )


def comparison(verdict: Verdict, *rows: Row, first: Divergence | None = None) -> Comparison:
    return Comparison(
        verdict=verdict,
        sentence=f"{verdict.value}: as told",
        rows=rows,
        rule=Rule(name="r", text="r"),
        actual=Side(label="candidate"),
        reference=Side(label="reference"),
        first_divergence=first,
        looked_at=("something",),
        not_looked_at=("each stage on its own (--depth steps)",),
        cost=Cost(forwards=3, forwards_generation=10, seconds=1.0),
    )


def end(rel_l2: float = 1e-3, **fields: object) -> Ends:
    return Ends(rows=[row(Verdict.DRIFTED, rel_l2)], **fields)  # type: ignore[arg-type]


def stages(verdict: Verdict = Verdict.EQUIVALENT) -> Comparison:
    place = Divergence(name="step/0003/cond", stage="prediction", step=3, branch="cond")
    one = row(verdict, 1e-7 if verdict.passed else 1e-2, "step/0003/cond", "prediction")
    return comparison(verdict, one, first=None if verdict.passed else place)


def floor() -> NoiseFloor:
    def run(kind: str, rel_l2: float, pair: str = "float32/float32") -> NoiseRun:
        tensors = (RunMetrics(name="latent/final", rel_l2=rel_l2, max_abs=rel_l2),)
        return NoiseRun(kind=f"{FREELY}{kind}", detail="d", pair=pair, tensors=tensors)

    return NoiseFloor(
        runs=(
            run("repeat", 0.0),
            run("jitter", 2e-6),
            run("threads", 3e-6),
            run("attention", 5e-6),
            run("precision", 0.7, "bfloat16/float32"),
        )
    )


def test_stages_at_rounding_make_a_benign_shift_of_any_end_that_is_no_other_sample() -> None:
    told = explained(end(seeds=(1.2, 0.9)), stages())
    assert told.outcome == "benign shift"
    assert told.text == (
        "the end differs by 0.001 (1e+03 x its floor), every stage is at rounding: a benign shift"
    )
    far = explained(end(0.9 * SEED_SHARE, seeds=(0.9,)), stages())
    assert far.outcome == "undecided"
    assert "as far as another sample, though every stage is at rounding" in far.text
    assert explained(end(0.89 * SEED_SHARE, seeds=(0.9,)), stages()).outcome == "benign shift"
    assert explained(end(0.9), stages()).outcome == "undecided"  # no other seed was run


def test_an_end_that_no_number_measures_is_never_benign() -> None:
    assert explained(end(float("nan")), stages()).outcome == "undecided"
    assert not is_moved([row(Verdict.INVALID, 1.0)])
    assert not is_moved([row(Verdict.EQUIVALENT, 1e-7)])
    assert is_moved([row(Verdict.EQUIVALENT, 1e-7), row(Verdict.INCONCLUSIVE, 2e-6)])


def test_a_stage_that_fails_made_it() -> None:
    told = explained(end(), stages(Verdict.DRIFTED))
    assert (told.outcome, told.stage) == ("fault", "prediction at step 3")
    assert told.text.endswith("which prediction at step 3 made")
    assert explained(end(), stages(Verdict.INVALID)).outcome == "fault"


@pytest.mark.parametrize(
    ("found", "outcome", "verdict"),
    [
        (Verdict.IDENTICAL, "benign shift", Verdict.EQUIVALENT),
        (Verdict.EQUIVALENT, "benign shift", Verdict.EQUIVALENT),
        (Verdict.DRIFTED, "fault", Verdict.DRIFTED),
        (Verdict.INVALID, "fault", Verdict.INVALID),
        (Verdict.INCONCLUSIVE, "undecided", Verdict.INCONCLUSIVE),
        (Verdict.INCOMPARABLE, "unexplained", Verdict.DRIFTED),
        (Verdict.MISSING, "unexplained", Verdict.DRIFTED),
    ],
)
def test_what_its_stages_say_is_the_verdict(found: Verdict, outcome: str, verdict: Verdict) -> None:
    ended, seen = comparison(Verdict.DRIFTED, *end().rows), stages(found)
    told = explained(end(), seen)
    result = with_shift(ended, seen, told)
    assert (told.outcome, result.verdict) == (outcome, verdict)
    assert result.sentence.startswith(f"{verdict.value}: the end differs by 0.001")
    assert len(result.rows) == 2
    assert result.cost is not None
    assert result.cost.forwards == 6
    passed = verdict is Verdict.EQUIVALENT
    assert (result.exit_code == 0) is passed
    assert bool(len(result.failing)) is not passed
    assert (result.first_divergence is None) is (found.passed or first_missing(seen))


def first_missing(seen: Comparison) -> bool:
    return seen.first_divergence is None


def test_steps_that_were_not_looked_at_leave_it_undecided() -> None:
    told = explained(end(), stages(), unseen="the recording keeps no models at 4 steps")
    assert told.outcome == "undecided"
    assert "every stage looked at is at rounding, but the recording keeps no models" in told.text
    faulty = explained(end(), stages(Verdict.DRIFTED), unseen="4 steps were not looked at")
    assert faulty.outcome == "fault"


def test_the_ladder_orders_what_was_measured_in_the_working_precision() -> None:
    told = explained(end(floor=floor(), seeds=(1.2, 0.9), pair="float32/float32"), stages())
    assert [rung.name for rung in told.rungs] == [
        "rerun",
        "benign twin",
        "other kernel or machine",
        "other seed",
    ]
    assert told.ladder == (
        "rerun 0 < benign twin 3e-06 < other kernel or machine 5e-06 < this 0.001 < other seed 0.9"
    )
    assert told.place == "between other kernel or machine and other seed"
    assert told.rungs[1].of == "threads"
    assert told.rungs[3].runs == 2


def test_rungs_that_were_not_measured_are_named() -> None:
    told = explained(end(), stages())
    assert told.place == "not placed: no free run was measured"
    assert told.ladder == (
        "this 0.001; not measured: rerun, benign twin, other kernel or machine, other seed"
    )
    assert told.seen_from == pytest.approx(2e-6)


def test_ends_that_do_not_come_again_are_never_benign() -> None:
    unsteady = row(Verdict.DRIFTED, 1e-3).model_copy(update={"note": UNSTEADY})
    told = explained(Ends(rows=[unsteady]), stages())
    assert told.outcome == "undecided"
    result = with_shift(comparison(Verdict.DRIFTED, unsteady), stages(), told)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.sentence.endswith(UNSTEADY)
