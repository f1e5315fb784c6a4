"""What failed of a tensor, laid out to be drawn: every statistic beside its floor, the failing one
over steps or modules, and where along an axis of the tensor it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from truestep.explanations import Profile
from truestep.report.curves import Curve, curve, number
from truestep.verdict import Comparison, FloorUsed, Row

MEANINGS = {
    "rel_l2": "the size of the whole difference",
    "gain": "a factor between the two sides",
    "correlation": "the difference looks like the values themselves",
    "channel_mean": "an offset of a channel",
    "frame_energy": "a frame of its own",
    "row_energy": "a row of pixels of its own",
    "token_energy": "a position of its own",
    "bulk": "the half of the values that is smallest",
}

UNSEEN = 64.0
"""Factor by which a difference is multiplied, from which on the pictures themselves show nothing:
the largest difference is then 4 of 255 levels or less."""

_LEAST = 1e-2
_MOST = 1e12


@dataclass(frozen=True)
class Bar:
    """A statistic: its ratio to the floor, and from where on it is drifted."""

    name: str
    meaning: str
    y: float
    x: float
    bound_x: float
    failed: bool
    title: str


@dataclass(frozen=True)
class Bars:
    """Statistics of one tensor on a logarithmic axis; all in SVG units."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    floor_x: float
    height: int
    bottom: int
    width: int = 720
    left: int = 130
    right: int = 706
    top: int = 8


@dataclass(frozen=True)
class Stem:
    """A value at one place of an axis."""

    path: str
    title: str


@dataclass(frozen=True)
class Along:
    """A statistic along an axis of a tensor; all in SVG units."""

    axis: str
    says: str
    stems: tuple[Stem, ...]
    thick: float
    ticks: tuple[tuple[float, str], ...]
    places: tuple[tuple[float, str], ...]
    band: tuple[float, float] | None
    width: int = 720
    height: int = 220
    left: int = 100
    right: int = 706
    top: int = 14
    bottom: int = 178


@dataclass(frozen=True)
class Failing:
    """Plots of what failed first.

    Attributes:
        name: The tensor.
        unseen: Whether there are pictures of the result, and they show nothing.
        statistic: What `over` is of.
    """

    name: str
    unseen: bool
    bars: Bars | None
    along: Along | None
    over: Curve | None
    statistic: str


def failing(comparison: Comparison) -> Failing | None:
    """What can be drawn of a comparison that did not pass; None where its rows say no more."""
    if comparison.verdict.passed or comparison.evidence:
        return None
    first = comparison.first_divergence
    causes = comparison.causes
    row = next((r for r in causes if first is not None and r.name == first.name), None)
    if row is None or not (row.statistics or (first and first.profile)):
        row = next((r for r in causes if r.statistics), row)
    if row is None:
        return None
    placed = first.profile if first is not None and first.name == row.name else None
    drawn = bars(row)
    lies = along(placed, row) if placed is not None else None
    statistic, over = _over(comparison.rows, row)
    if not (drawn or lies or over):
        return None
    pictures = [m for m in comparison.media if m.frames and m.axis == "frame"]
    unseen = bool(pictures) and all(m.gain >= UNSEEN for m in pictures)
    return Failing(row.name, unseen, drawn, lies, over, statistic)


def bars(row: Row) -> Bars | None:
    """Every statistic of a row in multiples of its floor; None for one without structure.

    The largest element is left out: a result does not hold the bound that it was judged by.
    """
    if not row.statistics or row.floor is None or row.metrics is None:
        return None
    told = [("rel_l2", row.metrics.rel_l2, row.floor.rel_l2, row.floor.bound)]
    told += [(s.name, s.value, s.floor, s.bound) for s in row.statistics]
    ratios = [abs(value) / floor if floor else math.inf for _, value, floor, _ in told]
    shown = [r for r in (*ratios, *(bound for *_, bound in told)) if r < _MOST]
    top = 10.0 ** math.ceil(math.log10(max([*shown, 10.0]) * 1.2))
    plot = Bars((), (), 0.0, 0, 0)

    def x_of(ratio: float) -> float:
        clipped = min(max(ratio, _LEAST), top) if ratio == ratio else top
        share = math.log10(clipped / _LEAST) / math.log10(top / _LEAST)
        return round(plot.left + (plot.right - 12 - plot.left) * share, 1)

    found = tuple(
        Bar(
            name=name,
            meaning=MEANINGS.get(name, "another structure"),
            y=22.0 + 24 * at,
            x=x_of(ratio),
            bound_x=x_of(bound),
            failed=not ratio <= bound,
            title=f"{name} {number(value)}: {number(ratio)} × floor {number(floor)}, drifted "
            f"above {number(bound)} ×",
        )
        for at, ((name, value, floor, bound), ratio) in enumerate(zip(told, ratios, strict=True))
    )
    decades = range(round(math.log10(_LEAST)), round(math.log10(top)) + 1)
    bottom = 22 + 24 * len(found) - 8
    return Bars(
        bars=found,
        ticks=tuple((x_of(10.0**d), f"{10.0**d:g}") for d in decades[:: 1 + len(decades) // 8]),
        floor_x=x_of(1.0),
        bottom=bottom,
        height=bottom + 42,
    )


def along(profile: Profile, row: Row) -> Along | None:
    """A statistic along an axis, with the band that benign runs stay in where that is known."""
    values = [v for v in profile.values if math.isfinite(v)]
    if len(profile.values) < 2 or len(values) != len(profile.values):
        return None
    floor = next((s.floor for s in row.statistics if s.name == profile.statistic), None)
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    plot = Along("", "", (), 0.0, (), (), None)
    room = plot.right - plot.left - 24

    def y_of(value: float) -> float:
        clipped = min(max(value, low - 0.05 * span), high + 0.05 * span)
        share = (clipped - low + 0.05 * span) / (1.1 * span)
        return round(plot.bottom - (plot.bottom - plot.top) * share, 1)

    def x_of(at: int) -> float:
        return round(plot.left + 12 + room * at / (len(values) - 1), 1)

    group = -(-profile.places // len(values))
    stems = tuple(
        Stem(
            f"M{x_of(at)} {y_of(0.0)}V{y_of(value)}",
            f"{_place(profile.axis, at, group)}: {number(value)}",
        )
        for at, value in enumerate(values)
    )
    furthest = max(range(len(values)), key=lambda at: abs(values[at]))
    marks = range(0, len(values), max(1, math.ceil(len(values) / 10)))
    upper, lower = (y_of(floor), y_of(-floor if low < 0 else 0.0)) if floor else (0.0, 0.0)
    return Along(
        axis=profile.axis,
        says=f"{profile.statistic} over the rms of the reference, of each {profile.axis}; furthest "
        f"is {_place(profile.axis, furthest, group)} with {number(values[furthest])}"
        + (f"; benign runs stay within {number(floor)}" if floor else ""),
        stems=stems,
        thick=round(min(14.0, max(1.2, 0.7 * room / len(values))), 1),
        ticks=tuple((y_of(v), number(v)) for v in dict.fromkeys((low, 0.0, high))),
        places=tuple((x_of(at), str(at * group)) for at in marks),
        band=(upper, max(round(lower - upper, 1), 1.0)) if floor else None,
    )


def _place(axis: str, at: int, group: int) -> str:
    return f"{axis} {at}" if group == 1 else f"{axis}s {at * group} to {(at + 1) * group - 1}"


def _over(rows: Sequence[Row], row: Row) -> tuple[str, Curve | None]:
    """The statistic of structure that failed most, of every row of its stage that has it.

    None where it is a size, which the curve of all rows shows, or there is one place only.
    """
    beyond = [s for s in row.statistics if not s.ratio <= s.bound]
    if not beyond or row.ratio_metric in ("rel_l2", "max_abs"):
        return "", None
    worst = max(beyond, key=lambda s: s.ratio / s.bound if s.bound else math.inf)
    told = []
    for each in rows:
        found = next((s for s in each.statistics if s.name == worst.name), None)
        if found is None or each.stage != row.stage or each.floor is None:
            continue
        floor = FloorUsed(**{**each.floor.model_dump(), "bound": found.bound})
        told.append(
            each.model_copy(
                update={"ratio": found.ratio, "ratio_metric": worst.name, "floor": floor}
            )
        )
    if len({(r.step, r.fqn) for r in told}) < 2:
        return "", None
    return worst.name, curve(told)
