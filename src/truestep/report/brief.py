"""A result in brief: one envelope for every verb, small enough for an agent to read each time.

Verdict, cause, place, evidence by id, cost, the next command, and what a person must decide. All of
it comes from the full result; `truestep show RESULT ID` prints what an id stands for.
`docs/schema/brief-1.json` is generated from these models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydantic import Field

from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.experiment.perf_records import PerfResults
from truestep.experiment.quality.records import Quality
from truestep.experiment.records import Experiment
from truestep.report.answer import counted
from truestep.report.items import Evidence, Item, items_of
from truestep.report.results_file import AnyResult
from truestep.report.words import change_text, command_in
from truestep.text import quoted
from truestep.verdict import Comparison, Float, Record, Results

SCHEMA_VERSION = 1

MOST_TOKENS = 2_000
"""Of a brief as JSON, by `tokens`, which counts more than tokenizers do."""

_CUTS = ((20, 6, 400), (12, 4, 300), (8, 3, 200), (6, 2, 140), (4, 1, 100), (2, 1, 70), (1, 0, 50))
"""Items, evidence of each and letters of a text: the first that fits is taken."""

_PIECE = re.compile(r"[a-z]{1,2}|[0-9A-Z]|[^A-Za-z0-9 ]| (?![A-Za-z])")


def tokens(text: str) -> int:
    """An upper estimate of the tokens of a text, for tokenizers of byte pairs.

    Two small letters or one other character make a token, three those beyond ASCII; a
    space goes with the word after it. Text of random letters is what comes near it.
    """
    return sum(1 if piece.isascii() else 3 for piece in _PIECE.findall(text))


class Brief(Record):
    """A result in brief. Fields that are empty are left out of the JSON.

    Attributes:
        verdict: Of the whole; `error` where nothing could be judged, `measured` where nothing was
            to be.
        exit_code: Of the process.
        items: Cases of a check, cells of an experiment: those that did not pass first.
        left_out: Items that are not listed, for want of room.
        notes: What holds for the whole.
        seconds: That the work took, where it is known.
        next: The command that comes next; as it stands, it can be run. Empty where nothing more
            can be learned: then something is to be mended, and `repeat` runs the same again.
        decide: What no command can: what a person has to decide.
        details: The command that prints what an id stands for; ID is to be replaced.
        repeat: The command that gave this result.
    """

    schema_version: int = SCHEMA_VERSION
    verdict: str
    exit_code: int
    sentence: str
    items: tuple[Item, ...] = ()
    left_out: int = 0
    notes: tuple[Evidence, ...] = ()
    seconds: Float | None = None
    next: str = ""
    decide: str = ""
    details: str = Field(default="", description="truestep show RESULT ID")
    repeat: str = ""

    def to_json(self) -> str:
        """One line of JSON of at most `MOST_TOKENS` tokens."""
        return self.model_dump_json(exclude_defaults=True)


def brief_of(result: AnyResult, *, path: str = "") -> Brief:
    """A result in brief.

    Args:
        result: What a verb gives as JSON.
        path: Where that JSON is; without it the details have to be made again.
    """
    repeat = _repeat(result)
    items = [  # who follows `next` must come to an end: it is never the command that was just run
        item.model_copy(update={"next": ""}) if item.next == repeat else item
        for item in sorted(items_of(result), key=lambda item: item.exit_code == 0)
    ]
    first = next((item for item in items if item.exit_code), None)
    show = f"truestep show {quoted(path)} ID" if path else ""
    whole = Brief(
        verdict=_verdict(result),
        exit_code=result.exit_code,
        sentence=_sentence(result, items),
        items=tuple(items),
        notes=_notes(result),
        seconds=_seconds(result),
        next=first.next if first else "",
        decide=first.decide if first else "",
        details=show or (f"{repeat} --json truestep-result.json" if repeat else ""),
        repeat=repeat,
    )
    return fitted(whole, path)


_REPLACING = frozenset({"--update", "--force"})
"""Options of commands that no program should run because they are what comes next."""


def error_brief(error: str, *, notes: Sequence[str], exit_code: int, hint: str) -> Brief:
    """The envelope of a command that judged nothing.

    Args:
        notes: Where, what was measured, what is likely.
        hint: What comes next, if it is a command; else what a person has to do. What replaces a
            file that is there is a person's to decide.
    """
    told = [Evidence(id=f"n{at}", text=text) for at, text in enumerate(filter(None, notes))]
    command = command_in(hint)
    if not _REPLACING.isdisjoint(command.split()):
        command = ""
    whole = Brief(
        verdict="error",
        exit_code=exit_code,
        sentence=error,
        notes=tuple(told),
        next=command,
        decide="" if command else hint,
    )
    return fitted(whole, "")


def fitted(whole: Brief, path: str) -> Brief:
    """The brief, cut to its size: fewer items, less evidence, shorter texts; never a cut command.

    A command too long to be told (a prompt of a thousand words) is where the details are.
    """
    for most, evidence, letters in _CUTS:
        found = _cut(whole, most, evidence, letters)
        if tokens(found.to_json()) <= MOST_TOKENS:
            return found
    where = f"truestep show {quoted(path)} c0" if path and len(path) < _LONG else ""
    short = {"next": where if found.next else "", "repeat": "", "details": ""}
    bare = [item.model_copy(update={"next": "", "place": None}) for item in found.items]
    return found.model_copy(update={**short, "items": tuple(bare)})


_LONG = 300


def _cut(whole: Brief, most: int, evidence: int, letters: int) -> Brief:
    items = []
    for item in whole.items[:most]:
        texts = {"sentence": item.sentence, "cause": item.cause, "name": item.name}
        update = {key: shortened(text, letters) for key, text in texts.items()}
        same = item.next == whole.next
        proofs = _shorter(item.evidence[:evidence], letters)
        again = {"next": "" if same else item.next, "decide": "" if same else item.decide}
        # the one sentence of the one item is that of the whole
        update["sentence"] = "" if item.sentence == whole.sentence else update["sentence"]
        place = item.place and item.place.shortened(letters)
        items.append(
            item.model_copy(update={**update, **again, "evidence": proofs, "place": place})
        )
    return whole.model_copy(
        update={
            "items": tuple(items),
            "left_out": max(0, len(whole.items) - most),
            "sentence": shortened(whole.sentence, 2 * letters),
            "decide": shortened(whole.decide, 2 * letters),
            "notes": _shorter(whole.notes[: evidence + 1], letters),
        }
    )


def _shorter(proofs: Sequence[Evidence], letters: int) -> tuple[Evidence, ...]:
    return tuple(p.model_copy(update={"text": shortened(p.text, letters)}) for p in proofs)


def shortened(text: str, letters: int) -> str:
    """A text of so many letters at most, the end cut off and marked."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _verdict(result: AnyResult) -> str:
    if isinstance(result, Quality):
        return result.standing.value
    return "measured" if isinstance(result, Ablation | Matrix) else result.verdict.value


def _sentence(result: AnyResult, items: Sequence[Item]) -> str:
    if not isinstance(result, Results | PerfResults):
        return result.sentence
    if len(items) == 1:
        return items[0].sentence
    return counted(item.verdict for item in items)


def _notes(result: AnyResult) -> tuple[Evidence, ...]:
    """What holds for the whole; first what decides and was changed."""
    if isinstance(result, Results | Comparison):
        every = result.comparisons if isinstance(result, Results) else (result,)
        told = {
            change: Evidence(id=f"c{number}.l{at}", text=f"changed: {change_text(change)}")
            for number, comparison in reversed(list(enumerate(every)))
            for at, change in enumerate(comparison.rule_changes)
        }
        return tuple(told.values())
    notes: Iterable[str] = (
        result.notes if isinstance(result, Experiment | Ablation | Matrix | Quality) else ()
    )
    return tuple(Evidence(id=f"n{at}", text=text) for at, text in enumerate(notes))


def _repeat(result: AnyResult) -> str:
    if isinstance(result, Results):
        return next((c.repeat for c in result.comparisons if c.repeat), "")
    return result.repeat


def _seconds(result: AnyResult) -> float | None:
    """What the comparisons took together."""
    if isinstance(result, PerfResults):
        return sum(run.e2e_ms for each in result.results for run in each.runs) / 1e3
    if isinstance(result, Experiment):
        return sum(sample.seconds for cell in result.cells for sample in cell.samples)
    if isinstance(result, Quality):
        return sum(clip.seconds for clip in result.clips)
    if isinstance(result, Ablation | Matrix):
        return None
    every = result.comparisons if isinstance(result, Results) else (result,)
    spent = [c.cost.seconds for c in every if c.cost is not None]
    return sum(spent) if spent else None
