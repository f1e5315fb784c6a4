"""Results in the terminal: plain lines one can grep; colour only ever repeats a word."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

import click

from truestep.verdict import Comparison, Results, Row, Verdict

MAX_GROWTH = 16
MAX_ROWS = 20
MAX_ROWS_OF_STAGE = 5
_COLOURS = {0: "green", 1: "red", 3: "yellow", 4: "yellow"}


def print_results(results: Results, *, report: str | None = None) -> None:
    """Print every comparison; the last line is the sentence, then `report:` and `repeat:`."""
    for comparison in results.comparisons:
        for line in lines(comparison):
            click.echo(line)
        click.echo()
    if len(results.comparisons) == 1:
        comparison = results.comparisons[0]
        sentence = comparison.sentence
    else:
        counts: dict[Verdict, int] = {}
        for comparison in results.comparisons:
            counts[comparison.verdict] = counts.get(comparison.verdict, 0) + 1
        parts = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
        sentence = f"{len(results.comparisons)} cases: {parts}"
    click.secho(sentence, fg=_COLOURS[results.exit_code], bold=True)
    if report:
        click.echo(f"report: {report}")
    repeat = next((c.repeat for c in results.comparisons if c.repeat), "")
    if repeat:
        click.echo(f"repeat: {repeat}")


def lines(comparison: Comparison) -> Iterable[str]:
    """A comparison as text: outcome, what was seen, failing rows, gates, rule."""
    word = "PASSED" if comparison.verdict.passed else "FAILED"
    colour = _COLOURS[comparison.verdict.exit_code]
    name = comparison.case_id or comparison.actual.label
    what = f" [{comparison.actual.label}]" if comparison.case_id else ""
    yield f"{click.style(word, fg=colour, bold=True)} {comparison.verdict.value} {name}{what}"
    for difference in comparison.case_differences:
        yield f"  case         {difference.key}: {difference.actual} (was {difference.reference})"
    for difference in comparison.environment_differences:
        yield f"  environment  {difference.key}: {difference.actual} (was {difference.reference})"
    yield from _table(comparison)
    if comparison.first_divergence and comparison.first_divergence.operator:
        yield from _wrapped("at", comparison.first_divergence.operator)
    yield from _growth(comparison)
    for gate in comparison.gates:
        numbers = ", ".join(f"{key} {value:.2e}" for key, value in gate.metrics.items())
        yield f"  other gate   {gate.name}: {'passes' if gate.passed else 'fails'} ({numbers})"
    if comparison.looked_at:
        yield from _wrapped("looked at", ", ".join(comparison.looked_at))
    if comparison.not_looked_at:
        yield from _wrapped("not looked at", ", ".join(comparison.not_looked_at))
    cost = comparison.cost
    if cost is not None and cost.forwards_generation:
        yield (
            f"  cost         {cost.forwards} forwards, {cost.share:.0%} of a generation's "
            f"{cost.forwards_generation}; {cost.seconds:.2f} s"
        )
    detectable = comparison.detectable
    if comparison.verdict.passed and detectable is not None:
        yield f"  detectable   a relative change of {detectable:.1e} in any stage looked at"
    yield from _wrapped("rule", comparison.rule.text)
    for note in comparison.notes:
        yield from _wrapped("note", note)
    if comparison.hint and not comparison.verdict.passed:
        yield f"  hint         {comparison.hint}"


def _wrapped(label: str, text: str) -> Iterable[str]:
    lead = f"  {label:<13}"[:15]
    return textwrap.wrap(
        text,
        width=100,
        initial_indent=lead if len(label) < 13 else lead + " ",
        subsequent_indent=" " * 15,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _table(comparison: Comparison) -> Iterable[str]:
    """Failing rows first (at most 20, 5 a stage), then one line a stage for what passed."""
    # What decided comes first: thousands of undecided rows must not hide it.
    failing = sorted(comparison.failing, key=lambda row: row.verdict is not comparison.verdict)
    picked: list[Row] = []
    for row in failing:
        same = sum(other.stage == row.stage for other in picked)
        if len(picked) < MAX_ROWS and (not row.stage or same < MAX_ROWS_OF_STAGE):
            picked.append(row)
    shown = [_cells(row) for row in picked]
    if shown:
        shown.insert(0, ("tensor", "verdict", "rel_l2", "floor", "x floor", "note"))
        widths = [max(len(cells[i]) for cells in shown) for i in range(5)]
        for cells in shown:
            head = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
            yield f"  {head}  {cells[5]}".rstrip()
        if len(failing) > len(picked):
            yield f"  ... {len(failing) - len(picked)} more failed"
    stages: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.verdict.passed:
            stages.setdefault(row.stage or "tensors", []).append(row)
    for stage, rows in stages.items():
        exact = sum(row.verdict is Verdict.IDENTICAL for row in rows)
        worst = max((row.ratio for row in rows if row.ratio is not None), default=0.0)
        tail = "all bit-equal" if exact == len(rows) else f"worst {worst:.2g} x floor"
        yield f"  {stage:<12} {len(rows)} of {_total(comparison, stage)} pass, {tail}"


def _growth(comparison: Comparison) -> Iterable[str]:
    """Of two traces: how far the modules near the root are over the floor, in one forward."""
    first = comparison.first_divergence
    if first is None or not any(row.origin for row in comparison.rows):
        return
    worst: dict[str, float] = {}
    for row in comparison.rows:
        output = row.name.rpartition("/")[2].startswith("out.")
        here = (row.step, row.branch) == (first.step, first.branch)
        fqn = row.fqn or ""
        if output and here and (fqn.count(".") <= 1 or fqn == first.fqn):
            ratio = math.inf if row.verdict is Verdict.INVALID else row.ratio or 0.0
            worst[fqn] = max(worst.get(fqn, 0.0), ratio)
    names = list(worst)
    begin = next((at for at, name in enumerate(names) if worst[name] > 1), 0)
    if begin > 2:
        most = max(worst[name] for name in names[: begin - 1])
        yield f"  growth       {begin - 1} modules before: at most {most:.2g} x floor"
    shown = names[max(begin - 1, 0) :][:MAX_GROWTH]
    width = max(map(len, shown), default=0)
    for name in shown:
        ratio = worst[name]
        bar = "#" * min(max(round(4 * math.log10(max(ratio, 1e-3) / 0.1)), 0), 40)
        mark = " <- introduced" if name == first.fqn else ""
        yield f"  growth       {name:<{width}}  {ratio:>8.3g} x  {bar}{mark}"
    if len(names) - max(begin - 1, 0) > MAX_GROWTH:
        yield f"  growth       ... {len(names) - max(begin - 1, 0) - MAX_GROWTH} more modules"


def _total(comparison: Comparison, stage: str) -> int:
    return sum((row.stage or "tensors") == stage for row in comparison.rows)


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    metrics, floor = row.metrics, row.floor
    return (
        row.name,
        row.verdict.value,
        f"{metrics.rel_l2:.1e}" if metrics else "-",
        f"{floor.rel_l2:.1e}" if floor else "-",
        f"{row.ratio:.3g}" if row.ratio is not None else "-",
        "; ".join(part for part in (row.origin, row.note) if part),
    )
