"""A bisect in the terminal: what did it, the command's answers on both sides, what comes next."""

from __future__ import annotations

from collections.abc import Iterator

from truestep.experiment.bisecting.records import Attempt, Bisection
from truestep.report.brief import Brief, fitted
from truestep.report.items import Evidence, Item
from truestep.screen import aligned, facts, print_lines, rows, screen

_NAMED = 3


def print_bisection(result: Bisection, *, verbose: bool = False) -> None:
    """Print the answer; every probe, too, where it is to be verbose."""
    listed = [facts(_facts(result), most=None if verbose else 2)]
    if verbose:
        listed.append(rows(_probes(result.attempts)))
    ending = [f"next: {result.next}" if result.next else "", f"repeat: {result.repeat}"]
    print_lines(
        screen(headline(result), *listed, ending=ending, verbose=verbose),
        exit_code=result.exit_code,
    )


def bisection_brief(result: Bisection) -> Brief:
    """The answer in one small envelope; an item for each that did it, or may have."""
    items = [
        Item(
            id=f"c{at}",
            name=culprit.name,
            verdict=result.verdict,
            exit_code=result.exit_code,
            sentence=culprit.text,
            evidence=tuple(
                Evidence(id=f"c{at}.f{number}", text=file)
                for number, file in enumerate(culprit.files)
            ),
        )
        for at, culprit in enumerate(result.culprits)
    ]
    texts = [f"bad: {' '.join(result.bad_said)}"] if result.bad_said else []
    texts += [f"good: {result.good_said[0]}"] if result.good_said else []
    texts += [f"skipped: {each.point}: {each.reason}" for each in result.skipped]
    texts += [_allowed(result), *result.notes]
    whole = Brief(
        verdict=result.verdict,
        exit_code=result.exit_code,
        sentence=result.sentence,
        items=tuple(items),
        notes=tuple(Evidence(id=f"n{at}", text=text) for at, text in enumerate(texts)),
        seconds=result.seconds,
        next=result.next,
        repeat=result.repeat,
    )
    return fitted(whole, "")


def _allowed(result: Bisection) -> str:
    many = "s" if result.probes != 1 else ""
    return f"{result.probes} run{many} of the command, {result.limit} allowed"


def headline(result: Bisection) -> str:
    """The answer in a sentence, an outcome in capitals first."""
    return f"{'FOUND' if result.verdict == 'found' else 'UNDECIDED'} {result.sentence}"


def _facts(result: Bisection) -> Iterator[tuple[str, str]]:
    """What stands beside the answer, labelled."""
    yield "bad", " ".join(_telling(result.bad_said))
    yield "good", result.good_said[0].strip() if result.good_said else ""
    count = f"{result.suspects} suspect{'s' if result.suspects != 1 else ''}"
    yield "probes", f"{_allowed(result)}; {count} from {result.good} to {result.bad}"
    skipped = result.skipped
    if skipped:
        shown = "; ".join(f"{each.point}: {each.reason}" for each in skipped[:_NAMED])
        more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        yield "skipped", f"{shown}{more}"
    for note in result.notes:
        yield "note", note


def _telling(said: tuple[str, ...]) -> list[str]:
    """Of an answer the headline, and where and why it is so."""
    labelled = [line.split() for line in said[1:] if line.startswith("  ")]
    return [
        *(line.strip() for line in said[:1]),
        *(f"({' '.join(words)})" for words in labelled if words[0] in ("at", "cause")),
    ]


def _probes(attempts: tuple[Attempt, ...]) -> list[str]:
    """A line for each answer."""
    cells = [("probe", "why", "outcome", "exit", "s", "point")]
    for number, each in enumerate(attempts, 1):
        code = "" if each.exit_code is None else str(each.exit_code)
        seconds = f"{each.seconds:.1f}" if each.ran else "kept"
        cells.append((str(number), each.why, str(each.outcome), code, seconds, each.point))
    return aligned(cells, left=(1, 2, 5))
