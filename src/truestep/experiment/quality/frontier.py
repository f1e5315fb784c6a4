"""Speed against drift against quality, for several candidates and for fewer steps. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence

from truestep.experiment.quality.planning import is_fewer_steps
from truestep.experiment.quality.records import Clip, Point, QualityCell, Standing
from truestep.experiment.statistics import Interval, interval, median

LEVEL = 0.90
"""Of the intervals of speed and drift, as those of quality: 5 % on either side."""


def point_of(
    cell: QualityCell,
    baseline: Sequence[Sequence[Clip]],
    candidate: Sequence[Sequence[Clip]],
    control: Sequence[Clip],
) -> Point | None:
    """Where a candidate lies; None where there is nothing that can be drawn.

    Args:
        cell: Judged.
        baseline, candidate: Clips by prompt and seed.
        control: The baseline under a harmless change: its drift is not counted.
    """
    if cell.standing in (Standing.INVALID, Standing.UNMET):
        return None
    speed = interval(
        [
            ours.seconds / theirs.seconds
            for ours, theirs in zip(_all(baseline), _all(candidate), strict=True)
            if theirs.seconds > 0 and ours.seconds > 0
        ],
        level=LEVEL,
    )
    benign = median([c.drift for c in control if c.drift is not None]) if control else 0.0
    drifts = [
        sum(c.drift for c in row if c.drift is not None) / len(row)
        for row in candidate
        if all(c.drift is not None for c in row)
    ]
    if not drifts or not math.isfinite(speed.ratio):
        return None
    drift = interval([max(0.0, value - benign) for value in drifts], level=LEVEL)
    row = min(cell.rows, key=lambda r: r.difference / r.margin, default=None)
    if row is None and cell.standing is not Standing.IDENTICAL:
        return None
    worst = (
        (row.difference / row.margin, row.low / row.margin, row.high / row.margin)
        if row
        else (0.0, 0.0, 0.0)
    )
    return Point(
        name=cell.cell.name,
        standing=cell.standing,
        **_named("speed", speed),
        **_named("drift", drift),
        quality=worst[0],
        quality_low=worst[1],
        quality_high=worst[2],
        metric=row.metric if row else "",
        fewer_steps=is_fewer_steps(cell.cell),
    )


def _named(axis: str, found: Interval) -> dict[str, float]:
    return {axis: found.ratio, f"{axis}_low": found.low, f"{axis}_high": found.high}


def _all(rows: Sequence[Sequence[Clip]]) -> list[Clip]:
    return [clip for row in rows for clip in row]


BASELINE = Point(
    name="baseline",
    standing=Standing.IDENTICAL,
    speed=1.0,
    speed_low=1.0,
    speed_high=1.0,
    drift=0.0,
    drift_low=0.0,
    drift_high=0.0,
    quality=0.0,
    quality_low=0.0,
    quality_high=0.0,
    metric="",
)


def marked(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, each with the name of one that dominates it; the baseline may be that one."""
    found = []
    for point in points:
        others = [other for other in (BASELINE, *points) if other is not point]
        better = next((other.name for other in others if dominates(other, point)), "")
        found.append(point.model_copy(update={"dominated": better}))
    return tuple(found)


def dominates(one: Point, other: Point) -> bool:
    """Whether one is as good on every axis and, beyond both intervals, better on one."""
    as_good = one.speed >= other.speed and one.drift <= other.drift and one.quality >= other.quality
    beyond = (
        one.speed_low > other.speed_high
        or one.drift_high < other.drift_low
        or one.quality_low > other.quality_high
    )
    return as_good and beyond
