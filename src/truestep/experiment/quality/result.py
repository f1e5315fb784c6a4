"""From what lies in the folder of `ab --quality` to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truestep.experiment.quality import voting
from truestep.experiment.quality.frontier import marked, point_of
from truestep.experiment.quality.judging import judge_cell
from truestep.experiment.quality.metrics import Metric
from truestep.experiment.quality.records import (
    Clip,
    Quality,
    QualityCell,
    QualityPlan,
    Standing,
    Vote,
)
from truestep.experiment.quality.running import BASELINE, CONTROL
from truestep.experiment.quality.statistics import LEAST_PROMPTS
from truestep.experiment.records import PlannedCell

Rows = list[list[Clip]]


def summarise(
    plan: QualityPlan,
    clips: Sequence[Clip],
    *,
    metrics: Sequence[Metric],
    environment: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Quality:
    """Judge every candidate by whatever there is of it."""
    of = {name: [c for c in clips if c.cell == name] for name in {c.cell for c in clips}}
    base = complete(of.get(BASELINE, []), plan.seeds)
    trusted = [base[case] for case in sorted(base)]
    finite = bool(trusted) and not any(clip.nonfinite for row in trusted for clip in row)
    enough = finite and len(trusted) >= LEAST_PROMPTS
    votes = _votes(plan, metrics, trusted) if enough else ()
    unseen = voting.unseen(trusted, votes) if enough else ()
    detectors = voting.voting_detectors(trusted)
    cells = []
    for cell in plan.cells:
        own = of.get(cell.folder, [])
        raised = next((clip.raised for clip in own if clip.raised), "")
        found = complete(own, plan.seeds)
        both = sorted(found.keys() & base.keys())
        arms = [base[case] for case in both], [found[case] for case in both]
        judged = _early(plan, cell, raised, arms) or judge_cell(
            plan,
            cell,
            arms,
            metrics=metrics,
            votes=votes,
            unseen=unseen,
            detectors=detectors,
        )
        judged = _incomplete(plan, judged, len(plan.cases) - len(both))
        if plan.frontier:
            update = {"point": point_of(judged, *arms, of.get(CONTROL, []))}
            judged = judged.model_copy(update=update)
        cells.append(judged)
    return _whole(plan, cells, votes, unseen, len(trusted), clips, environment or {}, notes)


def complete(clips: Sequence[Clip], seeds: int) -> dict[int, list[Clip]]:
    """Clips of the prompts that have all their seeds, in order of seeds, by prompt."""
    found: dict[int, dict[int, Clip]] = {}
    for clip in clips:
        if not clip.raised:
            found.setdefault(clip.case, {})[clip.seed] = clip
    return {
        case: [own[seed] for seed in range(seeds)]
        for case, own in found.items()
        if set(own) >= set(range(seeds))
    }


def _votes(plan: QualityPlan, metrics: Sequence[Metric], rows: Rows) -> tuple[Vote, ...]:
    return tuple(
        voting.vote(
            rows,
            metric.name,
            kind=metric.kind,
            prompted=metric.prompted,
            share=plan.margin,
            declared=plan.margins.get(metric.name),
        )
        for metric in metrics
    )


def _early(
    plan: QualityPlan, cell: PlannedCell, raised: str, arms: tuple[Rows, Rows]
) -> QualityCell | None:
    """The outcome where there is nothing to judge."""
    if raised:
        standing, reason = Standing.INVALID, f"the candidate raised {raised}"
    elif len(arms[0]) < LEAST_PROMPTS:
        standing = Standing.INCONCLUSIVE
        reason = f"{len(arms[0])} of {len(plan.cases)} prompts are complete"
    else:
        return None
    return QualityCell(
        cell=cell,
        standing=standing,
        sentence=f"{standing.value}: {cell.name}: {reason}",
        reasons=(reason,),
    )


def _incomplete(plan: QualityPlan, judged: QualityCell, missing: int) -> QualityCell:
    """A pass over fewer prompts than were asked for is none."""
    if not missing or not judged.standing.passed:
        return judged.model_copy(update={"missing": missing})
    reason = f"{missing} of {len(plan.cases)} prompts are missing"
    return judged.model_copy(
        update={
            "missing": missing,
            "standing": Standing.INCONCLUSIVE,
            "sentence": f"{Standing.INCONCLUSIVE.value}: {judged.cell.name}: {reason}",
            "reasons": (reason, *judged.reasons),
        }
    )


def _whole(  # 8 parameters at most are kept by passing what was found in order
    plan: QualityPlan,
    cells: list[QualityCell],
    votes: tuple[Vote, ...],
    unseen: tuple[str, ...],
    prompts: int,
    clips: Sequence[Clip],
    environment: Mapping[str, str],
    notes: Sequence[str],
) -> Quality:
    points = marked([cell.point for cell in cells if cell.point])
    by_name = {point.name: point for point in points}
    cells = [c.model_copy(update={"point": by_name[c.point.name]}) if c.point else c for c in cells]
    standing = Standing.worst(tuple(cell.standing for cell in cells))
    sentence = cells[0].sentence
    if plan.frontier:
        standing, sentence = _best(cells, standing)
    elif len(cells) > 1:
        words = [cell.standing.value for cell in cells]
        counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        sentence = f"{standing.value}: {len(cells)} candidates: {counted}"
    return Quality(
        tool_version=plan.tool_version,
        standing=standing,
        exit_code=standing.exit_code,
        sentence=sentence,
        quality=plan,
        prompts=prompts,
        votes=votes,
        unseen=unseen,
        candidates=tuple(cells),
        environment=dict(environment),
        notes=tuple(notes),
        clips=tuple(clips),
    )


def _best(cells: Sequence[QualityCell], worst: Standing) -> tuple[Standing, str]:
    """Of a frontier: the fastest that is good enough; a point that is not fails nothing else."""
    good = [(c.point.speed, c) for c in cells if c.standing.passed and c.point]
    if not good:
        return worst, f"{worst.value}: none of {len(cells)} candidates is shown to be good enough"
    speed, best = max(good, key=lambda pair: pair[0])
    return best.standing, (
        f"{best.standing.value}: the fastest of {len(good)} good enough is {best.cell.name}, "
        f"{speed:.2f} times as fast ({len(cells)} candidates)"
    )
