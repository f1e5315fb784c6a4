"""What moved the end of a free run: a fault in a stage, or rounding that grew. Pure: no I/O.

A sampler carries every rounding on through all later steps, so the end of a harmless change may lie
further away than that of a fault: its distance alone decides nothing. What decides is whether every
stage, given what was recorded, gives what was recorded. Only where all of them do, at every step,
is the distance a benign shift. It is told on a ladder of what was measured: reruns, benign twins,
other kernels or machines, other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from truestep.floors import FREELY, NoiseFloor
from truestep.judge.repeats import UNSTEADY, said_unsteady
from truestep.keys import FINALS, FREE_RUN
from truestep.records import Rung, Shift
from truestep.verdict import Comparison, Divergence, Row, Rows, Verdict, detectable

MOVED = (Verdict.DRIFTED, Verdict.INCONCLUSIVE)
"""Verdicts on an end that its distance alone cannot give: what its stages show decides."""

FAULTS = (Verdict.DRIFTED, Verdict.INVALID)
"""Verdicts on stages that explain an end. What cannot be compared explains nothing."""

SEED_SHARE = 0.5
"""From this share of the distance to another seed's end on, an end is another sample: stages that
are all at rounding do not explain it, and something acts in free runs only."""

GROWTH = {"measured": 8.0, "analytic": 100.0}
"""Multiples of its floor up to which an end may be rounding that grew: harmless arithmetic of other
kernels went up to 4 x a measured one (bench/results/shift.md)."""

INDEPENDENT = math.sqrt(2.0)
"""rel_l2 of two ends of equal size that have nothing in common, where no other seed was run."""

_RERUNS = ("repeat",)
_KERNELS = ("attention", "instructions")
RUNGS = ("rerun", "benign twin", "other kernel or machine", "other seed")


@dataclass(frozen=True)
class Ends:
    """What is known of the ends of free runs.

    Attributes:
        rows: The candidate's ends, judged.
        floor: Of the ends of the trusted side's benign runs.
        seeds: rel_l2 of the end of another seed from the reference's, by its name.
        pair: Working precisions, candidate first.
    """

    rows: Sequence[Row]
    floor: NoiseFloor | None = None
    seeds: Mapping[str, float] = field(default_factory=dict)
    pair: str = ""

    @property
    def worst(self) -> Row:
        """The one that is furthest over its floor."""
        measured = [row for row in self.rows if row.verdict in MOVED]
        return max(measured or self.rows, key=lambda row: row.ratio or 0.0)

    def nearest_seed(self, name: str) -> float:
        """How far another seed's end of this name is."""
        return self.seeds.get(name, INDEPENDENT)


def is_moved(rows: Iterable[Row]) -> bool:
    """Whether ends differ by what their distance alone cannot judge."""
    return Verdict.worst(row.verdict for row in rows) in MOVED


def explained(ends: Ends, stages: Comparison, *, unseen: str = "") -> Shift:
    """What moved the end.

    Args:
        ends: Ends of which at least one `is_moved`.
        stages: Every stage on recorded inputs.
        unseen: What the stages do not cover, in words; empty where they cover every step.
    """
    row = ends.worst
    distance = _distance(row)
    rungs = tuple(_rungs(ends))
    moved = f"the end differs by {distance:.2g}"
    moved += f" ({row.ratio:.3g} x its floor)" if row.ratio else ""
    stage = ""
    if stages.verdict.passed:
        outcome, text = _not_made(ends, stages, unseen)
    elif stages.verdict is Verdict.INCONCLUSIVE:
        outcome, text = "undecided", f"and its stages are {stages.sentence}"
    elif stages.verdict not in FAULTS:
        outcome, text = "unexplained", f"and its stages are {stages.sentence}"
    else:
        outcome, stage = "fault", _stage(stages)
        text = f"which {stage} made"
    return Shift(
        outcome=outcome,
        text=f"{moved}, {text}",
        stage=stage,
        distance=distance,
        ratio=row.ratio,
        place=_place(distance, rungs),
        rungs=rungs,
        ladder=_ladder(distance, rungs),
        seen_from=detectable(stages.rows),
    )


def _not_made(
    ends: Ends, stages: Comparison, unseen: str
) -> tuple[Literal["benign shift", "fault", "undecided", "unexplained"], str]:
    """What moved an end that no stage made: rounding that grew, or something between them."""
    other = next((end for end in ends.rows if not _may_be_moved(end)), None)
    if other is not None:
        return "unexplained", f"and `{other.name}` is {other.verdict.value}: {other.note}"
    if any(UNSTEADY in end.note for end in ends.rows):
        return "undecided", f"though every stage is at rounding; {UNSTEADY}"
    if unseen:
        return "undecided", f"every stage looked at is at rounding, but {unseen}"
    if stages.verdict is Verdict.IDENTICAL:
        return "fault", "which no stage made, all are bit for bit the same: it is of free runs only"
    moved = [end for end in ends.rows if end.verdict in MOVED]
    if any(not _distance(end) < SEED_SHARE * ends.nearest_seed(end.name) for end in moved):
        text = "as far as another sample, though every stage is at rounding"
        return "undecided", f"{text}: what acts in free runs only is not seen"
    if any((end.ratio or math.inf) > _growth(end) for end in moved):
        text = "further than any harmless run by more than rounding grows"
        return "undecided", f"{text}, though every stage is at rounding: is it of free runs only?"
    return "benign shift", "every stage is at rounding: a benign shift"


def _may_be_moved(end: Row) -> bool:
    return end.verdict.passed or end.verdict in MOVED


def _growth(end: Row) -> float:
    return GROWTH.get(end.floor.source if end.floor else "", GROWTH["analytic"])


def _distance(end: Row) -> float:
    return end.metrics.rel_l2 if end.metrics else math.nan


def with_shift(ended: Comparison, stages: Comparison, shift: Shift) -> Comparison:
    """The comparison of ends, judged by what its stages show.

    Ends of a benign shift are equivalent, and say that they are further away than their floor; the
    rows of the stages follow.
    """
    benign = shift.outcome == "benign shift"
    verdict = {
        "benign shift": Verdict.EQUIVALENT,
        "undecided": Verdict.INCONCLUSIVE,
        "unexplained": ended.verdict,
        "fault": stages.verdict if stages.verdict in FAULTS else ended.verdict,
    }[shift.outcome]
    rows = [_at(row, verdict, shift) for row in Rows.of(ended.rows)]
    first = _first(stages.first_divergence, shift, ended)
    where = f" (first divergence: {first})" if first is not None and shift.stage else ""
    update: dict[str, Any] = {
        "verdict": verdict,
        "sentence": f"{verdict.value}: {shift.text}{where}",
        "rows": Rows.of((*rows, *stages.rows)),
        "first_divergence": first,
        "shift": shift,
        "looked_at": (*ended.looked_at, *stages.looked_at),
        "not_looked_at": tuple(t for t in stages.not_looked_at if "over a free run" not in t),
        "notes": tuple(dict.fromkeys((*ended.notes, *stages.notes))),
        "missing": (*ended.missing, *stages.missing),
        "unexpected": (*ended.unexpected, *stages.unexpected),
        "hint": "" if benign else stages.hint or ended.hint,
    }
    if ended.cost is not None and stages.cost is not None:
        update["cost"] = ended.cost.model_copy(
            update={
                "forwards": ended.cost.forwards + stages.cost.forwards,
                "seconds": ended.cost.seconds + stages.cost.seconds,
            }
        )
    found = ended.model_copy(update=update)
    return found if UNSTEADY in found.sentence else said_unsteady(found)


def _at(row: Row, verdict: Verdict, shift: Shift) -> Row:
    """The row of an end as its stages judge it, by a name that no stage has."""
    row = row.model_copy(update={"name": row.name.replace(FINALS[0], FREE_RUN)})
    if row.verdict not in MOVED or verdict not in (Verdict.EQUIVALENT, Verdict.INCONCLUSIVE):
        return row
    note = "; ".join(part for part in (shift.outcome, row.note) if part)
    return row.model_copy(update={"verdict": verdict, "note": note})


def _first(found: Divergence | None, shift: Shift, ended: Comparison) -> Divergence | None:
    if shift.outcome == "benign shift":
        return None
    return found or ended.first_divergence


def _stage(stages: Comparison) -> str:
    first = stages.first_divergence
    if first is None or not first.stage:
        failing = stages.failing
        return f"`{failing[0].name}`" if len(failing) else "a stage"
    at = f" at step {first.step}" if first.step is not None else ""
    return f"{first.stage}{at}"


def _rungs(ends: Ends) -> Iterator[Rung]:
    """The furthest end of every kind of harmless run, and the nearest of other seeds."""
    measured: dict[str, list[tuple[float, str]]] = {name: [] for name in RUNGS}
    for run in ends.floor.runs if ends.floor else ():
        if ends.pair and run.pair != ends.pair:
            continue
        kind = run.kind.removeprefix(FREELY)
        name = RUNGS[0] if kind in _RERUNS else RUNGS[2] if kind in _KERNELS else RUNGS[1]
        measured[name] += [(found.rel_l2, kind) for found in run.tensors]
    for name in RUNGS[:3]:
        if measured[name]:
            distance, kind = max(measured[name])
            yield Rung(name=name, distance=distance, runs=len(measured[name]), of=kind)
    seeds = [distance for distance in ends.seeds.values() if distance > 0.0]
    if seeds:
        yield Rung(name=RUNGS[3], distance=min(seeds), runs=1, of="seed")


def _place(distance: float, rungs: Sequence[Rung]) -> str:
    """Where a distance lies among the rungs, in words."""
    below = [rung for rung in rungs if rung.distance < distance]
    above = [rung for rung in rungs if rung.distance >= distance]
    if not rungs or math.isnan(distance):
        return "not placed: " + (
            "its distance is no number" if rungs else "no free run was measured"
        )
    if not below:
        return f"within {above[0].name}"
    furthest = max(below, key=lambda rung: rung.distance)
    if not above:
        return f"beyond {furthest.name}"
    return f"between {furthest.name} and {min(above, key=lambda rung: rung.distance).name}"


def _ladder(distance: float, rungs: Sequence[Rung]) -> str:
    """The rungs in order of distance, with the candidate among them."""
    marks = [(rung.distance, f"{rung.name} {rung.distance:.2g}") for rung in rungs]
    marks.append((distance, f"this {distance:.2g}"))
    lacking = [name for name in RUNGS if name not in {rung.name for rung in rungs}]
    text = " < ".join(mark for _, mark in sorted(marks, key=lambda mark: mark[0]))
    return text + (f"; not measured: {', '.join(lacking)}" if lacking else "")
