"""From clips of two arms to an outcome: is the change still good enough? Pure: no I/O.

A pass needs every voter to be not worse, and broken clips to be rare enough, each shown at 5 %.
That all must hold needs no correction: for a wrong pass every one of them must be wrong, so the
chance is at most that of one (intersection-union test, Berger 1982). A claim that something is
degraded needs but one of several, so those are corrected with Holm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from truestep.experiment.quality.metrics import Metric
from truestep.experiment.quality.records import (
    MECHANISMS,
    Acted,
    Broken,
    Clip,
    Mechanism,
    MetricRow,
    QualityCell,
    QualityPlan,
    Standing,
    Vote,
)
from truestep.experiment.quality.statistics import (
    LARGEST,
    Margin,
    Paired,
    Rate,
    compare,
    holm,
    measurable,
    prompts_for_rate,
    rate_of,
    tail_of,
)
from truestep.experiment.quality.voting import Scorer, readings_of
from truestep.experiment.records import PlannedCell

Rows = Sequence[Sequence[Clip]]
Flags = NDArray[np.bool_]
LOWEST = 3
"""Prompts that are named as those that lost most."""

_BATCHED = {"cfg": ("batched", "batch"), "text_attention": ("collapsed", "collapse")}


def mechanisms_of(plan: QualityPlan, cell: PlannedCell) -> tuple[Mechanism, ...]:
    """What a candidate must have done: what was declared, and what its settings stand for."""
    own = {**cell.settings, **cell.candidate}
    found: list[Mechanism] = list(plan.mechanisms)
    for key, (value, mechanism) in _BATCHED.items():
        if own.get(key) == value and plan.baseline.get(key) != value:
            found.append(mechanism)  # type: ignore[arg-type]
    if str(own.get("text_cache", "")).lower() in ("true", "1", "on"):
        found.append("cache")
    if any(own.get(key) not in (None, "none") for key in ("adaptive_gate", "adaptive_agreement")):
        found.append("skip")
    return tuple(dict.fromkeys(found))


def acted_in(clips: Sequence[Clip]) -> Acted:
    """The least that the mechanism did in any of the clips that were counted, step by step."""
    counted = [clip.acted for clip in clips if clip.acted is not None]
    if not counted:
        return Acted()
    steps = {len(each.blocks_skipped) for each in counted}
    hits = {len(each.cache_hits) for each in counted}
    return Acted(
        forwards=max(each.forwards for each in counted),
        baseline_forwards=min(each.baseline_forwards for each in counted),
        blocks_skipped=_least([each.blocks_skipped for each in counted]) if len(steps) == 1 else (),
        cache_hits=_least([each.cache_hits for each in counted]) if len(hits) == 1 else (),
        batched=min(each.batched for each in counted),
        collapsed=min(each.collapsed for each in counted),
        quantised=min(each.quantised for each in counted),
        fallbacks=tuple(dict.fromkeys(text for each in counted for text in each.fallbacks)),
    )


def _least(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(min(column) for column in zip(*counts, strict=True))


def judge_cell(
    plan: QualityPlan,
    cell: PlannedCell,
    arms: tuple[Rows, Rows],
    *,
    metrics: Sequence[Metric],
    votes: Sequence[Vote],
    unseen: Sequence[str],
    detectors: tuple[tuple[str, ...], Mapping[str, str]],
) -> QualityCell:
    """Judge one candidate.

    Args:
        arms: Clips of baseline and candidate, by prompt and seed.
        votes: What the baseline's mutations said of every metric.
        unseen: Mutations that no voter kills.
        detectors: Those that vote on broken clips, and why others do not.
    """
    baseline, candidate = arms
    clips = [clip for row in candidate for clip in row]
    acted, wanted = acted_in(clips), mechanisms_of(plan, cell)
    counts = {name: sum(c.acted.count(name) for c in clips if c.acted) for name in wanted}
    known = {"cell": cell, "mechanisms": {str(k): v for k, v in counts.items()}, "acted": acted}
    idle = [f"no {MECHANISMS[name]} in any generation" for name in wanted if not counts[name]]
    idle += acted.fallbacks
    if idle:
        return _ended(plan, known, Standing.UNMET, idle)
    wrong = _not_finite(plan, baseline)
    if wrong:
        return _ended(plan, known, Standing.INVALID, [f"the baseline itself: {wrong}"])
    wrong = _not_finite(plan, candidate)
    if wrong:
        return _ended(plan, known, Standing.DEGRADED, [wrong])
    pairs = [
        (a, b)
        for ours, theirs in zip(*arms, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    if all((a.latent, a.decoded) == (b.latent, b.decoded) for a, b in pairs):
        said = "every latent and every frame is the baseline's, bit by bit"
        return _ended(plan, known, Standing.IDENTICAL, [said])
    voters = {vote.metric: vote for vote in votes if vote.votes}
    rows, found, lost = [], {}, {}
    for metric in metrics:
        if metric.name in voters:
            row, paired, gone = _row(plan, arms, metric, voters[metric.name])
            if isinstance(row, str):
                return _ended(plan, known, Standing.DEGRADED, [row])
            rows.append(row)
            found[metric.name] = paired
            lost[f"{metric.name} lost"] = gone
    broken, rate = broken_in(plan, arms, detectors, lost)
    known |= {"rows": tuple(rows), "broken": broken}
    return _weighed(plan, known, rows, found, broken, rate, unseen)


def _weighed(
    plan: QualityPlan,
    known: dict[str, object],
    rows: Sequence[MetricRow],
    found: Mapping[str, Paired],
    broken: Broken,
    rate: Rate,
    unseen: Sequence[str],
) -> QualityCell:
    """The outcome by all voters together."""
    losses = {
        **{row.metric: row.p_degraded for row in rows},
        **{f"worst decile of {row.metric}": row.worst_p for row in rows},
        "broken clips": rate.p_more,
    }
    shown = holm(losses)
    if shown:
        told = [_loss(name, rows, broken) for name in shown]
        return _ended(plan, known, Standing.DEGRADED, told)
    open_ = [_open(row) for row in rows if not found[row.metric].not_worse]
    needs = [row.needed for row in rows if not found[row.metric].not_worse]
    if plan.two_sided:
        beyond = [r for r in rows if found[r.metric].not_worse and not found[r.metric].equivalent]
        open_ += [f"{r.metric} may be better by more than its margin" for r in beyond]
    if rate.new_high > plan.broken:
        needed = prompts_for_rate(rate.new, plan.broken)
        needs.append(needed)
        open_.append(
            f"{rate.new} of {rate.prompts} prompts newly broken may be {rate.new_high:.0%} "
            f"(allowed {plan.broken:.0%})"
        )
    if not rows:
        open_.append("no metric votes")
    open_ += [f"no voter sees {name}" for name in unseen]
    if open_:
        blind = bool(unseen) or not rows
        counts = [need for need in needs if need is not None]
        decidable = not blind and len(counts) == len(needs)
        known["needed"] = max(counts, default=None) if decidable else None
        return _ended(plan, known, Standing.INCONCLUSIVE, open_)
    return _ended(plan, known, Standing.IN_DISTRIBUTION, _standing_of(rows))


def _standing_of(rows: Sequence[MetricRow]) -> list[str]:
    better = [row.metric for row in rows if row.finding == "better"]
    return [f"better on {', '.join(better)}"] if better else []


def _open(row: MetricRow) -> str:
    return (
        f"{row.metric} {row.difference:+.3g} (at least {row.low:+.3g}) may lose more than its "
        f"margin of {row.margin:.3g}"
    )


def _loss(name: str, rows: Sequence[MetricRow], broken: Broken) -> str:
    if name == "broken clips":
        return (
            f"broken clips: {broken.candidate} of {broken.prompts} prompts, were {broken.baseline}"
        )
    metric = name.removeprefix("worst decile of ")
    row = next(row for row in rows if row.metric == metric)
    if name != metric:
        now, before = row.worst_prompts
        return f"{name}: {now} prompts are as bad, were {before}"
    return (
        f"{metric} {row.difference:+.3g} (at most {row.high:+.3g}), its margin is {row.margin:.3g}"
    )


def _ended(
    plan: QualityPlan, known: Mapping[str, object], standing: Standing, reasons: Sequence[str]
) -> QualityCell:
    cell: PlannedCell = known["cell"]  # type: ignore[assignment]
    told = f"{standing.value}: {cell.name}"
    if reasons:
        told += f": {reasons[0]}"
        told += f"; {len(reasons) - 1} more" if len(reasons) > 1 else ""
    elif standing is Standing.IN_DISTRIBUTION:
        told += ": no metric loses more than its margin"
    needed = known.get("needed")
    told += f"; about {needed} prompts would decide" if needed else ""
    fields = {**known, "standing": standing, "sentence": told, "reasons": tuple(reasons)}
    return QualityCell.model_validate(fields)


def _not_finite(plan: QualityPlan, rows: Rows) -> str:
    bad = [clip for row in rows for clip in row if clip.nonfinite]
    if not bad:
        return ""
    first = plan.cases[bad[0].case]
    return (
        f"{len(bad)} of {sum(map(len, rows))} generations are not finite, the first is "
        f"{first.name}, seed {bad[0].seed} ({bad[0].nonfinite} numbers)"
    )


def _row(
    plan: QualityPlan, arms: tuple[Rows, Rows], metric: Metric, voted: Vote
) -> tuple[MetricRow | str, Paired, tuple[Flags, Flags]]:
    """One metric of a candidate, in words where it gives no number; and which clips lost it."""
    baseline, candidate = (readings_of(rows, metric.name) for rows in arms)
    if not measurable(candidate):
        place = tuple(np.argwhere(~(np.abs(candidate) <= LARGEST))[0])
        nothing = np.zeros(candidate.shape[:2], dtype=bool)
        given = float(candidate[place])
        what = f"{given:.1e}, too large to be compared," if np.isfinite(given) else "no number"
        said = f"{metric.name} gives {what} for {_name(plan, arms[1], int(place[0]))}"
        return said, Paired(0, 0, 0, 1, 1, 1, 0), (nothing, nothing)
    scorer = Scorer(baseline, metric.kind)
    theirs = scorer.scores(candidate)
    found = compare(scorer.baseline, theirs, Margin(voted.margin, voted.share, voted.spread))
    tail = tail_of(scorer.baseline, theirs)
    lost = np.argsort((theirs - scorer.baseline).mean(axis=1))[:LOWEST]
    row = MetricRow(
        metric=metric.name,
        finding=_finding(found),
        baseline=float(scorer.baseline.mean()),
        candidate=float(theirs.mean()),
        difference=found.difference,
        low=found.low,
        high=found.high,
        margin=voted.margin,
        p_worse=found.p_worse,
        p_better=found.p_better,
        p_degraded=found.p_degraded,
        needed=found.needed,
        worst_difference=tail.difference,
        worst_low=tail.low,
        worst_high=tail.high,
        worst_prompts=(tail.rate.candidate, tail.rate.baseline),
        worst_rate_high=tail.rate.high,
        worst_p=tail.rate.p_more,
        lowest=tuple(_name(plan, arms[1], int(at)) for at in lost),
    )
    limit = -np.inf if voted.lost_below is None else voted.lost_below
    return row, found, (scorer.baseline < limit, theirs < limit)


def _name(plan: QualityPlan, rows: Rows, at: int) -> str:
    return plan.cases[rows[at][0].case].name


def _finding(found: Paired) -> str:
    if found.not_worse:
        if found.better:
            return "better"
        return "equivalent" if found.equivalent else "not worse"
    return "degraded" if found.p_degraded <= 0.05 else "undecided"


def broken_in(
    plan: QualityPlan,
    arms: tuple[Rows, Rows],
    detectors: tuple[tuple[str, ...], Mapping[str, str]],
    lost: Mapping[str, tuple[Flags, Flags]],
) -> tuple[Broken, Rate]:
    """Prompts of which a clip is broken.

    Args:
        detectors: Those that vote, and why others do not.
        lost: By metric, clips `prompt seed` of baseline and candidate that lost what was asked for.
    """
    voters, refused = detectors
    flags: list[Flags] = []
    kinds: dict[str, int] = {}
    for at, rows in enumerate(arms):
        by_kind = {
            name: np.array([[name in clip.broken for clip in row] for row in rows], dtype=bool)
            for name in voters
        }
        by_kind |= {name: sides[at] for name, sides in lost.items()}
        none = np.zeros((len(rows), plan.seeds), dtype=bool)
        flags.append(np.logical_or.reduce([none, *by_kind.values()]))
        kinds = {name: int(found.sum()) for name, found in by_kind.items() if found.any()}
    before, now = ([bool(row.any()) for row in found] for found in flags)
    rate = rate_of(before, now)
    new = [at for at, (was, is_) in enumerate(zip(before, now, strict=True)) if is_ and not was]
    broken = Broken(
        detectors=voters,
        refused=dict(refused),
        baseline=rate.baseline,
        candidate=rate.candidate,
        new=rate.new,
        prompts=rate.prompts,
        high=rate.high,
        new_high=rate.new_high,
        p_more=rate.p_more,
        kinds=kinds,
        names=tuple(_name(plan, arms[1], at) for at in new[:LOWEST]),
    )
    return broken, rate
