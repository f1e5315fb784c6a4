"""Results in the terminal: plain lines one can grep; colour only ever repeats a word."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from truestep.keys import key_of
from truestep.records import MediaEvidence
from truestep.report.answer import answer, answers, case_of, headline, next_line, summary
from truestep.report.words import change_text, reasons, said, stage_label
from truestep.screen import print_lines
from truestep.text import wrapped
from truestep.verdict import GIVEN, Comparison, GateResult, Results, Row, Rows, Shift, Verdict

MAX_GROWTH = 16
MAX_ROWS = 20
MAX_ROWS_OF_STAGE = 5


def print_results(
    results: Results, *, report: str | None = None, verbose: bool = False, told: str = ""
) -> None:
    """Print the answer; all that is known of every comparison under it where it is to be verbose.

    Args:
        report: Path of the report, if one was written.
        verbose: Everything; the last line then is the command that repeats it.
        told: What all of them together say; it stands first.
    """
    if len(results.comparisons) == 1 and not verbose:
        answered = answer(results.comparisons[0], report=report)
    elif not verbose:
        answered = answers(results, report=report, told=told)
    else:
        answered = [*wrapped("", told), *_everything(results, report)]
    print_lines(answered, exit_code=results.exit_code)


def _everything(results: Results, report: str | None) -> Iterable[str]:
    if len(results.comparisons) > 1:
        yield summary(results)
        yield ""
    for comparison in results.comparisons:
        yield from lines(comparison)
        line = next_line(comparison)
        if line:
            yield line
        if len(results.comparisons) > 1:
            yield ""
    if report:
        yield f"report: {report}"
    repeat = next((c.repeat for c in results.comparisons if c.repeat), "")
    if repeat:
        yield f"repeat: {repeat}"


def lines(comparison: Comparison) -> Iterable[str]:
    """A comparison as text: outcome, what was seen, failing rows, gates, rule."""
    yield from wrapped("", headline(comparison))
    yield from wrapped("case" if comparison.case_id else "of", case_of(comparison))
    for difference in comparison.case_differences:
        yield f"  case         {difference.key}: {difference.actual} (was {difference.reference})"
    for difference in comparison.environment_differences:
        yield f"  environment  {difference.key}: {difference.actual} (was {difference.reference})"
    if comparison.evidence is not None:
        yield from _media(comparison, comparison.evidence)
    else:
        yield from _table(comparison)
    yield from _modalities(comparison)
    if comparison.evidence is None:
        yield from _sounds(comparison)
    if comparison.first_divergence is not None:
        for label, text in reasons(comparison.first_divergence):
            yield from wrapped(label, text)
    yield from _growth(comparison)
    if comparison.shift is not None:
        yield from _shift(comparison.shift)
    for gate in comparison.gates:
        yield f"  other gate   {gate.name}: {gate.outcome} ({_numbers(gate)})"
        for reason in gate.not_judged:
            yield from wrapped("not judged", reason)
        if gate.not_judged and gate.note:
            yield from wrapped("note", gate.note)
    if comparison.known is not None:
        yield from wrapped("ledger", comparison.known.text)
    for change in comparison.rule_changes[:MAX_ROWS]:
        yield from wrapped("changed", change_text(change))
    if len(comparison.rule_changes) > MAX_ROWS:
        yield f"  changed      ... {len(comparison.rule_changes) - MAX_ROWS} more that decide here"
    if comparison.looked_at:
        yield from wrapped("looked at", ", ".join(comparison.looked_at))
    if comparison.not_looked_at:
        yield from wrapped("not looked at", ", ".join(comparison.not_looked_at))
    cost = comparison.cost
    if cost is not None and cost.forwards_generation:
        yield (
            f"  cost         {cost.forwards} forwards, {cost.share:.0%} of a generation's "
            f"{cost.forwards_generation}; {cost.seconds:.2f} s"
        )
    detectable = comparison.detectable
    if comparison.verdict.passed and detectable is not None:
        yield f"  detectable   a relative change of {detectable:.1e} in any stage looked at"
    yield from wrapped("rule", comparison.rule.text)
    for note in comparison.notes:
        yield from wrapped("note", note)


def _shift(shift: Shift) -> Iterable[str]:
    """Where the end of a free run stands among those of harmless runs, and what stages show."""
    yield from wrapped("ends", f"{shift.ladder} ({shift.place})")
    if shift.seen_from is not None and shift.outcome == "benign shift":
        seen = f"a relative change of {shift.seen_from:.1e} at any stage would have been a fault"
        yield from wrapped("", seen)


def _numbers(gate: GateResult) -> str:
    """A gate's metrics, each with its limit where one has its name."""
    parts = []
    for key, value in gate.metrics.items():
        limit = gate.thresholds.get(key)
        number = f"{value:.2e}" if limit is None else f"{value:.5g}, limit {limit:g}"
        parts.append(f"{key} {number}")
    return ("; " if any(key in gate.thresholds for key in gate.metrics) else ", ").join(parts)


def _table(comparison: Comparison) -> Iterable[str]:
    """Failing rows first (at most 20, 5 a stage), then one line a stage for what passed."""
    causes = comparison.causes
    places, seen = list[int](), Counter[str]()
    for at, (stage, modality) in enumerate(causes.each("stage", "modality")):
        if len(places) < MAX_ROWS and (
            not stage or seen[stage_label(stage, modality)] < MAX_ROWS_OF_STAGE
        ):
            seen[stage_label(stage, modality)] += 1
            places.append(at)
    picked = list(causes.take(places))
    shown = [_cells(row) for row in picked]
    if shown:
        shown.insert(0, ("tensor", "verdict", "rel_l2", "floor", "x floor", "note"))
        widths = [max(len(cells[i]) for cells in shown) for i in range(5)]
        for cells in shown:
            head = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
            yield f"  {head}  {cells[5]}".rstrip()
        if more := comparison.uncounted(len(picked)):
            yield f"  ... {more}"
    rows = Rows.of(comparison.rows)
    totals = Counter(stage_label(*place) for place in rows.each("stage", "modality"))
    passed, exact, worst = Counter[str](), Counter[str](), dict[str, float]()
    for verdict, ratio, *place in rows.each("verdict", "ratio", "stage", "modality"):
        if verdict.passed:
            stage = stage_label(*place)
            passed[stage] += 1
            exact[stage] += verdict is Verdict.IDENTICAL
            if ratio is not None:
                worst[stage] = max(worst[stage], ratio) if stage in worst else ratio
    width = max([12, *map(len, passed)]) if comparison.modalities else 12
    for stage, count in passed.items():
        tail = f"worst {worst.get(stage, 0.0):.2g} x floor"
        tail = "all bit-equal" if exact[stage] == count else tail
        yield f"  {stage:<{width}} {count} of {totals[stage]} pass, {tail}"


def _media(comparison: Comparison, evidence: MediaEvidence) -> Iterable[str]:
    """What finished media show: the findings, what was measured of each stream, other runs."""
    own, was = said(evidence.actual), said(evidence.reference)
    yield from wrapped("media", own if own == was else f"{own} (was {was})")
    for finding in evidence.findings:
        yield from wrapped("finding", finding.text)
    for row in comparison.rows:
        word = "frames" if row.name == "video/frames" else "sound"
        yield from wrapped(word, row.note or "bit for bit the same")
    if evidence.perceptual_jod is not None:
        jod = f"{evidence.perceptual_jod:.2f} JOD by ColorVideoVDP (10: no visible difference)"
        yield from wrapped("perceptual", jod)
    if evidence.ladder is not None:
        yield from wrapped("other runs", evidence.ladder.text)
        for run in evidence.ladder.runs[:MAX_ROWS]:
            copy = f", bit for bit {run.copy_of}" if run.copy_of else ""
            what = f"{run.role:<10} {run.label}{copy}"
            yield f"  {run.distance:>12.3g} {evidence.ladder.unit}  {what}"
        if len(evidence.ladder.runs) > MAX_ROWS:
            yield f"  ... {len(evidence.ladder.runs) - MAX_ROWS} more runs"


def _growth(comparison: Comparison) -> Iterable[str]:
    """Of two traces: how far the modules near the root are over the floor, in one forward."""
    first = comparison.first_divergence
    rows = Rows.of(comparison.rows)
    if first is None or not any(o and s == "module" for o, s in rows.each("origin", "stage")):
        return
    worst: dict[str, float] = {}
    fields = rows.each("step", "branch", "fqn", "name", "verdict", "ratio")
    for step, branch, module, name, verdict, over in fields:
        if (step, branch) != (first.step, first.branch) or not key_of(name).outward:
            continue
        fqn = module or ""
        if fqn.count(".") <= 1 or fqn == first.fqn:
            ratio = math.inf if verdict is Verdict.INVALID else over or 0.0
            worst[fqn] = max(worst.get(fqn, 0.0), ratio)
    given = (first.kind or "").startswith(GIVEN)
    names = list(worst)
    begin = next((at for at, name in enumerate(names) if worst[name] > 1), 0)
    if begin > 2:
        most = max(worst[name] for name in names[: begin - 1])
        yield f"  growth       {begin - 1} modules before: at most {most:.2g} x floor"
    shown = names[max(begin - 1, 0) :][:MAX_GROWTH]
    width = max(map(len, shown), default=0)
    for name in shown:
        ratio = worst[name]
        bar = "#" * round(4 * math.log10(min(max(ratio, 0.1), 1e9) / 0.1))
        mark = " <- introduced" if name == first.fqn and not given else ""
        yield f"  growth       {name:<{width}}  {ratio:>8.3g} x  {bar}{mark}"
    if len(names) - max(begin - 1, 0) > MAX_GROWTH:
        yield f"  growth       ... {len(names) - max(begin - 1, 0) - MAX_GROWTH} more modules"


def _modalities(comparison: Comparison) -> Iterable[str]:
    """One line a modality: its verdict and its worst tensor."""
    for item in comparison.modalities:
        text = f"{item.verdict.value}, {item.tensors - item.failing} of {item.tensors} pass"
        if item.worst_ratio:
            text += f", worst {item.worst_ratio:.3g} x floor"
        where = f" ({item.worst})" if item.worst and item.worst_ratio != 0 else ""
        yield f"  {item.name:<12} {text}{where}"


def _sounds(comparison: Comparison) -> Iterable[str]:
    """One line a sound: how far the two are from each other, as one hears it."""
    for media in comparison.media:
        if media.sound is None:
            continue
        found = media.sound.metrics
        numbers = {"rel_l2": found.rel_l2, "correlation": found.correlation}
        text = [f"{name} {value:.4g}" for name, value in numbers.items() if value is not None]
        text += [f"level {found.level_db:+.3g} dB"]
        text += [f"spectrum {found.spectrum_db:.3g} dB"] if found.spectrum_db is not None else []
        text += [f"peak {found.peak_actual:.3g} (was {found.peak_reference:.3g})"]
        text += [f"{found.seconds_actual:.4g} s"]
        text[-1] += f" (was {found.seconds_reference:.4g} s)" if found.seconds_difference else ""
        text += [found.note] * bool(found.note)
        of = f" (of {media.origin})" if media.origin else ""
        yield from wrapped("sound", ", ".join(text) + of)


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
