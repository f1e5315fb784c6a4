"""What a result says, part by part: cases of a check, cells of an experiment, in one form.

Ids are positions in the JSON: `c0.r12` is row 12 of comparison 0. `ids` reads them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath

from truestep.experiment.ablation_records import Ablation, Switch
from truestep.experiment.perf_records import PerfResult, PerfResults
from truestep.experiment.quality.records import Quality, QualityCell
from truestep.experiment.records import CellResult, Experiment
from truestep.report.results_file import AnyResult
from truestep.report.words import also_lines, command_in, next_command, recheck_line
from truestep.verdict import Comparison, Difference, Divergence, Record, Results, Row, Rows, Verdict

_MOST_ROWS = 8


DECISIONS = {
    "drifted": "whether this difference is wanted: if it is, record it as the new reference; "
    "if not, mend the code",
    "degraded": "whether this loss is worth what the change wins; if not, take the change back",
    "unmet": "whether the switch was meant to change something here, or should go",
    "missing": "whether the code of this environment is to be trusted: what is recorded now is "
    "what later runs are judged by",
    "incomparable": "which of the two cases or environments is meant",
}
"""What a person has to decide, by verdict; of others, nothing."""


class Place(Record):
    """Where a result breaks first.

    Attributes:
        text: In words.
        module: As PyTorch names it.
        file, line: Of the code, relative to the folder that the check ran in.
    """

    text: str
    stage: str = ""
    step: int | None = None
    branch: str | None = None
    module: str | None = None
    file: str | None = None
    line: int | None = None

    def shortened(self, letters: int) -> Place:
        """The same in so many letters a text, what does not fit left out."""
        text = self.text if len(self.text) <= letters else self.text[: letters - 1] + "…"
        kept = {k: v for k, v in self if isinstance(v, str) and k != "text"}
        gone = {k: type(self).model_fields[k].default for k, v in kept.items() if len(v) > letters}
        return self.model_copy(update={**gone, "text": text})


class Evidence(Record):
    """What a result rests on: a row, a note, a gate, a difference; in a line, and by its id."""

    id: str
    text: str


class Item(Record):
    """One case of a check, or one cell of an experiment.

    Attributes:
        cause: What is wrong, where that is known.
        cost: Of this one, in words.
        next: The command that comes next; as it stands, it can be run. Where nothing more can be
            learned it is the same again.
        decide: What a person has to decide.
    """

    id: str
    name: str
    verdict: str
    exit_code: int
    sentence: str = ""
    cause: str = ""
    place: Place | None = None
    evidence: tuple[Evidence, ...] = ()
    cost: str = ""
    next: str = ""
    decide: str = ""


def items_of(result: AnyResult) -> tuple[Item, ...]:
    """The parts of a result, in its order."""
    return tuple(_items(result))


def _items(result: AnyResult) -> Iterator[Item]:
    if isinstance(result, Comparison):
        yield _of_comparison(result, "c0")
    elif isinstance(result, Results):
        for at, comparison in enumerate(result.comparisons):
            yield _of_comparison(comparison, f"c{at}")
    elif isinstance(result, Experiment):
        for at, cell in enumerate(result.cells):
            yield _of_cell(cell, f"c{at}", result.repeat)
    elif isinstance(result, Quality):
        for at, candidate in enumerate(result.candidates):
            yield _of_candidate(candidate, f"c{at}", result.next)
    elif isinstance(result, PerfResults):
        for at, found in enumerate(result.results):
            yield _of_perf(found, f"c{at}", result)
    elif isinstance(result, Ablation):
        for at, switch in enumerate(result.switches):
            yield _of_switch(switch, f"c{at}")


def _of_candidate(cell: QualityCell, own: str, following: str) -> Item:
    passed = cell.standing.passed
    return Item(
        id=own,
        name=cell.cell.name,
        verdict=cell.standing.value,
        exit_code=cell.standing.exit_code,
        sentence=cell.sentence,
        cause="" if passed or not cell.reasons else cell.reasons[0],
        evidence=tuple(_numbered(own, "q", cell.reasons)),
        next="" if passed else following,
        decide="" if passed else DECISIONS.get(cell.standing.value, ""),
    )


def _of_comparison(comparison: Comparison, own: str) -> Item:
    passed = comparison.exit_code == 0
    return Item(
        id=own,
        name=comparison.case_id or comparison.actual.label,
        verdict=comparison.verdict.value,
        exit_code=comparison.exit_code,
        sentence=comparison.sentence,
        cause="" if passed else _cause(comparison),
        place=_place(comparison.first_divergence),
        evidence=() if passed else tuple(_evidence(comparison, own)),
        cost=_cost(comparison),
        next="" if passed else (next_command(comparison) or comparison.repeat),
        decide="" if passed else DECISIONS.get(comparison.verdict.value, ""),
    )


def _place(first: Divergence | None) -> Place | None:
    if first is None:
        return None
    file = first.file if first.file and is_below(first.file) else None
    return Place(
        text=str(first),
        stage=first.stage,
        step=first.step,
        branch=first.branch,
        module=first.fqn,
        file=file,
        line=first.line if file and first.line and first.line > 0 else None,
    )


def is_below(file: str) -> bool:
    """Whether a path of a result names a file below the folder of the check, whoever wrote it."""
    path = PurePosixPath(file)
    plain = not any(c in file for c in ':\\\n\r\x00"') and file.isprintable()
    return plain and not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _cause(comparison: Comparison) -> str:
    first = comparison.first_divergence
    explained = [first.cause.text] if first and first.cause else []
    explained += also_lines(first) if first else []
    if first and first.recheck and not first.recheck.passed:
        explained.append(recheck_line(first.recheck))
    parts = [part for part in (*explained, first.kind, first.operator) if part] if first else []
    if not parts and comparison.evidence is not None:
        parts = [finding.text for finding in comparison.evidence.findings[:2]]
    if not parts and comparison.known is not None:
        parts = [comparison.known.text]
    if not parts and comparison.verdict is not Verdict.DRIFTED:  # its rows say what differs
        parts = [*comparison.notes[:1]]
    return "; ".join(parts)


def _evidence(comparison: Comparison, own: str) -> Iterator[Evidence]:
    rows = Rows.of(comparison.rows)
    causes = list(comparison.causes[:_MOST_ROWS])
    places = _places(rows, [row.name for row in causes])
    for row in causes:
        if row.name in places:
            yield Evidence(id=f"{own}.r{places[row.name]}", text=row_text(row))
    yield from _numbered(own, "d", (f"case {_was(d)}" for d in comparison.case_differences))
    if comparison.evidence is not None:
        yield from _numbered(own, "f", (each.text for each in comparison.evidence.findings))
    for at, gate in enumerate(comparison.gates):
        if gate.passed is not True:
            yield Evidence(id=f"{own}.g{at}", text=f"gate {gate.name}: {gate.outcome}")
    differing = comparison.environment_differences
    yield from _numbered(own, "e", (f"environment {_was(d)}" for d in differing))
    yield from _numbered(own, "n", comparison.notes)


def _was(each: Difference) -> str:
    return f"{each.key}: {each.actual} (was {each.reference})"


def _numbered(own: str, letter: str, texts: Iterable[str]) -> list[Evidence]:
    return [Evidence(id=f"{own}.{letter}{at}", text=text) for at, text in enumerate(texts)]


def _places(rows: Rows, names: Sequence[str]) -> dict[str, int]:
    """Where rows of some names are; of a name that failed and passed, where it failed."""
    wanted, found = set(names), dict[str, int]()
    for at, (name, verdict) in enumerate(rows.each("name", "verdict")):
        if name in wanted and name not in found and not verdict.passed:
            found[name] = at
    return found


def row_text(row: Row) -> str:
    """A row in a line: what it is, its verdict, by how much, and why."""
    parts = [f"{row.name} {row.verdict.value}"]
    parts += [f"rel_l2 {row.metrics.rel_l2:.1e}"] if row.metrics else []
    parts += [f"{row.ratio:.3g} x floor"] if row.ratio is not None else []
    return ", ".join([*parts, *(part for part in (row.origin, row.note) if part)])


def _cost(comparison: Comparison) -> str:
    cost = comparison.cost
    if cost is None:
        return ""
    text = f"{cost.seconds:.2g} s, {cost.forwards} forwards"
    return f"{text} ({cost.share:.0%} of a generation)" if cost.forwards_generation else text


def _of_cell(cell: CellResult, own: str, repeat: str) -> Item:
    passed = cell.verdict.passed
    needed = cell.speed.rounds_needed if cell.speed else None
    again = repeat
    if repeat and needed and cell.verdict.value == "inconclusive":
        again = f"{repeat} --rounds {needed} --output truestep-ab-{needed}"
    speed = cell.speed
    cost = f"{speed.rounds} rounds, {speed.pairs} pairs of runs" if speed else ""
    notes = (*cell.reasons, *cell.missing, *cell.notes)
    groups = (("q", cell.reasons), ("m", cell.missing), ("n", cell.notes))
    return Item(
        id=own,
        name=cell.cell.name,
        verdict=cell.verdict.value,
        exit_code=cell.verdict.exit_code,
        sentence=cell.sentence,
        cause="" if passed or not notes else notes[0],
        place=Place(text=cell.first_divergence) if cell.first_divergence else None,
        evidence=() if passed else tuple(chain(*(_numbered(own, *group) for group in groups))),
        cost=cost,
        next="" if passed else again,
        decide="" if passed else DECISIONS.get(cell.verdict.value, ""),
    )


def _of_switch(switch: Switch, own: str) -> Item:
    """A control of an ablation: what it changes is measured, and nothing fails by it."""
    return Item(
        id=own,
        name=switch.choice.control,
        verdict=switch.stages_verdict.value,
        exit_code=0,
        sentence=switch.stages_sentence,
        cause=switch.reason,
        place=_place(switch.first),
    )


def _of_perf(found: PerfResult, own: str, bundle: PerfResults) -> Item:
    passed = found.verdict.passed
    again = command_in(found.hint) or bundle.repeat
    rows = [(at, row) for at, row in enumerate(found.rows) if row.verdict is not None]
    told = [
        Evidence(
            id=f"{own}.r{at}",
            text=f"{row.name} {row.value:.4g} {row.unit} (was {row.base:.4g}, {row.change:+.1%})",
        )
        for at, row in rows
        if row.verdict is not None and not row.verdict.passed
    ]
    told += [*_numbered(own, "p", found.problems), *_numbered(own, "n", found.notes)]
    return Item(
        id=own,
        name=found.case_name or found.case_id,
        verdict=found.verdict.value,
        exit_code=found.verdict.exit_code,
        sentence=found.sentence,
        cause="" if passed or not told else told[0].text,
        evidence=() if passed else tuple(told),
        cost=f"{len(found.runs)} runs",
        next="" if passed else again,
        decide="" if passed else DECISIONS.get(found.verdict.value, ""),
    )
