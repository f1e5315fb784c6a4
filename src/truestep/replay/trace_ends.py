"""What a trace does not hold: a run that broke off, and values that are not read as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from truestep.keys import key_of, module_name
from truestep.pairing.naming import ROOT
from truestep.recording.manifest import Manifest
from truestep.recording.readers import Source
from truestep.replay.tracer import UNREAD
from truestep.verdict import Row, Rows, Verdict

PARTIAL = "partial"
"""How a note of a trace begins that was cut short."""

_UNREAD = re.compile(rf"^(?P<fqn>\S+) (?:{'|'.join(map(re.escape, UNREAD))})")
_NOTHING = "(NoneType)"


def is_partial(source: Source) -> bool:
    """Whether a trace was cut short."""
    return any(note.startswith(PARTIAL) for note in _notes(source))


def cut(source: Source, side: str) -> list[str]:
    """How a trace was cut short, for the reader."""
    return [f"{side}: {note}" for note in _notes(source) if note.startswith(PARTIAL)]


INPUTS = "inputs of modules"
"""Left out where one side alone was asked for them: that says nothing of how far a run came."""


def only_of_the(label: str) -> str:
    """Why something is left out."""
    return f"(only the {label} trace has them)"


def unrecorded(ours: Source, theirs: Source, *, of: str | None = None) -> list[str]:
    """What modules returned and no trace holds, each said once.

    Args:
        of: Name of the one module to tell of.
    """
    found: dict[str, list[str]] = {}
    for source, side in ((ours, "actual"), (theirs, "reference")):
        for note in _notes(source):
            match = _UNREAD.match(note)
            if match and _NOTHING not in note and of in (None, match["fqn"]):
                found.setdefault(note, []).append(side)
    return [
        note if len(sides) == 2 else f"{note} (in the {sides[0]} trace)"
        for note, sides in found.items()
    ]


def with_ends(rows: Rows, ours: Source, theirs: Source, left_out: Sequence[str]) -> Rows:
    """Rows, and one each for a run that broke off and for an end that cannot be judged."""
    more = list(_ends(rows, ours, theirs, left_out))
    return Rows.of([*rows, *more]) if more else rows


def _ends(rows: Rows, ours: Source, theirs: Source, left_out: Sequence[str]) -> Iterator[Row]:
    places = [words for words in left_out if not words.startswith(INPUTS)]
    lacking = any(only_of_the("reference") in words for words in places)
    if lacking and is_partial(ours) and not is_partial(theirs):
        note = f"{cut(ours, 'actual')[0]}, before what the reference goes on with"
        yield Row(name="run", verdict=Verdict.INVALID, stage="run", note=note)
    ends = rows.each("fqn", "name")
    ended = any(fqn == ROOT and _is_output(name) for fqn, name in ends)
    words = unrecorded(ours, theirs, of=ROOT)
    if words and not ended:
        name = module_name(ROOT, step=0, branch="main", slot="out")
        note = f"what the model returns is not judged: {words[0]}"
        yield Row(name=name, verdict=Verdict.INCOMPARABLE, stage="module", fqn=ROOT, note=note)


def gone(rows: Rows, *, partial: bool) -> Rows:
    """Say of a tensor that one side lacks whether the trace ended before it."""
    if not partial:
        return rows
    sides = rows.each("note", "actual", "reference")
    return rows.replaced(
        note=(note if a and r else f"{note}: a trace is partial" for note, a, r in sides)
    )


def _notes(source: Source) -> tuple[str, ...]:
    manifest: Manifest | None = source.manifest
    return tuple(manifest.notes) if manifest else ()


def _is_output(name: str) -> bool:
    key = key_of(name)
    return key.stage == "module" and not key.inward
