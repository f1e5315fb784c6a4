"""Quality of a change as text, Markdown and one HTML page; the frontier as a plot beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from truestep.experiment.quality.records import Quality, QualityCell, Vote
from truestep.files import write_text
from truestep.report.answer import word_of
from truestep.report.frontier import points_of, svg
from truestep.report.html import LABELS, embedded_json, page
from truestep.screen import Entries, aligned, print_lines, rows, screen
from truestep.text import wrapped

COLUMNS = ("metric", "finding", "difference", "at least", "margin", "worst tenth")
FRONTIER = ("candidate", "speed", "drift", "quality", "outcome", "dominated by")


def cells_of(cell: QualityCell) -> list[tuple[str, ...]]:
    """A row a metric, in the order of `COLUMNS`."""
    return [
        (
            row.metric,
            row.finding,
            f"{row.difference:+.3g}",
            f"{row.low:+.3g}",
            f"{row.margin:.3g}",
            f"{row.worst_prompts[0]} prompts, were {row.worst_prompts[1]}",
        )
        for row in cell.rows
    ]


def frontier_rows(found: Quality) -> list[tuple[str, ...]]:
    """A row a candidate, fastest first, in the order of `FRONTIER`; those that have no place on the
    frontier (unmet, invalid, raised) come last."""
    points = sorted(points_of(found), key=lambda point: -point.speed)
    placed = [
        (
            point.name,
            f"{point.speed:.2f} ({point.speed_low:.2f} to {point.speed_high:.2f})",
            f"{point.drift:.3f} ({point.drift_low:.3f} to {point.drift_high:.3f})",
            f"{point.quality:+.2f} ({point.quality_low:+.2f} to {point.quality_high:+.2f})"
            + (f" {point.metric}" if point.metric else ""),
            point.standing.value,
            point.dominated or "-",
        )
        for point in points
    ]
    others = [cell for cell in found.candidates if cell.point is None]
    return [
        *placed,
        *((cell.cell.name, "-", "-", "-", cell.standing.value, "-") for cell in others),
    ]


def print_quality(found: Quality, *, folder: str, report: str, verbose: bool = False) -> None:
    """Print the answer: a dozen lines, or everything where it is to be verbose."""
    word = word_of(found.standing.value, passed=found.standing.passed)
    told = found.sentence
    if word not in ("PASSED", "FAILED"):
        told = told.removeprefix(f"{found.standing.value}: ")
    ending = [f"results: {folder}", f"report: {report}" if report else ""]
    if verbose and found.repeat:
        ending.append(f"repeat: {found.repeat}")
    listed = list(_verbose(found)) if verbose else list(_short(found))
    print_lines(
        screen(f"{word} {told}", *listed, ending=ending, verbose=verbose),
        exit_code=found.exit_code,
    )


def _short(found: Quality) -> Iterator[Entries]:
    if found.quality.frontier:
        short = [(n, s.split()[0], d.split()[0], q.split()[0], o) for n, s, d, q, o, _ in
                 frontier_rows(found)]  # fmt: skip
        yield rows(aligned([FRONTIER[:5], *short], left=(0, 4)), "candidates")
    elif len(found.candidates) == 1:
        yield from _of_cell(found.candidates[0], verbose=False)
    else:
        yield rows([f"  {cell.sentence}" for cell in found.candidates], "candidates")
    yield rows([f"  {text}" for text in votes_told(found.votes, found.unseen)])


def _of_cell(cell: QualityCell, *, verbose: bool) -> Iterator[Entries]:
    if cell.rows:
        table = aligned([COLUMNS[:5], *(row[:5] for row in cells_of(cell))], left=(0, 1))
        wide = aligned([COLUMNS, *cells_of(cell)], left=(0, 1, 5))
        yield rows(wide if verbose else table)
    if cell.broken:
        yield rows([f"  {broken_told(cell)}"])
    told = mechanism_told(cell)
    if told:
        yield rows([f"  {told}"])
    if verbose:
        yield Entries([wrapped("note", text) for text in cell.reasons])
        yield Entries(
            [
                wrapped("note", f"{row.metric} lost most: {', '.join(row.lowest)}")
                for row in cell.rows
            ]
        )


def _verbose(found: Quality) -> Iterator[Entries]:
    if found.quality.frontier:
        yield rows(aligned([FRONTIER, *frontier_rows(found)], left=(0, 4, 5)))
    for cell in found.candidates:
        yield rows([cell.sentence])
        yield from _of_cell(cell, verbose=True)
    yield rows([f"  {text}" for text in votes_told(found.votes, found.unseen)])
    yield Entries([wrapped("note", text) for text in legend(found)])
    yield Entries([wrapped("note", text) for text in found.notes])


def broken_told(cell: QualityCell) -> str:
    """Broken clips in words."""
    broken = cell.broken
    assert broken is not None
    text = (
        f"broken: {broken.candidate} of {broken.prompts} prompts, were {broken.baseline}; "
        f"newly broken at most {broken.new_high:.1%}".replace("%", " %")
    )
    return text + (f" ({', '.join(broken.kinds)})" if broken.kinds else "")


def mechanism_told(cell: QualityCell) -> str:
    """What the mechanism did, in words; empty where none was declared."""
    if not cell.mechanisms or cell.acted is None:
        return ""
    parts = [f"{name} {count}" for name, count in cell.mechanisms.items()]
    steps = cell.acted.cache_hits if sum(cell.acted.cache_hits) else ()
    per = f"; cache hits per step {min(steps)} to {max(steps)}" if steps else ""
    return f"acted: {', '.join(parts)}{per}"


def votes_told(votes: Sequence[Vote], unseen: Sequence[str]) -> list[str]:
    """Which metrics vote, which do not and why, and what none of them sees."""
    told = []
    voters = [vote.metric for vote in votes if vote.votes]
    if votes:
        told.append(f"voting: {', '.join(voters) or 'none'}")
    told += [f"no vote: {vote.metric}: {vote.reason}" for vote in votes if not vote.votes]
    if unseen:
        told.append(f"no voter sees: {', '.join(unseen)}")
    return told


def legend(found: Quality) -> tuple[str, ...]:
    """How to read the numbers."""
    plan = found.quality
    return (
        f"{found.prompts} prompts, {plan.seeds} seeds each, both arms from the same noise; "
        "differences are candidate less baseline, paired by prompt, higher is better",
        "at least: one-sided 95 % bound, from a bootstrap over prompts with one prompt more that "
        "was never seen; a metric is not worse where that bound, with the margin's own "
        "uncertainty, is within the margin",
        f"margin: {plan.margin:.0%} of the spread between seeds of one prompt in the baseline, "
        "where none was declared".replace("%", " %"),
        "worst tenth: prompts as bad, by their worst seed, as the baseline's worst tenth; "
        "broken: bounds are exact (Clopper-Pearson), at 95 %",
        "all voters must pass, which needs no correction; what is called degraded is corrected "
        "(Holm)",
    )


def markdown(found: Quality) -> str:
    """The result for a pull request."""
    lines = [f"**{found.sentence}**", ""]
    if found.quality.frontier:
        lines += [*_table(FRONTIER, frontier_rows(found)), ""]
    for cell in found.candidates:
        lines += [f"### {cell.cell.name}", "", cell.sentence, ""]
        if cell.rows:
            lines += [*_table(COLUMNS, cells_of(cell)), ""]
        told = [broken_told(cell)] if cell.broken else []
        told += [mechanism_told(cell)] if mechanism_told(cell) else []
        lines += [*(f"- {text}" for text in (*told, *cell.reasons)), ""]
    lines += ["### Votes", "", *_table(VOTES, vote_rows(found.votes)), ""]
    lines += [f"- {text}" for text in (*votes_told(found.votes, found.unseen), *legend(found))]
    return "\n".join(lines) + "\n"


VOTES = ("metric", "vote", "margin", "spread", "notices", "blind to")


def vote_rows(votes: Sequence[Vote]) -> list[tuple[str, ...]]:
    """A row a metric: what it has shown to see, in the order of `VOTES`."""
    return [
        (
            vote.metric,
            "votes" if vote.votes else f"none: {vote.reason}",
            f"{vote.margin:.3g}",
            f"{vote.spread:.3g}",
            ", ".join(vote.killed) or "-",
            ", ".join(vote.survived) or "-",
        )
        for vote in votes
    ]


def _table(heads: Sequence[str], found: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*head, *("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in found)]


def render(found: Quality) -> str:
    """One self-contained page."""
    slim = found.model_copy(update={"clips": ()})
    return page(
        "quality.html",
        q=found,
        kind=LABELS[found.exit_code],
        kinds=[LABELS[cell.standing.exit_code] for cell in found.candidates],
        columns=COLUMNS,
        tables=[cells_of(cell) for cell in found.candidates],
        told=[
            [*([broken_told(c)] if c.broken else []), mechanism_told(c), *c.reasons]
            for c in found.candidates
        ],
        frontier=(FRONTIER, frontier_rows(found)) if found.quality.frontier else None,
        plot=svg(points_of(found)) if points_of(found) else "",
        votes=(VOTES, vote_rows(found.votes)),
        legend=(*votes_told(found.votes, found.unseen), *legend(found)),
        data=embedded_json(slim.model_dump_json()),
    )


def write_files(folder: Path, found: Quality, *, report: Path | None) -> None:
    """Write `result.json`, `table.md`, the plot of a frontier, and the page, each atomically.

    Raises:
        WriteError: One could not be written.
    """
    write_text(folder / "result.json", found.model_dump_json(indent=1), "the result")
    write_text(folder / "table.md", markdown(found), "the table")
    if points_of(found):
        write_text(folder / "frontier.svg", svg(points_of(found)), "the plot")
    if report is not None:
        write_text(report, render(found), "the report")
