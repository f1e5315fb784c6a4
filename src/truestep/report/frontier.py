"""The frontier as one SVG: speed across, drift in one panel and quality in the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import product

from truestep.experiment.quality.records import Point, Quality

WIDTH, HEIGHT = 920, 420
_TOP, _BOTTOM = 34, 330
_PANELS = ((64, 440), (524, 900))
_LEAST_DRIFT = 1e-4
"""Drift at or below this is drawn at the bottom edge."""

_MOST_QUALITY, _LEAST_QUALITY = 2.0, -6.0
"""In margins: what is beyond is drawn at the edge; -1 is where a loss is too much."""

STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#8884}.axis{stroke:#888}
.margin{stroke:#c60;stroke-dasharray:5 4}.bar{stroke:#447;stroke-width:1.2;opacity:.7}
.lead{stroke:#8888;fill:none}
.good{fill:#1a7f4b}.bad{fill:#c0392b}.open{fill:#b8860b}.dominated{fill-opacity:0}
.mark{stroke:#222;stroke-width:1.2}.good.dominated{stroke:#1a7f4b}.bad.dominated{stroke:#c0392b}
.open.dominated{stroke:#b8860b}
@media (prefers-color-scheme:dark){text{fill:#ddd}.mark{stroke:#eee}.bar{stroke:#9ac}}
"""


def points_of(found: Quality) -> list[Point]:
    """Candidates that can be drawn."""
    return [cell.point for cell in found.candidates if cell.point is not None]


def svg(points: Sequence[Point]) -> str:
    """Both panels; round marks are candidates, square ones fewer steps, hollow ones dominated."""
    most = max([1.2, *(min(p.speed_high, 2 * p.speed) for p in points)])
    least = min([0.9, *(max(p.speed_low, p.speed / 2) for p in points)])
    low, high = math.log(least), math.log(most * 1.05)

    def x_in(panel: tuple[int, int]) -> Callable[[float], float]:
        left, right = panel

        def x_of(speed: float) -> float:
            share = (math.log(max(speed, 1e-6)) - low) / (high - low)
            return round(left + (right - left) * min(max(share, 0.0), 1.0), 1)

        return x_of

    body = [
        *_panel(points, x_in(_PANELS[0]), _drift_y(points), "drift", _drift_ticks(points)),
        *_panel(points, x_in(_PANELS[1]), _quality_y, "quality", _quality_ticks()),
    ]
    for panel, title in zip(
        _PANELS,
        ("excess drift of the latent (rel_l2)", "quality: worst metric, in its margins"),
        strict=True,
    ):
        left, right = panel
        body.append(f'<text x="{left}" y="20">{escape(title)}</text>')
        body.append(f'<path class="axis" d="M{left} {_TOP}V{_BOTTOM}H{right}" fill="none"/>')
        for speed in _speeds(least, most):
            x = x_in(panel)(speed)
            body.append(f'<text x="{x}" y="{_BOTTOM + 18}" text-anchor="middle">{speed:g}x</text>')
        body.append(
            f'<text x="{(left + right) // 2}" y="{_BOTTOM + 36}" text-anchor="middle">'
            "times as fast as the baseline</text>"
        )
    key = (
        "round: a candidate; square: fewer steps; hollow: dominated; green: good enough; "
        "red: degraded; yellow: not decided; bars: 90 % intervals"
    )
    body.append(f'<text x="64" y="{HEIGHT - 12}">{escape(key)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="speed against drift and quality"><style>{STYLE}</style>'
        + "".join(body)
        + "</svg>\n"
    )


def _speeds(least: float, most: float) -> list[float]:
    ticks = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    return [tick for tick in ticks if least <= tick <= most * 1.05]


def _drift_y(points: Sequence[Point]) -> Callable[[float], float]:
    top = max([1e-2, *(point.drift_high for point in points if math.isfinite(point.drift_high))])

    def y_of(drift: float) -> float:
        share = math.log(max(drift, _LEAST_DRIFT) / _LEAST_DRIFT) / math.log(top / _LEAST_DRIFT)
        return round(_BOTTOM - (_BOTTOM - _TOP) * min(max(share, 0.0), 1.0), 1)

    return y_of


def _drift_ticks(points: Sequence[Point]) -> list[tuple[float, str]]:
    top = max([1e-2, *(point.drift_high for point in points if math.isfinite(point.drift_high))])
    return [(10.0**e, f"1e{e}") for e in range(-4, 2) if 10.0**e <= top]


def _quality_y(quality: float) -> float:
    clipped = min(max(quality, _LEAST_QUALITY), _MOST_QUALITY)
    share = (clipped - _LEAST_QUALITY) / (_MOST_QUALITY - _LEAST_QUALITY)
    return round(_BOTTOM - (_BOTTOM - _TOP) * share, 1)


def _quality_ticks() -> list[tuple[float, str]]:
    return [(float(at), f"{at:+d}" if at else "0") for at in range(-6, 3, 2)] + [(-1.0, "margin")]


def _panel(
    points: Sequence[Point],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    axis: str,
    ticks: Sequence[tuple[float, str]],
) -> list[str]:
    """Grid, bars, marks and names of one panel."""
    left, right = x_of(1e-6), x_of(1e6)
    found = []
    for value, text in ticks:
        kind = "margin" if text == "margin" else "grid"
        y = y_of(value)
        found.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        found.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    for point in points:
        x, y = x_of(point.speed), y_of(getattr(point, axis))
        low, high = y_of(getattr(point, f"{axis}_low")), y_of(getattr(point, f"{axis}_high"))
        found.append(f'<path class="bar" d="M{x} {low}V{high}"/>')
        found.append(
            f'<path class="bar" d="M{x_of(point.speed_low)} {y}H{x_of(point.speed_high)}"/>'
        )
        kind = (
            "good" if point.standing.passed else "open" if point.standing.exit_code == 4 else "bad"
        )
        kind += " dominated" if point.dominated else ""
        title = f"<title>{escape(_says(point))}</title>"
        if point.fewer_steps:
            shape = f'<rect class="mark {kind}" x="{x - 5}" y="{y - 5}" width="10" height="10">'
            found.append(f"{shape}{title}</rect>")
        else:
            shape = f'<circle class="mark {kind}" cx="{x}" cy="{y}" r="5.5">'
            found.append(f"{shape}{title}</circle>")
    marks = [(x_of(point.speed), y_of(getattr(point, axis))) for point in points]
    return [*found, *_names([point.name[:28] for point in points], marks, (left, right))]


def _names(
    names: Sequence[str], marks: Sequence[tuple[float, float]], sides: tuple[float, float]
) -> list[str]:
    """The name of each mark beside it, or as near as no other name or mark is in the way; one that
    is further off has a line to its mark."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    found = []
    for name, (x, y) in sorted(zip(names, marks, strict=True), key=lambda each: each[1]):
        at, box = _placed(name, x, y, sides, taken)
        taken.append(box)
        if abs(at - (y - 3)) > _LINE:
            end = box[0] if box[0] > x else box[2]
            found.append(f'<path class="lead" d="M{x} {y}L{round(end, 1)} {round(at - 4, 1)}"/>')
        text = f'<text x="{round(box[0], 1)}" y="{round(at, 1)}">{escape(name)}</text>'
        found.append(text)
    return found


_LETTER, _LINE = 6.6, 14
"""Of a name: the width of a letter, and the height of a line."""

Box = tuple[float, float, float, float]


def _placed(
    name: str, x: float, y: float, sides: tuple[float, float], taken: Sequence[Box]
) -> tuple[float, Box]:
    """Where the line of a name stands, and its box; beside its mark where there is no room at
    all."""
    wide = _LETTER * len(name)
    first: tuple[float, Box] | None = None
    for start, at in _lines(x, y, wide, sides):
        box = (start, at - _LINE + 2, start + wide, at + 2)
        first = first or (at, box)
        inside = sides[0] <= box[0] and box[2] <= sides[1] and box[1] >= _TOP - 14
        if inside and box[3] <= _BOTTOM and not any(_meet(box, other) for other in taken):
            return at, box
    assert first is not None
    return first


def _lines(
    x: float, y: float, wide: float, sides: tuple[float, float]
) -> Iterator[tuple[float, float]]:
    """Where a name may begin, and its line: beside its mark, then anywhere, the nearest first."""
    for step in range(24):
        away = _LINE * ((step + 1) // 2) * (-1 if step % 2 else 1)
        for start in (x + 9, x - 9 - wide):
            yield start, y - 3 + away
    columns = range(math.ceil(sides[0]), math.floor(sides[1] - wide) + 1, math.ceil(_LETTER))
    lines = range(_TOP, _BOTTOM, _LINE // 2)
    yield from sorted(product(columns, lines), key=lambda place: math.dist(place, (x, y)))


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _says(point: Point) -> str:
    text = f"{point.name}: {point.speed:.2f} times as fast, drift {point.drift:.3g}, "
    text += (
        f"quality {point.quality:+.2f} margins ({point.metric or 'same'}), {point.standing.value}"
    )
    return text + (f", dominated by {point.dominated}" if point.dominated else "")
