"""Where a difference of media lies: rerun < benign < other seed. Pure: no I/O.

Under the hypothesis that the run under test is one more run of the trusted side with that seed, the
reference, the reruns and it are exchangeable: each is the furthest of all with one chance in as
many as they are. That is exact, needs no distribution, and is all that a rank can say; so a few
runs decide nothing. That a run is no further than others proves no sameness: a fault that is
smaller than what reruns differ by lies within them as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from truestep.records import Ladder, MediaRun
from truestep.verdict import Verdict

ALPHA = 0.05
"""False alarms of the rank alone."""

NEEDED = math.ceil(1 / ALPHA) - 2
"""Reruns from which on the furthest of all, the reference among them, can be one in 1 / ALPHA."""

BEYOND = 2.0
"""Times the furthest trusted run that a drifted one is at least: what keeps false alarms far below
ALPHA wherever distances have no heavy tail (tests/judge/test_ladder.py counts them)."""


@dataclass(frozen=True)
class Distances:
    """How far runs are from each other.

    Attributes:
        names: Of the run under test, the reference, and the reruns, in this order.
        between: Every one from every one, symmetric, in the order of the names.
        seeds: Name of each run of another seed, and how far it is from the reference.
        copies: Name of a rerun that was left out, and of what it is equal to bit for bit.
        unit: Of the distances.
    """

    names: Sequence[str]
    between: Sequence[Sequence[float]]
    seeds: Sequence[tuple[str, float]] = ()
    copies: Sequence[tuple[str, str]] = ()
    unit: str = "levels"


def ladder(distances: Distances) -> tuple[Ladder, Verdict]:
    """Place the run under test, and what that makes of it: `drifted` or `inconclusive`."""
    count = len(distances.names)
    scores = [
        median([row[at] for at in range(count) if at != own])
        for own, row in enumerate(distances.between)
    ]
    far, trusted = distances.between[0][1], scores[1:]
    reruns = count - 2
    p_value = sum(score >= scores[0] for score in scores) / count if reruns else None
    spread = max((max(row[1:]) for row in distances.between[1:]), default=0.0)
    ratio = scores[0] / max(trusted) if reruns and max(trusted) else None
    nearest = min((distance for _, distance in distances.seeds), default=None)
    place = _place(reruns, far, spread, nearest)
    decided = bool(
        p_value is not None
        and p_value <= ALPHA
        and spread
        and ratio is not None
        and ratio >= BEYOND
    )
    told = Ladder(
        place=place,
        text=_text(distances, place, p_value, spread, nearest) + _near(p_value, ratio, reruns),
        p_value=p_value,
        needed=NEEDED,
        ratio=ratio,
        unit=distances.unit,
        runs=_runs(distances, scores),
    )
    return told, Verdict.DRIFTED if decided else Verdict.INCONCLUSIVE


def _place(reruns: int, far: float, spread: float, nearest: float | None) -> str:
    if reruns and far <= spread:
        return "within reruns"
    if nearest is not None and far >= nearest:
        return "as far as another seed"
    if reruns and nearest is not None:
        return "between reruns and other seeds"
    if nearest is not None:
        return "nearer than other seeds"
    return "beyond reruns" if reruns else "not placed"


def _text(
    distances: Distances, place: str, p_value: float | None, spread: float, nearest: float | None
) -> str:
    unit, reruns, seeds = distances.unit, len(distances.names) - 2, len(distances.seeds)
    text, rungs = f"{place}: {distances.between[0][1]:.3g} {unit} from the reference", []
    if reruns:
        rungs.append(f"{_count(reruns, 'rerun')} up to {spread:.3g} apart")
    if nearest is not None:
        rungs.append(f"{_count(seeds, 'other seed')} from {nearest:.3g}")
    text += f" ({', '.join(rungs)})" if rungs else ""
    if distances.copies and not reruns:
        text += f"; {_count(len(distances.copies), 'rerun')} that agree bit for bit with another "
        text += "run are left out"
    if reruns and not spread:
        text += "; reruns that agree bit for bit measure no harmless change"
    if nearest is not None and reruns and spread >= nearest:
        text += "; reruns are as far from each other as seeds are, so this ladder tells nothing"
    if p_value is not None and place != "within reruns":
        text += f"; p = {p_value:.2g} by rank among {reruns + 2} runs"
        if reruns < NEEDED:
            text += f", {NEEDED} different reruns could decide"
    elif not reruns:
        text += f"; {NEEDED} different runs with the same seed could decide"
    return text


def _near(p_value: float | None, ratio: float | None, reruns: int) -> str:
    """Why the furthest of enough runs is undecided all the same."""
    if reruns < NEEDED or p_value is None or p_value > ALPHA or ratio is None or ratio >= BEYOND:
        return ""
    return f", but only {ratio:.2g} x as far from the others as the next ({BEYOND:g} would decide)"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _runs(distances: Distances, scores: Sequence[float]) -> tuple[MediaRun, ...]:
    from_reference = [row[1] for row in distances.between]
    roles = ("actual", "reference", *["same seed"] * (len(scores) - 2))
    runs = [
        MediaRun(label=name, role=role, distance=distance, score=score)
        for name, role, distance, score in zip(
            distances.names, roles, from_reference, scores, strict=True
        )
    ]
    known = dict(zip(distances.names, from_reference, strict=True))
    runs += [
        MediaRun(label=name, role="same seed", distance=known.get(other, 0.0), copy_of=other)
        for name, other in distances.copies
    ]
    runs += [
        MediaRun(label=name, role="other seed", distance=distance)
        for name, distance in distances.seeds
    ]
    return tuple(sorted(runs, key=lambda run: run.distance))
