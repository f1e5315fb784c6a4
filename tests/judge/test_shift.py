"""What moved an end: stages decide, not its distance."""

from __future__ import annotations

from typing import Any

import pytest

from truestep.floors import FREELY, NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.repeats import UNSTEADY
from truestep.judge.shift import GROWTH, SEED_SHARE, Ends, explained, is_moved, with_shift
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


SEEDS = {"latent/final": 0.9}


def end(rel_l2: float = 2e-6, used: FloorUsed = USED, **fields: Any) -> Ends:
    moved = row(Verdict.DRIFTED, rel_l2)
    moved = moved.model_copy(update={"floor": used, "ratio": rel_l2 / used.rel_l2})
    return Ends(rows=[moved], **fields)


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
    told = explained(end(2e-6, seeds=SEEDS), stages())
    assert told.outcome == "benign shift"
    assert told.text == (
        "the end differs by 2e-06 (2 x its floor), every stage is at rounding: a benign shift"
    )
    wide = USED.model_copy(update={"rel_l2": 0.2})
    far = explained(end(0.9 * SEED_SHARE, wide, seeds=SEEDS), stages())
    assert far.outcome == "undecided"
    assert "as far as another sample, though every stage is at rounding" in far.text
    near = explained(end(0.89 * SEED_SHARE, wide, seeds=SEEDS), stages())
    assert near.outcome == "benign shift"
    assert explained(end(0.9, wide), stages()).outcome == "undecided"  # no other seed was run


def test_an_end_that_rounding_cannot_have_moved_is_not_benign() -> None:
    limit = GROWTH["measured"] * USED.rel_l2
    assert explained(end(0.99 * limit, seeds=SEEDS), stages()).outcome == "benign shift"
    beyond = explained(end(1.01 * limit, seeds=SEEDS), stages())
    assert beyond.outcome == "undecided"
    assert "further than any harmless run by more than rounding grows" in beyond.text
    guessed = USED.model_copy(update={"source": "analytic"})
    assert explained(end(2 * limit, guessed, seeds=SEEDS), stages()).outcome == "benign shift"


def test_an_end_that_moved_though_no_bit_of_any_stage_did_is_a_fault_of_free_runs() -> None:
    told = explained(end(2e-6, seeds=SEEDS), stages(Verdict.IDENTICAL))
    assert told.outcome == "fault"
    assert told.text.endswith("all are bit for bit the same: it is of free runs only")
    ended = comparison(Verdict.DRIFTED, *end(2e-6).rows)
    assert with_shift(ended, stages(Verdict.IDENTICAL), told).verdict is Verdict.DRIFTED


def test_every_modality_has_to_be_near_and_measured() -> None:
    wide = USED.model_copy(update={"rel_l2": 0.4})
    video, sound = row(Verdict.DRIFTED, 2e-6), row(Verdict.DRIFTED, 0.65, "audio/latent/final")
    sound = sound.model_copy(update={"floor": wide, "ratio": 1.6})
    seeds = {"latent/final": 1.2, "audio/latent/final": 1.2}
    assert explained(Ends([video, sound], seeds=seeds), stages()).outcome == "undecided"
    lacking = row(Verdict.INCOMPARABLE, 0.0, "audio/latent/final")
    told = explained(Ends([video, lacking], seeds=seeds), stages())
    assert told.outcome == "unexplained"
    ended = comparison(Verdict.DRIFTED, video, lacking)
    assert with_shift(ended, stages(), told).verdict is Verdict.DRIFTED


def test_an_end_that_no_number_measures_is_never_benign() -> None:
    assert explained(end(float("nan"), seeds=SEEDS), stages()).outcome == "undecided"
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
        (Verdict.IDENTICAL, "fault", Verdict.DRIFTED),
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
    told = explained(end(seeds=SEEDS), seen)
    result = with_shift(ended, seen, told)
    assert (told.outcome, result.verdict) == (outcome, verdict)
    assert result.sentence.startswith(f"{verdict.value}: the end differs by 2e-06")
    assert len(result.rows) == 2
    assert result.cost is not None
    assert result.cost.forwards == 6
    passed = verdict is Verdict.EQUIVALENT
    assert (result.exit_code == 0) is passed
    assert bool(len(result.failing)) is not passed
    assert (result.first_divergence is None) is found.passed


def test_steps_that_were_not_looked_at_leave_it_undecided() -> None:
    told = explained(end(seeds=SEEDS), stages(), unseen="the recording keeps no models at 4 steps")
    assert told.outcome == "undecided"
    assert "every stage looked at is at rounding, but the recording keeps no models" in told.text
    faulty = explained(end(), stages(Verdict.DRIFTED), unseen="4 steps were not looked at")
    assert faulty.outcome == "fault"


def test_the_ladder_orders_what_was_measured_in_the_working_precision() -> None:
    told = explained(end(floor=floor(), seeds=SEEDS, pair="float32/float32"), stages())
    assert [rung.name for rung in told.rungs] == [
        "rerun",
        "benign twin",
        "other kernel or machine",
        "other seed",
    ]
    assert told.ladder == (
        "rerun 0 < this 2e-06 < benign twin 3e-06 < other kernel or machine 5e-06 < other seed 0.9"
    )
    assert told.place == "between rerun and benign twin"
    assert told.rungs[1].of == "threads"


def test_rungs_that_were_not_measured_are_named() -> None:
    told = explained(end(), stages())
    assert told.place == "not placed: no free run was measured"
    assert told.ladder == (
        "this 2e-06; not measured: rerun, benign twin, other kernel or machine, other seed"
    )
    assert told.seen_from == pytest.approx(2e-6)


def test_ends_that_do_not_come_again_are_never_benign() -> None:
    unsteady = row(Verdict.DRIFTED, 1e-3).model_copy(update={"note": UNSTEADY})
    told = explained(Ends(rows=[unsteady]), stages())
    assert told.outcome == "undecided"
    result = with_shift(comparison(Verdict.DRIFTED, unsteady), stages(), told)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.sentence.endswith(UNSTEADY)
