"""Results of perf in the terminal: numbers beside their baseline, then what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from truestep.report.answer import word_of
from truestep.text import say

if TYPE_CHECKING:
    from truestep.experiment.perf_importing import PerfImport
    from truestep.experiment.perf_records import PerfResult, PerfResults

_COLOURS = {0: "green", 1: "red", 3: "yellow", 4: "yellow"}


def print_results(bundle: PerfResults) -> None:
    """Print every result; then the sentence, and `repeat:`."""
    results = bundle.results
    for result in results:
        for line in _lines(result):
            say(line)
    if len(results) > 1:
        counts = [r.verdict.value for r in results]
        parts = ", ".join(f"{counts.count(w)} {w}" for w in dict.fromkeys(counts))
        say(f"{len(results)} cases: {parts}", colour=_COLOURS[bundle.exit_code])
    else:
        say(results[0].sentence, colour=_COLOURS[bundle.exit_code])
    say(f"repeat: {bundle.repeat}")


def _lines(result: PerfResult) -> Iterator[str]:
    """A result as text: numbers beside their baseline, then what to do."""
    from truestep.experiment.baseline import amount

    word = word_of(result.verdict.value, passed=result.verdict.passed)
    word = "RECORDED" if result.action == "record" and result.verdict.passed else word
    told = f"{word} {result.verdict.value}" if word in ("PASSED", "FAILED", "RECORDED") else word
    yield f"{told} {result.case_name} [cohort {result.cohort_id}]"
    cells = [("", "new", "baseline", "change", "expected (99 %)", "percent rule", "")]
    for row in result.rows:
        interval = (
            f"{amount(row.low)} to {amount(row.high)}"
            if row.low is not None and row.high is not None
            else "-"
        )
        note = row.note or ("" if row.verdict is None else row.verdict.value)
        if row.verdict is not None and row.note and not row.verdict.passed:
            note = f"{row.verdict.value}: {row.note}"
        limit = f"<= {amount(row.limit)}" if row.limit is not None else "-"
        name = f"{row.name} {row.unit}"
        change = f"{row.change:+.1%}"
        cells.append((name, amount(row.value), amount(row.base), change, interval, limit, note))
    if result.rows:
        widths = [max(len(line[i]) for line in cells) for i in range(6)]
        for line in cells:
            head = "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=False))
            )
            yield f"  {head}  {line[6]}".rstrip()
    if result.baseline_runs:
        yield (
            f"  baseline     {result.baseline_runs} runs of {result.baseline_batches} "
            f"process{'es' if result.baseline_batches != 1 else ''} in {result.history}"
        )
    if result.detectable is not None and result.verdict.passed:
        yield f"  detectable   {result.detectable:.1%} slower would not have passed"
    for problem in result.problems[:20]:
        yield f"  impossible   {problem}"
    for other in result.alternatives[:8]:
        differences = ", ".join(
            f"{d.key} {d.actual} (there {d.reference})" for d in other.differences[:4]
        )
        more = f", {len(other.differences) - 4} more" if len(other.differences) > 4 else ""
        where = f"{other.source} {other.cohort}, {other.runs} runs"
        yield f"  there is     {where}: {differences or 'the same, without runs that count'}{more}"
    if len(result.alternatives) > 8:
        yield f"  there is     ... {len(result.alternatives) - 8} more cohorts"
    for note in result.notes:
        yield f"  note         {note}"
    if result.hint:
        yield f"  hint         {result.hint}"
    if result.offer:
        yield f"  {result.offer}"


def print_import(result: PerfImport) -> None:
    """Print what was read of every file, and what was left out."""
    for file in result.files:
        say(f"{file.path}: {file.source}, {len(file.cases)} cases")
        for name, reason in list(file.left_out.items())[:20]:
            say(f"  left out     {name}: {reason}")
        if len(file.left_out) > 20:
            say(f"  left out     ... {len(file.left_out) - 20} more")
        for note in file.notes[:5]:
            say(f"  note         {note}")
        if len(file.notes) > 5:
            say(f"  note         ... {len(file.notes) - 5} more")
    say(result.sentence, colour=_COLOURS[result.exit_code])
    say(f"history: {result.history}")
