"""The answer in a dozen lines as wide as the terminal: verdict, place and factor, then the cause.

What does not fit is left out, the least telling first; `-v` prints all of it (`report.terminal`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from truestep.records import MediaEvidence
from truestep.report.words import (
    change_text,
    command_in,
    next_command,
    reasons,
    said,
    stage_label,
)
from truestep.screen import LINES, aligned
from truestep.text import command_lines, visible, wrapped
from truestep.verdict import Comparison, Results, Row, Rows, Verdict

_ROWS = 3
_COVERAGE = 7
"""Rank of what was looked at: rows of the table are worth more."""

_UNSEEN = 2
"""Rank of what a pass did not look at: more than what passed, which is the rest."""

_WEAK = 0.1
"""A pass that would not have seen a change of a tenth says so first: dropped biases are smaller."""

_FINDINGS = 4
_NOTES = 3
_ALSO = 3
_CHANGES = 2
_WORDS = {
    "missing": "MISSING",
    "incomparable": "INCOMPARABLE",
    "inconclusive": "UNDECIDED",
}


@dataclass(frozen=True)
class Block:
    """Lines that are printed together or not at all.

    Attributes:
        rank: Of two blocks for which there is no room, the higher one goes.
        lines: What is printed.
    """

    rank: int
    lines: tuple[str, ...]


def word_of(outcome: str, *, passed: bool) -> str:
    """The word that a line about an outcome begins with; what is undecided has not failed.

    Args:
        outcome: Value of a verdict, or of a finding of an experiment.
        passed: Whether it counts as passed.
    """
    return "PASSED" if passed else _WORDS.get(outcome, "FAILED")


def headline(comparison: Comparison) -> str:
    """Verdict, place and factor of a comparison in one sentence, an outcome in capitals first."""
    word, sentence = _word(comparison), comparison.sentence
    if word in _WORDS.values():
        sentence = sentence.removeprefix(f"{comparison.verdict.value}: ")
        sentence = sentence.removeprefix("undecided ")
    seen = comparison.detectable if word == "PASSED" else None
    if seen is not None and seen >= _WEAK:
        blind = f"only a relative change of {seen:.1e} would have been seen"
        kept = sentence.replace(f"; a relative change of {seen:.1e} would have been seen", "")
        sentence = kept.replace(": ", f", but {blind}: ", 1)
    return f"{word} {sentence}"


def _word(comparison: Comparison) -> str:
    if comparison.known is not None and comparison.known.accepted:
        return "KNOWN"
    outcome = "inconclusive" if comparison.exit_code == 4 else comparison.verdict.value
    return word_of(outcome, passed=comparison.exit_code == 0)


def case_of(comparison: Comparison) -> str:
    """Which case, and what was changed in it; of files which they are."""
    label = visible(comparison.actual.label)
    if not comparison.case_id:
        return label
    return comparison.case_id + (f" [{label}]" if label != comparison.case_id else "")


def answer(comparison: Comparison, *, report: str | None = None) -> list[str]:
    """At most `LINES` lines on one comparison."""
    ending = [line for line in (next_line(comparison), _labelled("report", report)) if line]
    commands = [row for line in ending for row in command_lines(line)]
    room = LINES - len(commands)
    causes = comparison.causes
    head, rest = [*_head(comparison, causes)], [*_rest(comparison)]
    for rows in range(_ROWS, 0, -1):  # fewer rows before anything else goes
        blocks = [*head, *_failed(comparison, causes, rows), *rest]
        if sum(len(block.lines) for block in blocks if block.rank < _COVERAGE) <= room:
            break
    return [*_fitting(blocks, room), *commands]


def answers(results: Results, *, report: str | None = None, told: str = "") -> list[str]:
    """At most `LINES` lines on several comparisons; what failed is told of first.

    Args:
        told: What all of them together say, before their number.
    """
    ordered = sorted(results.comparisons, key=lambda c: c.exit_code == 0)
    failed = next((c for c in ordered if c.exit_code != 0), None)
    ending = [next_line(failed) if failed is not None else None, _labelled("report", report)]
    commands = [row for line in ending if line for row in command_lines(line)]
    lines = [*wrapped("", told, most=3), *wrapped("", summary(results), most=2)]
    room = LINES - len(commands) - len(lines)
    for index, comparison in enumerate(ordered):
        text = f"{case_of(comparison)}: {comparison.sentence}"
        block = wrapped(
            "", f"{_word(comparison)} {text}", most=1 if comparison.exit_code == 0 else 2
        )
        last = index == len(ordered) - 1
        if len(block) > room - (not last):
            lines.append(f"... {len(ordered) - index} more (-v)")
            break
        lines += block
        room -= len(block)
    return [*lines, *commands]


def summary(results: Results) -> str:
    """Of several comparisons, how many came out how."""
    known = sum(c.known is not None and c.known.accepted for c in results.comparisons)
    stated = f" (known failures, as stated: {known})" if known else ""
    return counted(c.verdict.value for c in results.comparisons) + stated


def counted(verdicts: Iterable[str]) -> str:
    """How many cases came out how: `3 cases: 2 identical, 1 drifted`."""
    counts = Counter(verdicts)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{counts.total()} cases: {told}"


def following(comparison: Comparison) -> tuple[str, str]:
    """What to do next, after its label: a command, or advice; empty where there is none."""
    if comparison.exit_code and comparison.hint:  # with what is said beside a command
        return "next" if command_in(comparison.hint) else "hint", comparison.hint
    return "next", next_command(comparison)


def next_line(comparison: Comparison) -> str:
    """What to do next, labelled; empty where there is nothing."""
    label, told = following(comparison)
    return f"{label}: {told}" if told else ""


def _labelled(label: str, value: str | None) -> str | None:
    return f"{label}: {value}" if value else None


def _fitting(blocks: Sequence[Block], room: int) -> list[str]:
    """The lines of the blocks, without those of the highest ranks where there is no room."""
    kept = list(blocks)
    while sum(len(block.lines) for block in kept) > room and len(kept) > 1:
        worst = max(block.rank for block in kept)
        at = max(index for index, block in enumerate(kept) if block.rank == worst)
        del kept[at]
    return [line for block in kept for line in block.lines]


def _block(rank: int, label: str, text: str, *, most: int = 1) -> Block:
    return Block(rank, tuple(wrapped(label, text, most=most)))


def _head(comparison: Comparison, causes: Rows) -> Iterator[Block]:
    """The answer, its cause, what it is of, and what differs before anything runs."""
    text = headline(comparison)
    yield Block(0, tuple(wrapped("", text, most=4)))
    yield from _cause(comparison, causes)
    label = "case" if comparison.case_id else "of"
    if case_of(comparison) not in text:
        yield _block(1, label, case_of(comparison))
    if comparison.shift is not None:
        yield _block(2, "ends", comparison.shift.ladder, most=2)
    if comparison.known is not None:
        yield _block(1, "ledger", comparison.known.text, most=2)
    for change in comparison.rule_changes[:_CHANGES]:
        yield _block(1, "changed", change_text(change), most=2)
    if len(comparison.rule_changes) > _CHANGES:
        more = len(comparison.rule_changes) - _CHANGES
        yield Block(1, (f"  changed      ... {more} more that decide here (-v)",))
    for label, differences in (
        ("case differs", comparison.case_differences),
        ("environment", comparison.environment_differences),
    ):
        listed = ", ".join(f"{d.key}: {d.actual} (was {d.reference})" for d in differences)
        if listed:
            yield _block(2, label, listed, most=2)


def _cause(comparison: Comparison, causes: Rows) -> Iterator[Block]:
    """What explains it, and the line of code where the two sides part; else what is said of the
    first row that fails."""
    first = comparison.first_divergence
    told = Counter[str]()
    for label, text in reasons(first) if first is not None else ():
        told[label] += 1
        if label and told[label] <= _ALSO:
            first_of_all = label in ("cause", "at")
            yield _block(1 if first_of_all else 2, label, text, most=3 if first_of_all else 2)
    if told["at"]:
        return
    if comparison.exit_code == 0 or comparison.evidence is not None:
        return
    row = causes[0] if len(causes) else None
    undecided = comparison.verdict is Verdict.INCONCLUSIVE  # its sentence is of a row's note
    if row is None or undecided or not row.note or row.note in comparison.sentence:
        return
    yield _block(1, "cause", f"{row.name}: {row.note}", most=2)


def _failed(comparison: Comparison, causes: Rows, most: int) -> Iterator[Block]:
    """What failed: findings of media, modalities, the first rows."""
    if comparison.evidence is not None:
        yield from _media(comparison, comparison.evidence)
        return
    for item in comparison.modalities:
        text = f"{item.verdict.value}, {item.tensors - item.failing} of {item.tensors} pass"
        yield _block(3, item.name, text)
    shown = list(causes.take(range(min(len(causes), most))))
    if not shown:
        return
    more = comparison.uncounted(len(shown))
    lines = [*table(shown), *(wrapped("", f"  ... {more} (-v)") if more else ())]
    yield Block(4, tuple(lines))


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines under a head: name, distance, floor and how far over it, numbers aligned."""
    return aligned([("tensor", "rel_l2", "floor", "x floor"), *map(_cells, rows)])


def _cells(row: Row) -> tuple[str, str, str, str]:
    metrics, floor = row.metrics, row.floor
    return (
        row.name,
        f"{metrics.rel_l2:.1e}" if metrics else row.verdict.value,
        f"{floor.rel_l2:.1e}" if floor else "-",
        f"{row.ratio:.3g}" if row.ratio is not None else "-",
    )


def _media(comparison: Comparison, evidence: MediaEvidence) -> Iterator[Block]:
    own, was = said(evidence.actual), said(evidence.reference)
    yield _block(3, "media", own if own == was else f"{own} (was {was})", most=2)
    for finding in evidence.findings[:_FINDINGS]:
        yield _block(2, "finding", finding.text, most=2)
    if len(evidence.findings) > _FINDINGS:
        yield Block(3, (f"  ... {len(evidence.findings) - _FINDINGS} more findings (-v)",))
    if evidence.ladder is not None:
        yield _block(3, "other runs", evidence.ladder.text, most=2)
    for row in comparison.rows:
        word = "frames" if row.name == "video/frames" else "sound"
        yield _block(4, word, row.note or "bit for bit the same", most=2)


def _rest(comparison: Comparison) -> Iterator[Block]:
    """What passed, what other gates say, notes, and what was looked at."""
    for gate in comparison.gates[:2]:
        yield _block(5, "other gate", f"{gate.name}: {gate.outcome}")
    if comparison.evidence is None and comparison.rows:
        yield _block(5, "passed", _stages(Rows.of(comparison.rows)), most=3)
    whole = comparison.verdict is Verdict.MISSING  # its notes are places: they can be copied
    for note in comparison.notes[:_NOTES]:
        yield Block(3, tuple(wrapped("note", note, most=2, split=not whole)))
    if len(comparison.notes) > _NOTES:
        yield Block(3, (f"  ... {len(comparison.notes) - _NOTES} more notes (-v)",))
    if comparison.looked_at:
        yield _block(_COVERAGE + 1, "looked at", ", ".join(comparison.looked_at), most=2)
    if comparison.not_looked_at:
        rank = _UNSEEN if comparison.verdict.passed else _COVERAGE
        yield _block(rank, "not looked at", ", ".join(comparison.not_looked_at), most=2)


def _stages(rows: Rows) -> str:
    """How many tensors of each stage pass, stages that fail first."""
    totals, passed = Counter[str](), Counter[str]()
    for verdict, *place in rows.each("verdict", "stage", "modality"):
        stage = stage_label(*place)
        totals[stage] += 1
        passed[stage] += verdict.passed
    order = sorted(totals, key=lambda stage: passed[stage] == totals[stage])
    return ", ".join(f"{stage} {passed[stage]} of {totals[stage]}" for stage in order)
