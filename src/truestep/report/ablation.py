"""An ablation, or a matrix of profiles: as text, Markdown and one HTML page with an inline plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.experiment.ablation_records import (
    MODALITIES,
    Ablation,
    EndRun,
    Matrix,
    StageDistance,
    Switch,
)
from truestep.experiment.attribution import NOT_ADDITIVE, ORDER_TEXT
from truestep.files import write_text
from truestep.report.curves import number
from truestep.report.html import LABELS, embedded_json, page
from truestep.screen import aligned, print_lines, rows, screen
from truestep.text import say, visible

if TYPE_CHECKING:
    from rich.console import Console

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heads, and rows of as many texts."""

_WIDTH = 160
"""Columns of text where the output is no terminal: nothing is cut."""


def switch_table(ablation: Ablation) -> Table:
    """One row a control, in the order of the largest end distance; then all together."""
    measured = tuple(m for m in MODALITIES if ablation.whole.end(m))
    heads = (
        "control",
        "from -> to",
        "stages in isolation",
        "end",
        *(f"{m} alone" for m in measured),
        *(f"{m} together" for m in measured),
        "why",
    )
    rows = [
        (
            switch.choice.control,
            f"{switch.choice.from_value} -> {switch.choice.to_value}",
            stages_text(switch),
            switch.alone.verdict.value,
            *(_end(switch.alone, m) for m in measured),
            *(_end(switch.together, m) for m in measured),
            switch.reason or _note(switch),
        )
        for switch in ranked(ablation)
    ]
    whole = tuple(_end(ablation.whole, m) for m in measured)
    nothing = ("",) * len(measured)
    name = f"all: {ablation.candidate}"
    rows.append((name, "", "", ablation.whole.verdict.value, *nothing, *whole, ""))
    return heads, rows


def share_table(ablation: Ablation) -> Table:
    """Shares of the distance, modality by modality, largest first; what is left over last."""
    heads = ("modality", "control", "alone", "share", "increment", "share of all")
    rows: list[tuple[str, ...]] = []
    for found in ablation.attributions:
        for share in found.shares:
            rows.append(
                (
                    found.modality,
                    share.control,
                    number(share.alone),
                    _percent(share.alone_share),
                    number(share.increment),
                    _percent(share.increment_share),
                )
            )
        rows += [
            (found.modality, "sum", number(found.sum_alone), "", number(found.total), ""),
            (
                found.modality,
                "interaction remainder",
                f"{number(found.remainder)} ({_percent(_over(found.remainder, found.total))})",
                "",
                "0",
                "",
            ),
        ]
    return heads, rows


def matrix_tables(matrix: Matrix) -> list[tuple[str, Table]]:
    """One table a modality: rows are references, columns candidates."""
    found = []
    for modality in MODALITIES:
        if not any(cell.run.end(modality) for cell in matrix.cells):
            continue
        rows = []
        for reference in matrix.profiles:
            texts = [reference]
            for candidate in matrix.profiles:
                cell = matrix.cell(reference, candidate)
                if cell is None:
                    texts.append("=")
                    continue
                leading = cell.leading.get(modality)
                end = f"{_end(cell.run, modality)} {_verdict(cell.run, modality)}"
                texts.append(f"{end}; {leading}" if leading else end)
            rows.append(tuple(texts))
        heads = ("reference \\ candidate", *matrix.profiles)
        found.append((modality, (heads, rows)))
    return found


def ranked(ablation: Ablation) -> list[Switch]:
    """Switches by their largest distance at the end, in floors; those that do nothing last."""
    return sorted(
        ablation.switches,
        key=lambda s: -max((end.multiple or 0.0 for end in s.alone.ends), default=0.0),
    )


def stages_text(switch: Switch) -> str:
    """`drifted at guidance: guidance 12 / 7 x floor`, video and audio, or `identical`."""
    where = f" at {switch.first_stage}" if switch.first else ""
    by_stage: dict[str, list[StageDistance]] = {}
    for stage in switch.stages:
        by_stage.setdefault(stage.stage, []).append(stage)
    parts = [f"{name} {' / '.join(map(_multiple, found))} x" for name, found in by_stage.items()]
    return f"{switch.stages_verdict.value}{where}" + (f": {', '.join(parts)}" if parts else "")


def _multiple(stage: StageDistance) -> str:
    return stage.verdict.value if stage.multiple is None else number(stage.multiple)


def _end(run: EndRun, modality: str) -> str:
    """`0.079 (1.5e+05 x)`; 0 where it is bit-equal."""
    end = run.end(modality)
    if end is None:
        return "-"
    if end.rel_l2 is None:
        return end.verdict.value
    return f"{number(end.rel_l2)} ({number(end.multiple)} x)" if end.rel_l2 else "0"


def _verdict(run: EndRun, modality: str) -> str:
    end = run.end(modality)
    return end.verdict.value if end else ""


def _note(switch: Switch) -> str:
    if switch.hidden:
        return "it drifts in its stage; the floor of a free run hides it"
    return "; ".join(dict.fromkeys(end.note for end in switch.alone.ends if end.note))


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    if 0 < abs(share) < 5e-4:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


def _over(value: float, total: float) -> float | None:
    return value / total if total else None


def remarks(result: Ablation | Matrix) -> tuple[str, ...]:
    """How to read the tables, what was not switched, and what the run said."""
    told: list[str] = []
    if isinstance(result, Ablation):
        told += [
            f"alone: {result.reference} with one control switched; together: with it and those "
            f"before it, {ORDER_TEXT} ({', '.join(result.order) or 'none'})",
            "distances are rel_l2 of the final latents of free runs, relative to "
            f"{result.reference}; x: over its noise floor, measured in {result.floor_runs} runs",
            "stages in isolation: every stage is fed what it was given in the recorded run",
            f"{NOT_ADDITIVE}; the interaction remainder is the whole distance less the sum of "
            "single switches",
            _explained(result),
        ]
        told += [
            f"{kept.control} is set by the case ({kept.value}) and not switched: the profiles have "
            f"{kept.from_value} and {kept.to_value}"
            for kept in result.kept
        ]
    else:
        told += [
            "a row is the reference: rel_l2 of the candidate's final latent relative to its own, x "
            "over its noise floor; then the control that moves the end furthest on its own, and by "
            "how many floors",
        ]
        told += [f"left out: {name}: {why}" for name, why in result.left_out.items()]
        if result.kept:
            told.append(f"set by the case, the same in all profiles: {', '.join(result.kept)}")
    return (*told, *result.notes)


def _explained(result: Ablation) -> str:
    if result.mismatch:
        return (
            f"with all controls switched, `{result.mismatch}` is not that of {result.candidate}: "
            "something else differs"
        )
    return (
        f"with all controls switched the run is {result.candidate} bit for bit: {result.compared} "
        "tensors, final latents, frames and sound among them"
    )


def tables(result: Ablation | Matrix) -> list[tuple[str, Table]]:
    """Every table of a result, with its caption."""
    if isinstance(result, Matrix):
        return [(f"{modality}, end of a free run", t) for modality, t in matrix_tables(result)]
    found = [("controls", switch_table(result))]
    return [*found, ("shares of the distance", share_table(result))] if result.switches else found


def markdown(result: Ablation | Matrix) -> str:
    """Tables for a pull request, the sentence above and how to read them below."""
    lines = [f"**{result.sentence}**", ""]
    for caption, (heads, body) in tables(result):
        lines += [f"{caption}:", "", _line(heads), "|" + "---|" * len(heads)]
        lines += [*map(_line, body), ""]
    lines += [f"- {text}" for text in remarks(result)]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    escaped = (text.replace("\\", "\\\\").replace("|", "\\|") for text in texts)
    return "| " + " | ".join(escaped) + " |"


def print_result(
    result: Ablation | Matrix, *, output: str | None, report: str | None, verbose: bool = False
) -> None:
    """Print the answer, and how far each control takes the end; all tables where it is to be
    verbose."""
    word = "MEASURED" if result.exit_code == 0 else "FAILED"
    places = [("table", output), ("report", report), ("repeat", result.repeat)]
    ending = [f"{label}: {place}" for label, place in places if place]
    if verbose:
        _print_tables(result)
    told = screen(f"{word} {result.sentence}", rows(_short(result)), ending=ending)
    print_lines(told, exit_code=result.exit_code)


def _short(result: Ablation | Matrix) -> list[str]:
    """A row a control, or a pair of profiles: its values, and how far the end is moved."""
    if isinstance(result, Ablation):
        heads, found = switch_table(result)
        kept = [heads.index(name) for name in ("control", "from -> to", "end")]
        kept += [at for at, head in enumerate(heads) if head.endswith(" alone")][:1]
        return aligned([[row[i] for i in kept] for row in (heads, *found)], left=(0, 1, 2, 3))
    cells = [("reference", "candidate", "end")]
    for cell in result.cells:
        ends = [f"{m} {_end(cell.run, m)}" for m in MODALITIES if cell.run.end(m)]
        cells.append((cell.reference, cell.candidate, ", ".join(ends[:1])))
    return aligned(cells, left=(0, 1, 2))


def _print_tables(result: Ablation | Matrix) -> None:
    """All tables, and how to read them."""
    import sys

    from rich.console import Console

    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else _WIDTH,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for caption, table in tables(result):
        _print_table(console, caption, table)
        say()
    for text in remarks(result):
        console.print(visible(f"- {text}"), soft_wrap=not sys.stdout.isatty())
    say()


def _print_table(console: Console, caption: str, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    heads, rows = table
    shown = RichTable(
        title=Text(visible(caption)), title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    for head in heads:
        shown.add_column(Text(visible(head)), overflow="fold", no_wrap=head == heads[0])
    for row in rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    console.print(shown)


@dataclass(frozen=True)
class Mark:
    """One modality of one control: where it is, in SVG units, and what it says."""

    x: float
    y: float
    series: int
    open: bool
    title: str


@dataclass(frozen=True)
class Lane:
    """One control, a line of the plot; `text` stands for a mark where nothing changed."""

    name: str
    y: float
    marks: tuple[Mark, ...]
    text: str


@dataclass(frozen=True)
class Plot:
    """End distances in multiples of the floor, on a logarithmic axis; all in SVG units."""

    lanes: tuple[Lane, ...]
    floor_x: float
    ticks: tuple[tuple[float, str], ...]
    height: int
    width: int = 760
    left: int = 190
    right: int = 740
    top: int = 14

    @property
    def bottom(self) -> int:
        """Of the axis."""
        return self.height - 44


_LANE = 30
_LEAST = 1e-2
"""Multiples of the floor at or below this are drawn at the left edge."""

_MOST = 1e15


def plot(ablation: Ablation) -> Plot | None:
    """Lay out the end distances: one control a line, the whole difference last."""
    runs = [(s.choice.control, s.alone, s.together) for s in ranked(ablation)]
    runs.append((f"all: {ablation.candidate}", ablation.whole, ablation.whole))
    multiples = [
        min(end.multiple, _MOST)
        for _, alone, together in runs
        for run in (alone, together)
        for end in run.ends
        if end.multiple is not None and math.isfinite(end.multiple)
    ]
    if not multiples:
        return None
    top = 10.0 ** math.ceil(math.log10(max(*multiples, 10.0)) + 0.05)
    frame = Plot((), 0.0, (), height=_LANE * len(runs) + 60)

    def x_of(multiple: float) -> float:
        clipped = top if math.isnan(multiple) else min(max(multiple, _LEAST), top)
        share = math.log10(clipped / _LEAST) / math.log10(top / _LEAST)
        return round(frame.left + share * (frame.right - frame.left), 1)

    lanes = []
    for at, (name, alone, together) in enumerate(runs):
        y = frame.top + _LANE * (at + 0.5)
        both = [("alone", alone, False)]
        if at < len(runs) - 1:
            both.append(("together with those before it", together, True))
        marks = [
            Mark(
                x_of(end.multiple),
                y + (-5 if end.modality == MODALITIES[0] else 5),
                MODALITIES.index(end.modality),
                is_open,
                f"{name} {how}, {end.modality}: {number(end.multiple)} x floor, "
                f"rel_l2 {number(end.rel_l2)}, {end.verdict.value}",
            )
            for how, run, is_open in reversed(both)
            for end in run.ends
            if end.multiple
        ]
        changed = any(end.multiple for end in alone.ends)
        lanes.append(Lane(name, y, tuple(marks), "" if changed else alone.verdict.value))
    decades = range(round(math.log10(_LEAST)), round(math.log10(top)) + 1)
    step = 1 + len(decades) // 9
    ticks = tuple((x_of(10.0**d), f"{10.0**d:g}" if d < 4 else f"1e{d}") for d in decades[::step])
    return Plot(tuple(lanes), x_of(1.0), ticks, height=frame.height)


def render(result: Ablation | Matrix) -> str:
    """One self-contained page.

    Args:
        result: Read back from its JSON it renders the same.

    Returns:
        HTML whose content security policy lets it load nothing and run nothing but its own script.
    """
    ablation = result if isinstance(result, Ablation) else None
    return page(
        "ablation.html",
        r=result,
        a=ablation,
        plot=plot(ablation) if ablation else None,
        tables=tables(result),
        modalities=MODALITIES,
        remarks=remarks(result),
        kind=LABELS[result.exit_code],
        data=embedded_json(result.model_dump_json()),
    )


def write_files(result: Ablation | Matrix, *, output: Path | None, report: Path | None) -> None:
    """Write Markdown and HTML, each atomically, where they are asked for.

    Raises:
        WriteError: One could not be written.
    """
    if output is not None:
        write_text(output, markdown(result), "the table")
    if report is not None:
        write_text(report, render(result), "the report")
