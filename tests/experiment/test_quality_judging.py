"""From clips to an outcome: what passes, what is degraded, unmet, invalid, undecided, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from truestep.experiment.quality.frontier import dominates, marked
from truestep.experiment.quality.judging import mechanisms_of
from truestep.experiment.quality.metrics import Metric
from truestep.experiment.quality.mutations import MUTATIONS, WRONG_PROMPT
from truestep.experiment.quality.records import Acted, Clip, Point, Quality, QualityPlan, Standing
from truestep.experiment.quality.result import complete, summarise
from truestep.experiment.records import PlannedCase, PlannedCell

PROMPTS, SEEDS = 32, 4
SHARP = Metric("sharp", lambda frames, prompt: (0.0,))
VAGUE = Metric("vague", lambda frames, prompt: (0.0,))
DAMAGES = (*MUTATIONS, WRONG_PROMPT)


def plan(**changes: Any) -> QualityPlan:
    cells = changes.pop("cells", (PlannedCell(name="x", folder="x", candidate={"steps": 2}),))
    return QualityPlan(
        cases=tuple(
            PlannedCase(name=f"p{at}", content={"model": "builtin:digits", "prompt": f"p {at}"})
            for at in range(PROMPTS)
        ),
        cells=cells,
        seeds=SEEDS,
        margin=0.5,
        broken=0.1,
        **changes,
    )


def clips(
    *,
    gap: float = 0.0,
    blind: Sequence[str] = (),
    cell: str = "x",
    each: Callable[[int, int], dict[str, Any]] = lambda case, seed: {},
) -> list[Clip]:
    """Clips of both arms: `sharp` sees every damage but those it is blind to, `vague` none."""
    rng = np.random.default_rng(11)
    found = []
    for case in range(PROMPTS):
        for seed in range(SEEDS):
            score = float(rng.standard_normal())
            other = score + 0.3 * float(rng.standard_normal()) - gap
            damaged = {
                name: {"sharp": (score - (0.0 if name in blind else 8.0),), "vague": (score,)}
                for name in DAMAGES
            }
            at: dict[str, Any] = {"case": case, "seed": seed, "frames": 9, "seconds": 1.0}
            planted = dict.fromkeys(("black", "noise", "frozen", "saturated"), True)
            found.append(
                Clip(
                    **at, latent=f"b{case}-{seed}", mutated=damaged, planted=planted,
                    readings={"sharp": (score,), "vague": (score,)},
                )
            )  # fmt: skip
            own = {"readings": {"sharp": (other,), "vague": (other,)}, "latent": "c", "drift": 0.1}
            found.append(Clip(**{**at, "cell": cell, **own, **each(case, seed)}))
    return found


def judged(found: list[Clip], *metrics: Metric, **changes: Any) -> Quality:
    return summarise(plan(**changes), found, metrics=metrics or (SHARP,))


def test_no_gap_is_equivalent_in_distribution_and_a_large_one_degraded() -> None:
    good, bad = judged(clips()), judged(clips(gap=1.5))
    assert (good.standing, good.exit_code) == (Standing.IN_DISTRIBUTION, 0)
    assert good.candidates[0].rows[0].finding == "equivalent"
    assert (bad.standing, bad.exit_code) == (Standing.DEGRADED, 1)
    assert "sharp" in bad.sentence


def test_better_than_the_margin_passes_unless_both_sides_are_asked_for() -> None:
    better = clips(gap=-2.0)
    found = judged(better)
    assert found.standing is Standing.IN_DISTRIBUTION
    assert found.candidates[0].rows[0].finding == "better"
    assert "better on sharp" in found.sentence
    assert judged(better, two_sided=True).standing is Standing.INCONCLUSIVE


def test_a_loss_near_the_margin_is_inconclusive_and_says_how_many_prompts_decide() -> None:
    found = judged(clips(gap=0.4))
    assert (found.standing, found.exit_code) == (Standing.INCONCLUSIVE, 4)
    assert found.candidates[0].needed is not None
    assert "prompts would decide" in found.sentence


def test_a_metric_that_notices_nothing_has_no_vote_and_nothing_passes_by_it() -> None:
    found = judged(clips(), VAGUE)
    assert [vote.votes for vote in found.votes] == [False]
    assert "does not notice black, noise, wrong prompt" in found.votes[0].reason
    assert found.standing is Standing.INCONCLUSIVE
    assert set(found.unseen) == set(DAMAGES)
    with_a_voter = judged(clips(), SHARP, VAGUE)
    assert with_a_voter.standing is Standing.IN_DISTRIBUTION
    assert [row.metric for row in with_a_voter.candidates[0].rows] == ["sharp"]


@pytest.mark.parametrize(("blind", "votes"), [("blur", True), ("wrong prompt", False)])
def test_what_no_voter_sees_keeps_a_pass_away(blind: str, votes: bool) -> None:
    found = judged(clips(blind=[blind]))
    assert found.votes[0].votes is votes
    assert found.standing is Standing.INCONCLUSIVE
    assert blind in found.unseen
    assert any(f"no voter sees {blind}" in text for text in found.candidates[0].reasons)


def test_nan_is_degraded_and_named_and_of_the_baseline_invalid() -> None:
    def bad(case: int, seed: int) -> dict[str, Any]:
        return {"nonfinite": 3, "readings": {}} if (case, seed) == (7, 1) else {}

    found = judged(clips(each=bad))
    assert found.standing is Standing.DEGRADED
    assert "p7, seed 1 (3 numbers)" in found.sentence
    own = [
        c.model_copy(update={"nonfinite": 1}) if not c.cell and c.case == 2 else c for c in clips()
    ]
    assert judged(own).standing is Standing.INVALID
    silent = clips(each=lambda case, seed: {"readings": {"sharp": (float("nan"),)}})
    assert judged(silent).standing is Standing.DEGRADED


def test_numbers_too_large_to_be_compared_have_no_vote_and_no_pass() -> None:
    def times(found: list[Clip], factor: float, cell: str | None = None) -> list[Clip]:
        def scaled(clip: Clip) -> Clip:
            if cell is not None and clip.cell != cell:
                return clip
            up = {n: tuple(factor * v for v in values) for n, values in clip.readings.items()}
            down = {
                mutation: {n: tuple(factor * v for v in values) for n, values in each.items()}
                for mutation, each in clip.mutated.items()
            }
            return clip.model_copy(update={"readings": up, "mutated": down})

        return [scaled(clip) for clip in found]

    for gap in (0.0, 1.5):
        huge = judged(times(clips(gap=gap), 1e307))
        assert [vote.votes for vote in huge.votes] == [False]
        assert "too large to be compared" in huge.votes[0].reason
        assert huge.standing is Standing.INCONCLUSIVE
        large = judged(times(clips(gap=gap), 1e60))
        assert large.votes[0].votes
        assert large.standing is judged(clips(gap=gap)).standing
    candidate = judged(times(clips(), 1e307, cell="x"))
    assert candidate.standing is Standing.DEGRADED
    assert "too large to be compared" in candidate.sentence
    endless = judged(clips(gap=1.5), margins={"sharp": float("inf")})
    assert not endless.votes[0].votes
    assert endless.standing is Standing.INCONCLUSIVE


def test_a_mechanism_that_did_nothing_is_unmet_and_nothing_else_is_claimed() -> None:
    idle = clips(gap=2.0, each=lambda case, seed: {"acted": Acted()})
    found = judged(idle, mechanisms=("skip",))
    assert (found.standing, found.exit_code) == (Standing.UNMET, 1)
    assert "no blocks or forwards skipped" in found.sentence
    assert not found.candidates[0].rows
    busy = clips(each=lambda case, seed: {"acted": Acted(blocks_skipped=(0, 2))})
    acted = judged(busy, mechanisms=("skip",))
    assert acted.standing is Standing.IN_DISTRIBUTION
    assert acted.candidates[0].mechanisms == {"skip": 2 * PROMPTS * SEEDS}


def test_settings_stand_for_mechanisms() -> None:
    cell = PlannedCell(name="x", folder="x", candidate={"cfg": "batched", "text_cache": "true"})
    assert mechanisms_of(plan(), cell) == ("batch", "cache")
    gated = cell.model_copy(update={"candidate": {"adaptive_gate": 0.5}})
    assert mechanisms_of(plan(), gated) == ("skip",)
    assert mechanisms_of(plan(baseline={"cfg": "batched"}), cell) == ("cache",)


def test_equal_bits_are_identical_and_the_same_noise_is_paired() -> None:
    same = clips(each=lambda case, seed: {"latent": f"b{case}-{seed}"})
    assert judged(same).standing is Standing.IDENTICAL


def test_newly_broken_prompts_are_degraded_and_few_prompts_cannot_exclude_them() -> None:
    def black(case: int, seed: int) -> dict[str, Any]:
        return {"broken": ("black",)} if case < 6 and seed == 0 else {}

    found = judged(clips(each=black))
    assert found.standing is Standing.DEGRADED
    assert "broken clips: 6 of 32 prompts, were 0" in " ".join(found.candidates[0].reasons)
    few = [clip for clip in clips() if clip.case < 20]
    short = plan().model_copy(update={"cases": plan().cases[:20]})
    said = summarise(short, few, metrics=[SHARP])
    assert said.standing is Standing.INCONCLUSIVE
    assert said.candidates[0].needed == 29


def test_missing_prompts_keep_a_pass_away_and_what_raised_is_invalid() -> None:
    found = judged([c for c in clips() if not (c.cell and c.case == 31)])
    assert found.standing is Standing.INCONCLUSIVE
    assert "1 of 32 prompts are missing" in found.sentence
    raised = [*clips(), Clip(cell="x", case=0, seed=0, seconds=0, latent="", raised="Error: no")]
    assert judged(raised).standing is Standing.INVALID
    assert complete([c for c in clips() if c.seed], SEEDS) == {}


def _point(name: str, speed: float, drift: float, quality: float) -> Point:
    bounds = {
        f"{axis}_{side}": value + sign * 0.01
        for axis, value in (("speed", speed), ("drift", drift), ("quality", quality))
        for side, sign in (("low", -1), ("high", 1))
    }
    return Point(
        name=name, standing=Standing.IN_DISTRIBUTION, speed=speed, drift=drift, quality=quality,
        metric="sharp", **bounds,
    )  # fmt: skip


def test_a_point_is_dominated_where_another_is_as_good_everywhere_and_better_somewhere() -> None:
    fast, slow, fine = (
        _point("fast", 2, 0.1, 0),
        _point("slow", 1.5, 0.1, 0),
        _point("f", 1.2, 0, 1),
    )
    assert dominates(fast, slow)
    assert not dominates(slow, fast)
    assert not dominates(fast, fast)
    assert [p.dominated for p in marked([fast, slow, fine])] == ["", "fast", ""]
    assert marked([_point("useless", 0.8, 0.2, -0.5)])[0].dominated == "baseline"


def test_one_frontier_point_that_is_bad_fails_nothing_that_is_good() -> None:
    cells = tuple(PlannedCell(name=n, folder=n, candidate={"steps": n}) for n in ("a", "b"))
    good, bad = clips(cell="a"), clips(cell="b", gap=3.0)
    both = [*good, *(clip for clip in bad if clip.cell)]
    assert judged(both, cells=cells).standing is Standing.DEGRADED
    found = judged(both, cells=cells, frontier=True)
    assert found.standing is Standing.IN_DISTRIBUTION
    assert "the fastest of 1 good enough is a" in found.sentence
    assert Quality.model_validate_json(found.model_dump_json()) == found
