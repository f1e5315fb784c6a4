"""An experiment as text, Markdown and one HTML file with frames side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.experiment import repeats
from truestep.experiment.records import CellResult, Experiment
from truestep.experiment.table import nothing_text, ratio_text
from truestep.files import write_text
from truestep.report.answer import word_of
from truestep.report.curves import number
from truestep.report.html import LABELS, embedded_json, page
from truestep.screen import print_lines
from truestep.text import columns, wrapped
from truestep.verdict import Media, Verdict

if TYPE_CHECKING:
    from truestep.experiment.store import Store

COLUMNS = (
    "cell",
    "verdict",
    "baseline s",
    "candidate s",
    "ratio (99 %)",
    "A/A (99 %)",
    "SSIM worst / mean",
    "PSNR worst",
    "latents",
    "final rel_l2",
    "peak MiB",
    "forwards",
)
"""One row a cell. Ratios are candidate over baseline, so above 1 is slower."""


def cells_of(result: CellResult) -> tuple[str, ...]:
    """A cell's row as text, in the order of `COLUMNS`."""
    base, candidate = result.arms.get("baseline"), result.arms.get("candidate")
    return (
        result.cell.name,
        result.verdict.value,
        _seconds(base.seconds if base else None),
        _seconds(candidate.seconds if candidate else None),
        ratio_text(result.speed) if result.speed else "-",
        ratio_text(result.control) if result.control else "-",
        f"{_fixed(result.ssim_worst, 4)} / {_fixed(result.ssim_mean, 4)}",
        _decibel(result.psnr_worst_db),
        result.sameness.value if result.sameness is not None else "-",
        _final(result),
        _both(*((arm.memory_mib if arm else None) for arm in (base, candidate))),
        _both(*((arm.forwards if arm else None) for arm in (base, candidate))),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _decibel(value: float | None) -> str:
    if value is None:
        return "-"
    return "equal" if value == float("inf") else f"{value:.1f} dB"


def _final(result: CellResult) -> str:
    if result.worst_final is None:
        return "-"
    ratio = result.worst_final_ratio
    return number(result.worst_final) + (f" ({number(ratio)} × floor)" if ratio else "")


def _both(baseline: float | None, candidate: float | None) -> str:
    own, theirs = (_fixed(value, 0) for value in (candidate, baseline))
    return own if own == theirs else f"{theirs} -> {own}"


def markdown(experiment: Experiment) -> str:
    """The table for a pull request, with the sentence above and the reasons below."""
    lines = [f"**{experiment.sentence}**", ""]
    lines.append("| " + " | ".join(COLUMNS) + " |")
    lines.append("|" + "---|" * len(COLUMNS))
    for result in experiment.cells:
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells_of(result)) + " |")
    lines.append("")
    for result in experiment.cells:
        for text in _remarks(result):
            lines.append(f"- {result.cell.name}: {text}")
    lines += ["", *(f"- {text}" for text in legend(experiment))]
    return "\n".join(lines) + "\n"


def _remarks(result: CellResult) -> tuple[str, ...]:
    nothing = nothing_text(result)
    silent = [nothing] if result.unchanged and nothing not in result.reasons else []
    return (
        *result.reasons,
        *(f"{_MISSING}{m}" for m in result.missing),
        *result.notes,
        *repeats.notes(result),
        *silent,
    )


def legend(experiment: Experiment) -> tuple[str, ...]:
    """How to read the table."""
    from truestep.measure.frames import CONVENTION

    plan = experiment.plan
    rounds = [result.speed.rounds for result in experiment.cells if result.speed]
    kinds = {arm.memory_kind for result in experiment.cells for arm in result.arms.values()}
    return (
        f"switch: {plan.switch}; {len(plan.cases)} case{'s' if len(plan.cases) > 1 else ''}, "
        f"{max(rounds, default=0)} rounds of "
        "baseline, candidate and control in random order and back",
        "ratio: median of paired wall times over the baseline's, above 1 is slower; A/A: the "
        "baseline against itself in the same run; intervals at 99 %",
        f"same speed: an interval within {plan.margin:.0%} of 1",
        "peak memory: of the whole process, with all three arms loaded"
        if kinds <= {"resident"}
        else "peak memory: on the device, of one arm",
        f"frames: {CONVENTION}",
    )


def _lines_below(experiment: Experiment) -> Iterator[str]:
    """The table of all cells, and what its words mean."""
    yield from _table([cells_of(result) for result in experiment.cells])
    for text in legend(experiment):
        yield from wrapped("", text, indent=2)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """One row a cell; a single cell from top to bottom."""
    if len(rows) == 1:
        for name, value in list(zip(COLUMNS, rows[0], strict=True))[2:]:
            yield f"  {name:<18} {value}"
        return
    table = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    for row in table:
        yield "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()


def _label(finding: Verdict) -> str:
    """Style class of a finding: pass, fail, blocked or unsure."""
    return LABELS[finding.exit_code]


def print_experiment(
    experiment: Experiment, *, folder: str, report: str | None, verbose: bool = False
) -> None:
    """Print the answer and its main numbers; everything where it is to be verbose."""
    lines = [*_everything(experiment, folder, report)] if verbose else _answer(experiment)
    if not verbose:
        lines += [f"results: {folder}", *([f"report: {report}"] if report else [])]
    print_lines(lines, exit_code=experiment.exit_code)


def _answer(experiment: Experiment) -> list[str]:
    """The sentence, then speed, control and sameness of one cell, or a line a cell."""
    lines = [*_headline(experiment)]
    cells = [cells_of(result) for result in experiment.cells]
    if len(cells) == 1:
        for at in _NUMBERS:
            lines.append(f"  {COLUMNS[at]:<18} {cells[0][at]}")
    else:
        rows = [[row[i] for i in _SHORT] for row in (COLUMNS, *cells)]
        widths = [min(max(len(row[i]) for row in rows), 30) for i in range(len(_SHORT))]
        for row in rows[: _MOST_CELLS + 1]:
            texts = (text[:width].ljust(width) for text, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(texts).rstrip()[: columns() - 2])
        lines += [f"  ... {len(cells) - _MOST_CELLS} more (-v)"] * (len(cells) > _MOST_CELLS)
    notes = [text for result in experiment.cells for text in _remarks(result)]
    lacking = [text for text in notes if text.startswith(_MISSING)]
    told = [*dict.fromkeys([*notes[:1], *lacking[:1]])]  # why, and what was not run
    for text in told:
        lines += wrapped("note", text, most=1 if text in lacking else 2)
    more = len(notes) - len(told)
    return lines + [f"  ... {more} more notes (-v)"] * (more > 0)


_MISSING = "missing: "
_NUMBERS = (4, 5, 8, 9)
"""Of `COLUMNS`, for one cell: ratio, A/A, latents, final rel_l2."""

_SHORT = (0, 1, 4, 8)
"""Of `COLUMNS`: cell, verdict, ratio, latents."""

_MOST_CELLS = 4


def _headline(experiment: Experiment) -> list[str]:
    word = word_of(experiment.verdict.value, passed=experiment.exit_code == 0)
    told = experiment.sentence
    if word not in ("PASSED", "FAILED"):
        told = told.removeprefix(f"{experiment.verdict.value}: ")
    return wrapped("", f"{word} {told}", most=3)


def _everything(experiment: Experiment, folder: str, report: str | None) -> Iterator[str]:
    """Every cell with its remarks, the table, how to read it, and how to repeat it."""
    yield from _headline(experiment)
    for result in experiment.cells:
        word = word_of(result.verdict.value, passed=result.verdict.passed)
        yield f"{word} {result.verdict.value} {result.cell.name} [{experiment.plan.switch}]"
        for text in _remarks(result):
            yield from wrapped("note", text)
    yield from _lines_below(experiment)
    yield f"results: {folder}"
    if report:
        yield f"report: {report}"
    if experiment.repeat:
        yield f"repeat: {experiment.repeat}"


def media_of(store: Store, experiment: Experiment) -> dict[str, tuple[Media, ...]]:
    """Frames of candidate and baseline side by side, by cell; what cannot be read is left out."""
    from truestep.case import Case
    from truestep.judge.media import frame_media

    found: dict[str, tuple[Media, ...]] = {}
    for result in experiment.cells:
        shown = []
        for planned in experiment.plan.cases:
            case = Case(**planned.content)
            own, theirs = (
                store.tensors(result.cell, arm, case.id).get("video/frames")
                for arm in ("candidate", "baseline")
            )
            if own is None or theirs is None or own.shape != theirs.shape:
                continue
            shown.append(frame_media(own, theirs, name=case.prompt))
        found[result.cell.name] = tuple(shown)
    return found


def render(experiment: Experiment, media: Mapping[str, Sequence[Media]]) -> str:
    """One self-contained page.

    Args:
        experiment: Read back from its JSON it renders the same.
        media: Frames by the name of a cell.

    Returns:
        HTML whose content security policy lets it load nothing and run nothing but its own script.
    """
    return page(
        "ab.html",
        e=experiment,
        columns=COLUMNS,
        items=[
            (c, cells_of(c), _remarks(c), media.get(c.cell.name, ()), _label(c.verdict))
            for c in experiment.cells
        ],
        kind=_label(experiment.verdict),
        legend=legend(experiment),
        data=embedded_json(experiment.model_dump_json()),
    )


def write_tables(store: Store, experiment: Experiment, *, report: Path | None) -> None:
    """Write `result.json`, `table.md` and the report, each atomically.

    Raises:
        WriteError: One could not be written.
    """
    write_text(store.folder / "result.json", experiment.model_dump_json(indent=1), "the result")
    write_text(store.folder / "table.md", markdown(experiment), "the table")
    if report is not None:
        write_text(report, render(experiment, media_of(store, experiment)), "the report")
