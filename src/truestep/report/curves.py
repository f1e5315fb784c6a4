"""Curves of a result laid out to be drawn: ratios over steps or modules, scores over frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truestep.keys import key_of
from truestep.records import FrameScore
from truestep.verdict import Row


@dataclass(frozen=True)
class Point:
    """One mark of a curve: where it is, its outline, and what it says."""

    x: float
    y: float
    outline: str
    title: str
    failed: bool


@dataclass(frozen=True)
class Series:
    """One line of a curve: a stage, a branch of it, or a forward. `key` is its mark at (0, 0)."""

    name: str
    points: tuple[Point, ...]
    path: str
    key: str


@dataclass(frozen=True)
class Curve:
    """Ratio to the noise floor over steps or modules, on a logarithmic axis; all in SVG units.

    `span` is the first and the last place of its axis.
    """

    axis: str
    series: tuple[Series, ...]
    floor_y: float
    bounds: tuple[tuple[float, float], ...]
    ticks: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, str], ...]
    span: tuple[int, int] = (0, 0)
    width: int = 720
    height: int = 270
    left: int = 58
    right: int = 706
    top: int = 20
    bottom: int = 228


_LEAST_RATIO = 1e-2
"""Ratios at or below this are drawn at the bottom edge (bit-equal tensors among them)."""

_MOST_RATIO = 1e12
"""Ratios above this, those that are not finite, and tensors without one are at the top edge."""

_LABEL = 14
"""Letters of a module's name below the curve, 7 units wide each at most."""

_FORWARDS = 4
"""Forwards of two traces that are drawn, each a line over their modules."""

_INSET = 12
_OUTLINES = (
    "a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",
    "v-{r}h{d}v{d}h-{d}z",
    "l{r} -{r} {r} {r} -{r} {r}z",
    "v{r}h{d}l-{r} -{d}z",
)
"""Circle, square, diamond, triangle, drawn from their left corner; `d` is twice `r`."""


def curve(rows: Sequence[Row]) -> Curve | None:
    """Lay out the ratios to the floor: over steps, or of two traces over the modules of a forward.

    Several tensors of one place are one point: the worst of them.

    Returns:
        The curve; None where no row that has a step was judged, or all that failed is elsewhere.
    """
    judged = [r for r in rows if r.step is not None and _height(r) is not None]
    if not any(r.floor for r in judged):
        return None
    deep = all(r.stage == "module" for r in judged)
    if deep:
        judged = _forwards(judged)
    if all(r.verdict.passed for r in judged) and not all(r.verdict.passed for r in rows):
        return None  # what failed is of no step: a picture in which all is well would deny it
    order = {fqn: at for at, fqn in enumerate(dict.fromkeys(r.fqn or "" for r in judged))}
    place = {id(r): order[r.fqn or ""] if deep else r.step or 0 for r in judged}
    first, last = min(place.values()), max(place.values())
    heights = [h for r in judged if (h := _height(r)) is not None and h <= _MOST_RATIO]
    bounds = sorted({r.floor.bound for r in judged if r.floor and 0 < r.floor.bound < _MOST_RATIO})
    top = 10.0 ** math.ceil(math.log10(max([*heights, *bounds, 1.0]) * 1.2))
    frame = Curve("", (), 0.0, (), (), ())
    radius = 3.4 if last - first < 80 else 2.0

    def x_of(at: int) -> float:
        left, room = frame.left + _INSET, frame.right - frame.left - 2 * _INSET
        return round(left + room * ((at - first) / (last - first) if last > first else 0.5), 1)

    def y_of(ratio: float) -> float:
        clipped = min(max(ratio, _LEAST_RATIO), top)
        share = math.log10(clipped / _LEAST_RATIO) / math.log10(top / _LEAST_RATIO)
        return round(frame.bottom - (frame.bottom - frame.top) * share, 1)

    grouped: dict[str, dict[int, list[Row]]] = {}
    for row in judged:
        name = f"step {row.step} {row.branch}" if deep else _series_name(row)
        grouped.setdefault(name, {}).setdefault(place[id(row)], []).append(row)
    series: list[Series] = []
    for name, by_place in grouped.items():
        shape = _OUTLINES[len(series) % len(_OUTLINES)]
        outline = shape.replace("{r}", f"{radius:g}").replace("{d}", f"{2 * radius:g}")
        points, line, pen = [], "", "M"
        for at in sorted(by_place):
            worst = max(by_place[at], key=lambda r: _height(r) or 0.0)
            height = _height(worst) or 0.0
            x, y = x_of(at), y_of(height)
            failed = any(not r.verdict.passed for r in by_place[at])
            mark = f"M{x - radius:.1f} {y}{outline}"
            points.append(Point(x, y, mark, _point_title(worst, len(by_place[at])), failed))
            if height <= _MOST_RATIO:
                line += f"{pen}{x} {y}"
            pen = "L" if height <= _MOST_RATIO else "M"  # no line to or past what has no measure
        series.append(Series(name, tuple(points), line, f"M-{radius:g} 0{outline}"))
    decades = range(round(math.log10(_LEAST_RATIO)), round(math.log10(top)) + 1)
    marks = range(first, last + 1, max(1, math.ceil((last - first) / 10)))
    return Curve(
        axis="module" if deep else "step",
        series=tuple(series),
        floor_y=y_of(1.0),
        bounds=tuple((y_of(bound), bound) for bound in bounds[:3]),
        ticks=tuple((y_of(10.0**d), _power(d)) for d in decades[:: 1 + len(decades) // 9]),
        steps=tuple((x_of(at), str(at)) for at in marks)
        if not deep
        else _landmarks({x_of(at): fqn for fqn, at in order.items()}),
        span=(first, last),
    )


def scored(scores: Sequence[FrameScore]) -> Curve | None:
    """Lay out the PSNR of frames; equal frames are at the top. None for a single frame."""
    if len(scores) < 2:
        return None
    frame = Curve("", (), 0.0, (), (), ())
    finite = [score.psnr_db for score in scores if math.isfinite(score.psnr_db)]
    low = 10.0 * math.floor(min(finite, default=0.0) / 10)
    top = max(10.0 * math.ceil((max(finite, default=50.0) + 1) / 10), low + 10)

    def y_of(value: float) -> float:
        share = (min(value, top) - low) / (top - low)
        return round(frame.bottom - (frame.bottom - frame.top) * share, 1)

    room = frame.right - frame.left - 2 * _INSET
    radius, points, path = 3.0 if len(scores) < 80 else 1.5, [], ""
    outline = _OUTLINES[0].replace("{r}", f"{radius:g}").replace("{d}", f"{2 * radius:g}")
    for at, score in enumerate(scores):
        x = round(frame.left + _INSET + room * at / (len(scores) - 1), 1)
        y = y_of(score.psnr_db)
        title = f"frame {score.actual}: PSNR {number(score.psnr_db)} dB, SSIM {number(score.ssim)}"
        points.append(Point(x, y, f"M{x - radius:.1f} {y}{outline}", title, False))
        path += f"{'L' if path else 'M'}{x} {y}"
    marks = range(0, len(scores), max(1, math.ceil(len(scores) / 10)))
    ticks = [low + 10 * at for at in range(round((top - low) / 10) + 1)]
    return Curve(
        axis="frame",
        series=(Series("PSNR", tuple(points), path, ""),),
        floor_y=frame.bottom,
        bounds=(),
        ticks=tuple((y_of(tick), f"{tick:g}") for tick in ticks),
        steps=tuple((points[at].x, str(scores[at].actual)) for at in marks),
    )


def _forwards(rows: Sequence[Row]) -> list[Row]:
    """Outputs of a few forwards: the first that fails, and others spread over the steps."""
    outputs = [r for r in rows if key_of(r.name).outward] or list(rows)
    every = list(dict.fromkeys((r.step, r.branch) for r in outputs))
    failing = next(((r.step, r.branch) for r in outputs if not r.verdict.passed), every[0])
    chosen = {failing, *every[:: max(1, math.ceil(len(every) / (_FORWARDS - 1)))]}
    return [r for r in outputs if (r.step, r.branch) in chosen]


def _landmarks(named: Mapping[float, str]) -> tuple[tuple[float, str], ...]:
    """Places to write a name at: modules near the root, blocks before others, with room between."""
    shallow = [(x, fqn) for x, fqn in named.items() if fqn.count(".") <= 1] or [*named.items()]
    chosen: list[tuple[float, str]] = []
    for x, fqn in sorted(shallow, key=lambda place: not place[1][-1:].isdecimal()):
        text = fqn if len(fqn) <= _LABEL else f"…{fqn[1 - _LABEL :]}"
        if all(abs(x - other) >= 7 * _LABEL for other, _ in chosen):
            chosen.append((x, text))
    return tuple(sorted(chosen))


def _height(row: Row) -> float | None:
    """What is drawn of a row: its ratio, infinity if it failed without one, None for nothing."""
    if row.ratio is not None and not math.isnan(row.ratio):
        return row.ratio
    return None if row.verdict.passed else math.inf


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if exponent < 4 else f"1e{exponent}"


def _series_name(row: Row) -> str:
    name = f"{row.stage} {row.branch}" if row.branch else row.stage or "tensors"
    return f"{name} ({row.modality})" if row.modality else name


def _point_title(row: Row, count: int) -> str:
    found = f"step {row.step}, {row.name}: {row.verdict.value}"
    if row.ratio is None:
        found += f", not measured: {row.note}" if row.note else ", not measured"
    else:
        metric = row.ratio_metric or "rel_l2"
        found += f", {number(row.ratio)} × floor ({metric})"
        if row.metrics and row.floor and row.floor.rel_l2 and metric != "rel_l2":
            found += f"; rel_l2 {number(row.metrics.rel_l2 / row.floor.rel_l2)} × floor"
    return f"{found}; the worst of {count} tensors" if count > 1 else found


def number(value: float | None) -> str:
    """A number as it is shown: three digits, `-` for None, words for non-finite."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    return f"{value:.3g}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
