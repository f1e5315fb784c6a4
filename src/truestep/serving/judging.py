"""What the answers of an endpoint show: its own floor, ignored parameters, another model.

All is of pictures of 8 bits. Distances are root mean squares over the worst frame, in levels from 0
to 255. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from truestep.judge.media import frame_media
from truestep.judge.pictures import UNSEEN
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.serving.plan import (
    BASE,
    GUIDANCE,
    NEGATIVE,
    PARAMETERS,
    SEED,
    SIZE,
    STEPS,
    Ask,
    Plan,
)
from truestep.verdict import Comparison, FloorUsed, Media, Row, Rule, Side, Verdict

ROUNDING = 0.1
"""Levels: one value of a hundred off by one, which rounding to 8 bits makes of an error of 4e-5 of
the range. float16 in place of float32 makes about four times as much (tests/serving)."""

WIDER = 2.0
"""A distance within this multiple of the largest between repeats is one of theirs; beyond twice it,
none of theirs."""

NOISY = 0.1
"""Repeats that are further apart than this share of the largest effect seen hide too much."""

SAME_NOISE = 0.5
"""At this share of the way to another seed two pictures have nothing of one noise in common."""

RULE = Rule(
    name="endpoint/1",
    text="pictures of 8 bits, worst frame, rms in levels: at most 2 x the furthest of the healthy "
    f"(at least {ROUNDING:g}) is equivalent, above 4 x drifted, between inconclusive; a parameter "
    "whose change gives a repeat was ignored",
)


@dataclass(frozen=True)
class Answers:
    """What one endpoint answered.

    Attributes:
        label: Whose they are.
        pictures: Name of a request to `f h w c`, uint8.
    """

    label: str
    pictures: Mapping[str, torch.Tensor]

    @property
    def base(self) -> torch.Tensor:
        """The first of the repeats."""
        return self.pictures[f"{BASE}/0"]

    def of(self, name: str) -> list[torch.Tensor]:
        """Answers to the requests of a parameter, or the repeats."""
        own = (key for key in self.pictures if key == name or key.startswith(f"{name}/"))
        return [self.pictures[key] for key in own]


def distance(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the worst frame's differences in levels; infinite for other shapes."""
    if actual.shape != reference.shape:
        return math.inf
    squares = (actual.float() - reference.float()).square().flatten(1).mean(1, dtype=torch.float64)
    return math.sqrt(float(squares.max()))


@dataclass(frozen=True)
class Scale:
    """How far apart the answers of one endpoint are by themselves, in levels.

    Attributes:
        floor: Largest distance of two repeats.
        far: Smallest distance of the base to another seed; None where none was asked.
        widest: Largest distance of the base to any answer of its size.
    """

    floor: float
    far: float | None
    widest: float

    @property
    def repeats(self) -> float:
        """Up to here a distance is one of the repeats; of repeats that agree, no distance is."""
        return WIDER * self.floor

    @property
    def near(self) -> float:
        """Up to here a distance is one of the repeats, or of rounding."""
        return max(self.repeats, ROUNDING)

    @property
    def noisy(self) -> bool:
        """Whether its repeats hide what is to be seen."""
        return self.floor > NOISY * self.widest


def scale_of(answers: Answers) -> Scale:
    """Measure an endpoint by its repeats and its other seeds."""
    floor = max(distance(a, b) for a, b in combinations(answers.of(BASE), 2))
    far = [distance(picture, answers.base) for picture in answers.of(SEED)]
    changed = (name for name in answers.pictures if not name.startswith(f"{BASE}/"))
    others = (distance(answers.pictures[name], answers.base) for name in changed)
    widest = max(filter(math.isfinite, others), default=math.inf)
    return Scale(floor, min(far, default=None), widest)


@dataclass(frozen=True)
class _Sides:
    """Both sides with what they are measured by."""

    plan: Plan
    ours: Answers
    own: Scale
    reference: Answers | None = None
    other: Scale | None = None
    benign: float = 0.0

    @property
    def asks(self) -> dict[str, Ask]:
        return self.plan.asks()

    @property
    def near(self) -> float:
        return max(WIDER * self.benign, *(s.near for s in (self.own, self.other) if s))

    @property
    def exact(self) -> bool:
        """Whether nothing of what is known to be healthy differs by a bit."""
        return self.benign == 0 and all(s.floor == 0 for s in (self.own, self.other) if s)


def judge(
    plan: Plan,
    ours: Answers,
    reference: Answers | None = None,
    *,
    benign: Sequence[Answers] = (),
) -> Comparison:
    """Judge an endpoint's answers, by themselves or beside those of a trusted one.

    Args:
        plan: What both were asked.
        ours: The endpoint's.
        reference: The trusted one's. Without, only what needs no other side is said.
        benign: Of other set-ups that are known to be healthy: as far off the reference as they are
            is no fault.

    Returns:
        A row a parameter, and with a reference a row a picture.
    """
    other = scale_of(reference) if reference else None
    off = [
        distance(picture, reference.pictures[name])
        for side in benign
        for name, picture in side.pictures.items()
        if reference is not None
    ]
    sides = _Sides(plan, ours, scale_of(ours), reference, other, max(off, default=0.0))
    rows = [*_parameters(sides)]
    if reference is not None:
        rows += _pictures(sides, reference)
    verdict = Verdict.worst(row.verdict for row in rows)
    result = build_comparison(
        rows,
        actual=Side(label=ours.label),
        reference=Side(label=reference.label if reference else "its own repeats and seeds"),
        looked_at=(f"{len(ours.pictures)} answers of 8 bits",),
        not_looked_at=(UNSEEN, *(f"whether {name} is ignored" for name in plan.without)),
        notes=(*_reasons(verdict, rows), *_notes(sides)),
        media=_shown(rows, sides),
    )
    sentence = _sentence(verdict, rows, sides)
    return result.model_copy(update={"sentence": sentence, "rule": RULE})


def _parameters(sides: _Sides) -> Iterator[Row]:
    """A row for each parameter: has it an effect, and the one that the reference shows?"""
    for name in PARAMETERS:
        if name in sides.plan.without:
            continue
        verdict, note = (_size if name == SIZE else _effect)(sides, name)
        yield Row(name=f"parameter/{name}", verdict=verdict, note=note)


def _effect(sides: _Sides, name: str) -> tuple[Verdict, str]:
    ours, own = sides.ours, sides.own
    if name == SEED and own.far is not None and own.floor > SAME_NOISE * own.far:
        return (
            Verdict.DRIFTED,
            f"ignored: repeats of one seed are {own.floor:.3g} levels apart, other seeds "
            f"{own.far:.3g}",
        )
    if own.noisy:
        return (
            Verdict.INCONCLUSIVE,
            f"its repeats are {own.floor:.3g} levels apart, all else {own.widest:.3g}: too much",
        )
    effect = min(distance(picture, ours.base) for picture in ours.of(name))
    if effect > own.repeats:
        return Verdict.EQUIVALENT, f"has an effect: {_levels(effect)}"
    same = "the same picture bit for bit" if effect == 0 else f"{effect:.2g} levels, as a repeat"
    if sides.reference is None or sides.other is None:
        return _alone(name, same, exact=effect == 0)
    base = sides.reference.base
    theirs = min(distance(picture, base) for picture in sides.reference.of(name))
    if theirs <= sides.other.repeats:
        return Verdict.EQUIVALENT, "has no effect here, and none in the reference"
    if theirs <= max(2 * own.repeats, ROUNDING):
        note = f"no effect is seen: in the reference it has {theirs:.2g} levels, as much as noise"
        return Verdict.INCONCLUSIVE, note
    note = f"ignored: another one gives {same}, in the reference {_levels(theirs)}"
    return Verdict.DRIFTED, note


def _alone(name: str, same: str, *, exact: bool) -> tuple[Verdict, str]:
    """What it says without a reference that a parameter has no effect.

    Seeds and prompts change any picture; a model may have no guidance, and where there is noise
    it may hide what half the steps do.
    """
    if name in (GUIDANCE, NEGATIVE):
        note = f"no effect: another one gives {same}; a distilled model may have none of it"
        return Verdict.INCONCLUSIVE, note
    if name == STEPS and not exact:
        return Verdict.INCONCLUSIVE, f"no effect is seen: half of them give {same}"
    return Verdict.DRIFTED, f"ignored: another one gives {same}"


def _size(sides: _Sides, name: str) -> tuple[Verdict, str]:
    """Whether every answer has the size that was asked for, or that of the reference."""
    for key, picture in sides.ours.pictures.items():
        ask, reference = sides.asks[key], sides.reference
        got, asked = (picture.shape[2], picture.shape[1]), (ask.width, ask.height)
        theirs = reference.pictures[key].shape if reference else None
        if got != asked and (theirs is None or (theirs[2], theirs[1]) != got):
            said = "{}x{} where {}x{} was asked for".format(*got, *asked)
            return Verdict.DRIFTED, f"ignored: {key} is {said}"
    return Verdict.EQUIVALENT, "has an effect"


def _levels(value: float) -> str:
    return "another size" if math.isinf(value) else f"{value:.3g} levels"


def _pictures(sides: _Sides, reference: Answers) -> Iterator[Row]:
    """A row for each picture beside the reference's; of the repeats the first.

    Repeats were of the base alone, and what is noise there may be more for another request: where
    there is noise, another picture is `drifted` only with the base, or with most of all.
    """
    names = [key for key in sides.asks if key == f"{BASE}/0" or not key.startswith(f"{BASE}/")]
    pair = [
        {f"picture/{name}": answers.pictures[name].float() for name in names}
        for answers in (sides.ours, reference)
    ]
    offs = [distance(*(side[f"picture/{name}"] for side in pair)) for name in names]
    over = [off > 2 * sides.near for off in offs]
    sure = sides.exact or over[names.index(f"{BASE}/0")] or 2 * sum(over) > len(over)
    for row, off in zip(compare_tensors(*pair), offs, strict=True):
        yield _picture(sides, row, off, sure=sure)


def _picture(sides: _Sides, row: Row, off: float, *, sure: bool) -> Row:
    if row.verdict in (Verdict.IDENTICAL, Verdict.INCOMPARABLE):
        return row
    near, far = sides.near, sides.other.far if sides.other else None
    hidden = any(scale and scale.noisy for scale in (sides.own, sides.other))
    rms = row.metrics.rms_reference if row.metrics else 0.0
    least = near / rms if rms else math.inf
    verdict, note = Verdict.EQUIVALENT, f"{off:.2g} levels"
    if off > near:
        drifted = off > 2 * near and sure and not hidden
        verdict = Verdict.DRIFTED if drifted else Verdict.INCONCLUSIVE
        way = f", {off / far:.0%} of the way to another seed" if far else ""
        note = f"{off:.3g} levels off{way}"
    floor = FloorUsed(
        rel_l2=least,
        max_abs=math.inf,
        bound=2.0,
        source="measured",
        pair="pictures",
        runs=sides.plan.repeats,
        detail=f"{near:.2g} levels",
    )
    more = {"floor": floor, "ratio": off / near, "ratio_metric": "levels", "statistics": ()}
    return row.model_copy(update={"verdict": verdict, "note": note, **more})


def _reasons(verdict: Verdict, rows: Sequence[Row]) -> Iterator[str]:
    """Why parameters did not pass, but for the first of the worst, of which the sentence tells."""
    failing = [row for row in rows if row.metrics is None and not row.verdict.passed]
    told = next((row for row in failing if row.verdict is verdict and row.note), None)
    for row in failing:
        if row is not told and row.note:
            yield f"{row.name.removeprefix('parameter/')}: {row.note}"


def _notes(sides: _Sides) -> Iterator[str]:
    for label, scale in (("its", sides.own), ("the reference's", sides.other)):
        if scale is not None:
            far = "" if scale.far is None else f", another seed is {_levels(scale.far)} away"
            same = "the same bit for bit" if scale.floor == 0 else f"{scale.floor:.2g} levels apart"
            yield f"{label} {sides.plan.repeats} repeats are {same}{far}"
    if sides.benign:
        yield f"healthy set-ups are up to {sides.benign:.3g} levels off the reference"
    ladder = [*_ladder(sides)]
    if ladder:
        yield f"effects beside the reference's, in levels: {', '.join(ladder)}"


def _ladder(sides: _Sides) -> Iterator[str]:
    """How large a change of each parameter is on both sides."""
    if sides.reference is None:
        return
    for name in PARAMETERS:
        if name in sides.plan.without or name == SIZE:
            continue
        own, other = (
            min(distance(picture, side.base) for picture in side.of(name))
            for side in (sides.ours, sides.reference)
        )
        yield f"{name} {own:.3g} and {other:.3g}"


def _shown(rows: list[Row], sides: _Sides) -> tuple[Media, ...]:
    """The base and the picture that is furthest off, to look at beside the reference's."""
    if sides.reference is None:
        return ()
    both = [row for row in rows if row.metrics is not None]
    names = [row.name for row in sorted(both, key=lambda row: -(row.ratio or 0.0))[:1]]
    names += [row.name for row in both if row.name == f"picture/{BASE}/0"]
    pairs = {
        name: [
            answers.pictures[name.removeprefix("picture/")].permute(3, 0, 1, 2)[None] / 127.5 - 1
            for answers in (sides.ours, sides.reference)
        ]
        for name in dict.fromkeys(names)
    }
    return tuple(frame_media(*pair, name=name) for name, pair in pairs.items())


def _sentence(verdict: Verdict, rows: list[Row], sides: _Sides) -> str:
    parameters = [row for row in rows if row.name.startswith("parameter/")]
    pictures = [row for row in rows if row.name.startswith("picture/")]
    seen = f"{sides.near:.2g} levels of 255"
    if verdict.passed:
        tried = ", ".join(row.name.removeprefix("parameter/") for row in parameters)
        if not pictures:
            return f"equivalent: none of {tried} is ignored; which model it is was not looked at"
        if all(row.verdict is Verdict.IDENTICAL for row in pictures):
            return f"equivalent: {len(pictures)} pictures are the reference's bit for bit"
        return (
            f"equivalent: {len(pictures)} pictures are the reference's to {seen}; none of {tried} "
            "is ignored"
        )
    worst = [row for row in rows if row.verdict is verdict]
    ignored = [row for row in worst if row in parameters]
    if ignored:
        names = ", ".join(row.name.removeprefix("parameter/") for row in ignored)
        return f"{verdict.value}: {names}: {ignored[0].note}"
    first = max(worst, key=lambda row: row.ratio or 0.0)
    said = f"{first.name.removeprefix('picture/')} {first.note}{_cause(worst, sides)}"
    return f"{verdict.value}: {len(worst)} of {len(pictures)} pictures, {said}"


def _cause(worst: list[Row], sides: _Sides) -> str:
    """What so large a difference is usually of."""
    far = sides.other.far if sides.other else None
    base = next((row for row in worst if row.name == f"picture/{BASE}/0"), None)
    if not far or base is None or base.ratio is None:
        return ""
    if base.ratio * sides.near > SAME_NOISE * far:
        return ": another model, or the seed makes other noise"
    return ": the same noise, and other weights, precision, schedule or kernels"
