"""One HTML file for any number of comparisons, rendered from their JSON alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep.files import write_text
from truestep.verdict import Comparison, Results, Row, Verdict

_LABELS = {0: "pass", 1: "fail", 3: "blocked", 4: "unsure"}


@dataclass(frozen=True)
class Point:
    """One mark of the step curve, in SVG units."""

    x: float
    y: float
    title: str
    failed: bool


@dataclass(frozen=True)
class Series:
    """One line of the step curve: a stage, or a branch of it."""

    name: str
    points: tuple[Point, ...]
    path: str


@dataclass(frozen=True)
class Curve:
    """Ratio to the noise floor over steps, on a logarithmic axis."""

    width: int
    height: int
    series: tuple[Series, ...]
    floor_y: float
    bound_y: float
    bound: float
    ticks: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, str], ...]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 64, 16, 14, 34
_LEAST_RATIO = 1e-2
"""Ratios at or below this are drawn at the bottom edge (bit-equal tensors among them)."""


def curve(rows: Sequence[Row]) -> Curve | None:
    """Lay out the step curve; None where no judged row has a step."""
    judged = [r for r in rows if r.step is not None and r.ratio is not None and r.floor]
    if not judged:
        return None
    largest_step = max(r.step for r in judged if r.step is not None)
    finite = [r.ratio for r in judged if r.ratio is not None and math.isfinite(r.ratio)]
    bound = max(r.floor.bound for r in judged if r.floor)
    top = 10.0 ** math.ceil(math.log10(max([*finite, bound, 1.0]) * 1.2))

    def x_of(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / max(largest_step, 1), 1)

    def y_of(ratio: float) -> float:
        clipped = min(max(ratio if math.isfinite(ratio) else top, _LEAST_RATIO), top)
        share = math.log10(clipped / _LEAST_RATIO) / math.log10(top / _LEAST_RATIO)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    series = []
    for name in dict.fromkeys(_series_name(r) for r in judged):
        own = sorted((r for r in judged if _series_name(r) == name), key=lambda r: r.step or 0)
        points = tuple(
            Point(
                x_of(r.step or 0),
                y_of(r.ratio or 0.0),
                f"{r.name}: {r.verdict.value}, {number(r.ratio)} x floor",
                not r.verdict.passed,
            )
            for r in own
        )
        path = " ".join(f"{'L' if i else 'M'}{p.x} {p.y}" for i, p in enumerate(points))
        series.append(Series(name, points, path))
    decades = range(round(math.log10(_LEAST_RATIO)), round(math.log10(top)) + 1)
    stride = max(1, len(decades) // 8)
    marks = range(0, largest_step + 1, max(1, math.ceil(largest_step / 10)))
    return Curve(
        width=WIDTH,
        height=HEIGHT,
        series=tuple(series),
        floor_y=y_of(1.0),
        bound_y=y_of(bound),
        bound=bound,
        ticks=tuple((y_of(10.0**d), f"{10.0**d:g}") for d in list(decades)[::stride]),
        steps=tuple((x_of(step), str(step)) for step in marks),
    )


def _series_name(row: Row) -> str:
    return f"{row.stage} {row.branch}" if row.branch else row.stage or "tensors"


def number(value: float | None) -> str:
    """A number as it is shown: three digits, `-` for None, words for non-finite."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def embedded_json(text: str) -> str:
    """JSON that is safe inside a script element."""
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def render(comparisons: Sequence[Comparison]) -> str:
    """Render comparisons as one self-contained page, failing ones first.

    Args:
        comparisons: At least one; read back from their JSON they render the same.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    ordered = sorted(comparisons, key=lambda c: c.verdict.passed)
    results = Results.of(ordered)
    slim = [c.model_copy(update={"media": ()}) for c in ordered]  # frames are on the page already
    return environment.get_template("report.html").render(
        title=_title(ordered),
        results=results,
        items=[(c, curve(c.rows), label(c.verdict)) for c in ordered],
        label=label,
        data=embedded_json(Results.of(slim).model_dump_json()),
    )


def label(verdict: Verdict) -> str:
    """Style class of a verdict: pass, fail, blocked or unsure."""
    return _LABELS[verdict.exit_code]


def _title(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) == 1:
        return comparisons[0].sentence
    failed = sum(not c.verdict.passed for c in comparisons)
    passed = len(comparisons) - failed
    return f"{len(comparisons)} checks: {failed} did not pass, {passed} passed"


def write_many(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Render and write a report atomically.

    Raises:
        WriteError: It could not be written.
    """
    write_text(path, render(list(comparisons)), "the report")
