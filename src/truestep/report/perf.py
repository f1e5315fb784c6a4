"""Results of perf in the terminal: numbers beside their baseline, then what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from truestep.report.answer import counted, word_of
from truestep.report.words import command_in
from truestep.screen import aligned, facts, print_lines, rows, screen

if TYPE_CHECKING:
    from truestep.experiment.perf_importing import PerfImport
    from truestep.experiment.perf_records import Alternative, PerfResult, PerfResults

_WEAK = 0.1
"""A pass that would not have noticed a tenth more time says so first."""


def print_results(bundle: PerfResults, *, verbose: bool = False) -> None:
    """Print the answer; all that is known of every result where it is to be verbose."""
    results, ending = bundle.results, []
    if verbose:
        listed = [rows([line for result in results for line in (headline(result), *_all(result))])]
        head = counted(r.verdict.value for r in results) if results[1:] else results[0].sentence
    elif results[1:]:
        told = sorted(results, key=lambda result: result.verdict.passed)
        head = counted(result.verdict.value for result in results)
        listed = [rows(map(headline, told), "cases")]
    else:
        head = headline(results[0])
        result = results[0]
        listed = [facts(_advice(result), most=2), rows(_short(result), "numbers")]
        following = result.hint or result.offer
        ending = [f"next: {following}"] if command_in(following) else []
        listed.append(facts(_facts(result), most=2))
    ending.append(f"repeat: {bundle.repeat}")
    lines = screen(head, *listed, ending=ending, verbose=verbose)
    print_lines(lines, exit_code=bundle.exit_code)


def headline(result: PerfResult) -> str:
    """A result in one sentence; a pass that would have seen little says so first."""
    passed, word = result.verdict.passed, result.verdict.value
    told = result.sentence.removeprefix(f"{word}: ").removeprefix("recorded ")
    first = word_of(word, passed=passed)
    if first not in ("PASSED", "FAILED"):
        return f"{first} {told}"
    if result.action == "record":
        return f"RECORDED {told}" if passed else f"FAILED {word}: {told}"
    seen = result.detectable if passed else None
    if seen is not None and seen >= _WEAK:
        word += f", but only {seen:.0%} slower would have been seen"
    return f"{first} {word}: {told}"


def _short(result: PerfResult) -> list[str]:
    """The numbers beside their baseline, those that decide against it first."""
    from truestep.experiment.baseline import amount

    ordered = sorted(result.rows, key=lambda row: row.verdict is None or row.verdict.passed)
    cells = [("", "new", "baseline", "change", "")]
    for row in ordered:
        said = row.verdict.value if row.verdict is not None else ""
        number = (amount(row.value), amount(row.base), f"{row.change:+.1%}")
        low, high = row.low, row.high
        if said == "equivalent" and abs(row.change) >= _WEAK and low is not None:
            said = f"as expected: {amount(low)} to {amount(high or low)}"
        cells.append((f"{row.name} {row.unit}", *number, row.note or said))
    return aligned(cells, left=(0, 4)) if result.rows else []


def _advice(result: PerfResult) -> list[tuple[str, str]]:
    """What is wrong with the numbers, and what no command can do."""
    said = [("impossible", problem) for problem in result.problems[:2]]
    return [*said, ("hint", "" if command_in(result.hint) else result.hint)]


def _facts(result: PerfResult) -> list[tuple[str, str]]:
    """What else is to be said of a result, labelled."""
    said = [("cohort", result.cohort_id)]
    said += [("note", note) for note in result.notes]
    said += [("there is", _other(other)) for other in result.alternatives]
    runs, batches = result.baseline_runs, result.baseline_batches
    many = "es" if batches != 1 else ""
    of = f"{runs} runs of {batches} process{many} in {result.history}"
    return [*said, ("baseline", of if runs else "")]


def _other(other: Alternative) -> str:
    """Another cohort that the history has, and in what it differs."""
    listed = [f"{d.key} {d.actual} (there {d.reference})" for d in other.differences[:4]]
    more = f", {len(other.differences) - 4} more" if len(other.differences) > 4 else ""
    what = ", ".join(listed) or "the same, without runs that count"
    return f"{other.source} {other.cohort}, {other.runs} runs: {what}{more}"


def _all(result: PerfResult) -> Iterator[str]:
    """A result as text: numbers beside their baseline, then what to do."""
    from truestep.experiment.baseline import amount

    yield f"  cohort       {result.cohort_id}"
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
        yield f"  there is     {_other(other)}"
    if len(result.alternatives) > 8:
        yield f"  there is     ... {len(result.alternatives) - 8} more cohorts"
    for note in result.notes:
        yield f"  note         {note}"
    if result.hint:
        yield f"  hint         {result.hint}"
    if result.offer:
        yield f"  hint         {result.offer}"


def print_import(result: PerfImport, *, verbose: bool = False) -> None:
    """Print what was read of every file, and what was left out."""
    listed = []
    for file in result.files:
        listed.append(f"  {file.path}: {file.source}, {len(file.cases)} cases")
        left = [f"  left out     {name}: {reason}" for name, reason in file.left_out.items()]
        notes = [f"  note         {note}" for note in file.notes]
        listed += [*left, *notes] if verbose else [*left[:2], *notes[:2]]
    word = "FAILED " if result.exit_code else ""
    ending = [f"history: {result.history}"]
    told = screen(f"{word}{result.sentence}", rows(listed), ending=ending, verbose=verbose)
    print_lines(told, exit_code=result.exit_code)
