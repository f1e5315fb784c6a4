"""The trend of a history: as text, and as one HTML page with inline SVG that needs no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from truestep.experiment.baseline import amount, denoise_stage, numbers
from truestep.experiment.perf_records import SCHEMA_VERSION, Cohort, PerfBatch
from truestep.experiment.perf_statistics import LEVEL, median_interval
from truestep.experiment.statistics import median
from truestep.files import write_text
from truestep.report.html import page
from truestep.screen import aligned
from truestep.verdict import Difference, Float, Record

_MOST_CHARTED = 40
"""Cases whose charts are drawn; the others have their table."""


class TrendNumber(Record):
    """Median of one batch, and where it lies.

    Attributes:
        low, high: Interval of the median; the smallest and largest value where runs are too few.
        spread: Which of the two it is; `one` run has neither.
    """

    name: str
    unit: str
    median: Float
    low: Float
    high: Float
    spread: str


class TrendBatch(Record):
    """One batch of the trend.

    Attributes:
        counts: Whether it counts for the latest baseline of its cohort.
        change: Of the whole, against the batch before of the same cohort.
        changed: What of the cohort differs from the batch before.
    """

    batch: int
    cohort_id: str
    source: str
    started: str
    label: str
    runs: int
    baseline: int | None
    counts: bool
    complete: bool
    numbers: tuple[TrendNumber, ...]
    change: Float | None = None
    changed: tuple[Difference, ...] = ()

    def find(self, name: str) -> TrendNumber | None:
        """A number by name."""
        return next((n for n in self.numbers if n.name == name), None)


class TrendCase(Record):
    """All batches of one case, over its cohorts, in time order."""

    case_id: str
    cohorts: dict[str, dict[str, str]]
    batches: tuple[TrendBatch, ...]


class Trend(Record):
    """What `perf show` prints and `--json` writes."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    history: str
    level: Float = LEVEL
    sentence: str
    cases: tuple[TrendCase, ...] = Field(default=())


def build(
    cohorts: Sequence[tuple[Cohort, Sequence[PerfBatch]]], *, history: str, tool_version: str = ""
) -> Trend:
    """Arrange the batches of cohorts by case and time.

    Args:
        cohorts: Each with its batches, none empty.
        history: The file they are from, to be named.
        tool_version: Of truestep.
    """
    by_case: dict[str, list[tuple[Cohort, PerfBatch, bool]]] = {}
    for cohort, batches in cohorts:
        latest = max((b.baseline for b in batches if b.baseline is not None), default=None)
        for batch in batches:
            counts = latest is not None and batch.baseline == latest
            by_case.setdefault(cohort.case_id, []).append((cohort, batch, counts))
    cases = tuple(_case(case_id, found) for case_id, found in by_case.items())
    batches_in_all = sum(len(case.batches) for case in cases)
    runs = sum(batch.runs for case in cases for batch in case.batches)
    sentence = f"{_count(runs, 'run')} in {_count(batches_in_all, 'batch')} of "
    sentence += f"{_count(len(cases), 'case')} and {_count(len(cohorts), 'cohort')}"
    return Trend(tool_version=tool_version, history=history, sentence=sentence, cases=cases)


def _count(count: int, word: str) -> str:
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{count} {word if count == 1 else plural}"


def _case(case_id: str, found: Sequence[tuple[Cohort, PerfBatch, bool]]) -> TrendCase:
    ordered = sorted(found, key=lambda item: (item[1].started, item[1].id))
    batches: list[TrendBatch] = []
    latest: dict[str, float] = {}
    before: Cohort | None = None
    for cohort, batch, counts in ordered:
        own = _numbers(batch)
        e2e = own[0].median
        changed = cohort.differences(before) if before is not None else ()
        batches.append(
            TrendBatch(
                batch=batch.id,
                cohort_id=cohort.id,
                source=cohort.source,
                started=batch.started,
                label=batch.label,
                runs=len(batch.runs),
                baseline=batch.baseline,
                counts=counts,
                complete=batch.complete,
                numbers=own,
                change=e2e / latest[cohort.id] - 1 if latest.get(cohort.id) else None,
                changed=changed,
            )
        )
        latest[cohort.id], before = e2e, cohort
    cohorts = {cohort.id: cohort.values for cohort, _, _ in ordered}
    return TrendCase(case_id=case_id, cohorts=cohorts, batches=tuple(batches))


def _numbers(batch: PerfBatch) -> tuple[TrendNumber, ...]:
    every = [numbers(run) for run in batch.runs]
    names = [name for name in every[0] if all(name in values for values in every)]
    denoise = denoise_stage(batch.runs[0])
    found = []
    for name in names:
        values = [values[name] for values in every]
        interval = median_interval(values)
        spread = "interval" if interval else ("range" if len(values) > 1 else "one")
        low, high = interval or (min(values), max(values))
        found.append(
            TrendNumber(
                name="denoise" if name == denoise else name,
                unit="MiB" if name == "memory" else "ms",
                median=median(values),
                low=low,
                high=high,
                spread=spread,
            )
        )
    return tuple(found)


def lines(trend: Trend, *, verbose: bool = True) -> Iterator[str]:
    """The trend as text: a line a batch, cohort changes between them; the latest batches of each
    case alone where it is not to be verbose."""
    for case in trend.cases:
        yield case.case_id
        head = ("date", "runs", "e2e ms", "99 % or range", "change", "memory MiB", "", "")
        batches = case.batches if verbose else case.batches[-_LATEST:]
        kept = (0, 1, 2, 4, 6, 7) if not verbose else range(8)
        cells = [[row[i] for i in kept] for row in (head, *map(_cells, batches))]
        told = aligned(cells, left=(0, 6, 7) if verbose else (0, 4, 5))
        yield told[0]
        for batch, line in zip(batches, told[1:], strict=True):
            if batch.changed:
                yield f"  -- cohort: {differences(batch.changed)}"
            yield line
        if len(batches) < len(case.batches):
            yield f"  ... {len(case.batches) - len(batches)} earlier batches (-v)"


_LATEST = 4
"""Batches of a case that are shown by default."""


def _cells(batch: TrendBatch) -> tuple[str, ...]:
    e2e, memory = batch.find("e2e"), batch.find("memory")
    return (
        day(batch.started),
        str(batch.runs),
        amount(e2e.median) if e2e else "-",
        between(e2e) if e2e else "-",
        f"{batch.change:+.1%}" if batch.change is not None else "-",
        amount(memory.median) if memory else "-",
        standing(batch),
        batch.label,
    )


def day(started: str) -> str:
    """Date and minute of an ISO time; `-` where there is none."""
    return started[:16].replace("T", " ") or "-"


def between(found: TrendNumber) -> str:
    """Where a median lies; of few runs the range is marked as one."""
    if found.spread == "one":
        return "one run"
    text = f"{amount(found.low)} to {amount(found.high)}"
    return text if found.spread == "interval" else f"{text} (range)"


def standing(batch: TrendBatch) -> str:
    """Whether a batch counts for the baseline, in words."""
    if not batch.complete:
        return "cut short"
    if batch.baseline is None:
        return "not counted"
    return "baseline" if batch.counts else f"baseline {batch.baseline}, replaced"


def differences(changed: Sequence[Difference], most: int = 4) -> str:
    """What changed, in one line."""
    text = ", ".join(f"{d.key} {d.reference} -> {d.actual}" for d in changed[:most])
    return text + (f", {len(changed) - most} more" if len(changed) > most else "")


@dataclass(frozen=True)
class Mark:
    """One batch in a chart, in SVG units; `series` is its cohort's number."""

    x: float
    y: float
    low_y: float
    high_y: float
    series: int
    counts: bool
    title: str


@dataclass(frozen=True)
class Change:
    """A line between two batches of different cohorts; `label` is written where there is room."""

    x: float
    text_x: float
    anchor: str
    label: str
    title: str


@dataclass(frozen=True)
class Chart:
    """One number of a case over its batches; all in SVG units."""

    name: str
    unit: str
    marks: tuple[Mark, ...]
    paths: tuple[tuple[int, str], ...]
    changes: tuple[Change, ...]
    ticks: tuple[tuple[float, str], ...]
    dates: tuple[tuple[float, str], ...]
    width: int = 720
    height: int = 250
    left: int = 70
    right: int = 706
    top: int = 18
    bottom: int = 205


CHARTED = ("e2e", "denoise", "decode", "memory")
"""Numbers with a chart of their own, where two batches have them; `e2e` always has one."""


def charts(case: TrendCase) -> tuple[Chart, ...]:
    """The charts of a case."""
    found = [chart(case, name) for name in CHARTED]
    return tuple(c for c in found if c and (c.name == "e2e" or len(c.marks) > 1))


def chart(case: TrendCase, name: str) -> Chart | None:
    """Lay out one number over the batches, one place each, with cohort changes between them.

    The axis begins where the values do, not at zero: it is there to show small changes.
    """
    have = [(at, b, n) for at, b in enumerate(case.batches) if (n := b.find(name)) is not None]
    have = [h for h in have if all(math.isfinite(v) for v in (h[2].median, h[2].low, h[2].high))]
    if not have:
        return None
    frame = Chart(name, have[0][2].unit, (), (), (), (), ())
    least, most = min(h[2].low for h in have), max(h[2].high for h in have)
    room = (most - least) or 0.1 * abs(most) or 1.0
    ticks = _ticks(least - 0.08 * room, most + 0.08 * room)
    low, high = min(ticks[0], least - 0.05 * room), max(ticks[-1], most + 0.05 * room)
    count = len(case.batches)
    step = (frame.right - frame.left) / count

    def x_of(at: float) -> float:
        return round(frame.left + (at + 0.5) * step, 1)

    def y_of(value: float) -> float:
        share = (value - low) / (high - low)
        return round(frame.bottom - share * (frame.bottom - frame.top), 1)

    ids = list(case.cohorts)
    marks: list[Mark] = []
    paths: dict[int, str] = {}
    for at, batch, found in have:
        series = ids.index(batch.cohort_id)
        title = f"{day(batch.started)} {batch.label}: {amount(found.median)} {found.unit}, "
        title += f"{between(found)}, {_count(batch.runs, 'run')}, {standing(batch)}"
        marks.append(
            Mark(
                x_of(at),
                y_of(found.median),
                y_of(found.low),
                y_of(found.high),
                series,
                batch.counts,
                title,
            )
        )
        pen = "L" if series in paths else "M"
        paths[series] = paths.get(series, "") + f"{pen}{x_of(at)} {y_of(found.median)}"
    every = max(1, math.ceil(count / 8))
    return Chart(
        name=name,
        unit=frame.unit,
        marks=tuple(marks),
        paths=tuple(paths.items()),
        changes=tuple(_changes(case.batches, step, frame)),
        ticks=tuple((y_of(t), _tick_text(t, ticks)) for t in ticks),
        dates=tuple((x_of(at), _place_text(case.batches, at)) for at in range(0, count, every)),
    )


_LABEL_ROOM = 150.0
"""Width of a cohort change's label on a narrow screen, in SVG units."""


def _changes(batches: Sequence[TrendBatch], step: float, frame: Chart) -> Iterator[Change]:
    """Where the cohort changes, half a place before its first batch."""
    before: float | None = None
    for at, batch in enumerate(batches):
        if not batch.changed:
            continue
        x = round(frame.left + at * step, 1)
        last = x > frame.right - _LABEL_ROOM
        room = before is None or x - before > _LABEL_ROOM * (2 if last else 1)
        yield Change(
            x=x,
            text_x=x - 4 if last else x + 4,
            anchor="end" if last else "start",
            label="another cohort" if room else "",
            title=f"cohort: {differences(batch.changed)}",
        )
        before = x if room else before


def _place_text(batches: Sequence[TrendBatch], at: int) -> str:
    """Day of a batch; its time where the day is that of all others."""
    days = {b.started[:10] for b in batches}
    started = batches[at].started
    return (started[11:16] if len(days) == 1 and len(started) > 10 else started[5:10]) or str(at)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)] or [low]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return f"{value:,.{max(0, min(6, -math.floor(math.log10(step) + 1e-9)))}f}"


def render(trend: Trend) -> str:
    """One self-contained page; its content security policy lets it load and run nothing."""
    return page(
        "trend.html",
        trend=trend,
        items=[
            (case, charts(case) if at < _MOST_CHARTED else ())
            for at, case in enumerate(trend.cases)
        ],
        most_charted=_MOST_CHARTED,
        amount=amount,
        day=day,
        between=between,
        standing=standing,
        differences=differences,
    )


def write(path: str | Path, trend: Trend) -> None:
    """Render and write the page atomically.

    Raises:
        WriteError: It could not be written.
    """
    write_text(path, render(trend), "the report")
