"""What a notebook shows of a result, a recording or a case: small, and loading nothing.

Every text is escaped and cut, pictures are inside, and a page above `MOST` goes without what is
largest in it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.experiment.perf_records import PerfResult, PerfResults
from truestep.experiment.records import Experiment
from truestep.report.curves import Curve, curve, number
from truestep.report.html import LABELS, SIGNS, page
from truestep.report.markdown import code
from truestep.text import short
from truestep.verdict import Comparison, FrameTriple, Results, Row

MOST = 95_000
"""Letters of what a notebook is given."""

_PICTURES = 60_000
_TEXT = 300
_ROWS = 8
_TRIPLES = 3

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Sheet:
    """What is shown of an object.

    Attributes:
        kind, word: Style class and verdict; empty where nothing was judged.
        sentence: The answer.
        facts: Key and value.
        tables: Caption, then heads and rows.
        line: A curve.
        pictures: Captions, then data URIs, a row each.
    """

    sentence: str
    kind: str = ""
    word: str = ""
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[tuple[str, Table]] = ()
    line: Curve | None = None
    pictures: Sequence[Sequence[tuple[str, str]]] = field(default=())


def html(value: object) -> str | None:
    """An object as HTML of its own; None for one of which its `repr` says all."""
    sheet = sheet_of(value)
    if sheet is None:
        return None
    bare = {"pictures": ()}, {"pictures": (), "line": None}
    for without in ({}, *bare, {**bare[1], "tables": ()}):
        text = page("notebook.html", s=_cut(sheet, **without))
        if len(text) <= MOST:
            return text
    return page("notebook.html", s=Sheet(short(sheet.sentence, _TEXT), sheet.kind, sheet.word))


def markdown(value: object) -> str | None:
    """The same without curves and pictures, as Markdown."""
    sheet = sheet_of(value)
    if sheet is None:
        return None
    word = f"{SIGNS[sheet.kind]} {sheet.word}: " if sheet.kind else ""
    lines = [f"**{word}**{code(sheet.sentence, _TEXT)}", ""]
    lines += [f"- {code(key, 40)}: {code(text, _TEXT)}" for key, text in sheet.facts]
    for caption, (heads, rows) in sheet.tables:
        lines += ["", code(caption, _TEXT), "", _row(heads), "|" + "---|" * len(heads)]
        lines += [_row([code(text, 120) for text in row]) for row in rows]
    return "\n".join(lines)[:MOST] + "\n"


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _cut(sheet: Sheet, **without: Any) -> Sheet:
    """A sheet whose texts are no longer than is read."""
    kept = {
        "facts": [(short(key, 40), short(text, _TEXT)) for key, text in sheet.facts],
        "tables": [
            (short(name, _TEXT), (heads, [[short(t, 120) for t in row] for row in rows]))
            for name, (heads, rows) in sheet.tables
        ],
        "line": sheet.line,
        "pictures": sheet.pictures,
        **without,
    }
    return Sheet(short(sheet.sentence, _TEXT), sheet.kind, sheet.word, **kept)


def sheet_of(value: object) -> Sheet | None:
    """What is shown of an object; None for one of which its `repr` says all."""
    if isinstance(value, Comparison):
        return _comparison(value)
    if isinstance(value, Results | PerfResults):
        return _several(value)
    if isinstance(value, PerfResult):
        return Sheet(value.sentence, LABELS[value.verdict.exit_code], value.verdict.value)
    if isinstance(value, Experiment):
        return _experiment(value)
    if isinstance(value, Ablation | Matrix):
        from truestep.report.ablation import tables

        drawn = [(name, (heads, rows[:40])) for name, (heads, rows) in tables(value)]
        return Sheet(value.sentence, tables=drawn)
    if hasattr(value, "manifest") and hasattr(value, "path"):
        return _recording(value)
    if isinstance(value, BaseModel) and hasattr(value, "canonical"):
        told = [(key, str(text)) for key, text in value.canonical().items()]
        return Sheet(str(getattr(value, "id", "")), facts=told)
    return None


def _comparison(c: Comparison) -> Sheet:
    facts = [("case", c.case_id or ""), ("candidate", c.actual.label)]
    facts += [("prompt", str((c.case or {}).get("prompt") or "")), ("rule", c.rule.text)]
    if c.first_divergence is not None and c.first_divergence.operator:
        facts.append(("at", c.first_divergence.operator))
    facts += [("note", note) for note in c.notes[:2]]
    facts += [("hint", c.hint), ("repeat", c.repeat)]
    causes = c.causes
    tables = []
    if causes:
        more = c.uncounted(min(_ROWS, len(causes)))
        heads = ("tensor", "verdict", "rel_l2", "floor", "× floor", "note")
        caption = "what did not pass" + (f" ({more})" if more else "")
        tables.append((caption, (heads, [_told(row) for row in causes[:_ROWS]])))
    return Sheet(
        c.sentence,
        LABELS[c.exit_code],
        c.verdict.value,
        facts=[(key, text) for key, text in facts if text],
        tables=tables,
        line=curve(c.rows) if len(c.rows) <= 4000 else None,
        pictures=_frames([t for m in c.media if not m.sound for t in _spread(m.frames)]),
    )


def _told(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.verdict.value,
        number(row.metrics.rel_l2 if row.metrics else None),
        number(row.floor.rel_l2 if row.floor else None),
        number(row.ratio),
        row.note,
    )


def _several(results: Results | PerfResults) -> Sheet:
    each = results.comparisons if isinstance(results, Results) else results.results
    rows = [(c.case_id or "-", c.verdict.value, c.sentence) for c in each[:20]]
    more = f" ({len(each) - 20} more)" if len(each) > 20 else ""
    sentence = f"{results.verdict.value}: {len(each)} {'result' if len(each) == 1 else 'results'}"
    return Sheet(
        sentence,
        LABELS[results.exit_code],
        results.verdict.value,
        tables=[(f"each of them{more}", (("case", "verdict", "what it says"), rows))],
    )


def _experiment(experiment: Experiment) -> Sheet:
    from truestep.report.ab import COLUMNS, cells_of

    rows = [cells_of(cell) for cell in experiment.cells[:40]]
    return Sheet(
        experiment.sentence,
        LABELS[experiment.exit_code],
        experiment.verdict.value,
        facts=[("repeat", experiment.repeat)] if experiment.repeat else [],
        tables=[("one row a cell", (COLUMNS, rows))],
    )


def _recording(recording: Any) -> Sheet:
    from truestep.recording.keyframes import read_key_frames

    manifest = recording.manifest
    case = manifest.case or {}
    facts = [
        ("file", str(recording.path or "in memory")),
        ("recorded", f"{manifest.created} by truestep {manifest.tool_version}"),
        ("level", manifest.level),
        ("model", str(case.get("model") or "")),
        ("prompt", str(case.get("prompt") or "")),
        ("floor", f"{len(manifest.noise_floor.runs)} runs" if manifest.noise_floor else "none"),
    ]
    rows = [
        (entry.name, entry.dtype, " × ".join(map(str, entry.shape)))
        for entry, _ in zip(manifest.tensors, range(_ROWS), strict=False)
    ]
    frames = read_key_frames(manifest.settings, where="the manifest")
    seen = [
        (f"frame {at}", "data:image/png;base64," + base64.b64encode(data).decode())
        for at, data in (frames.pictures.items() if frames else ())
    ]
    more = len(manifest.tensors) - len(rows)
    return Sheet(
        f"{len(recording)} tensors, case {manifest.case_id or '-'}",
        facts=[(key, text) for key, text in facts if text],
        tables=[
            ("tensors" + (f" ({more} more)" if more else ""), (("name", "dtype", "shape"), rows))
        ],
        pictures=[seen] if seen and sum(len(uri) for _, uri in seen) <= _PICTURES else (),
    )


def _spread(frames: Sequence[FrameTriple]) -> Iterator[FrameTriple]:
    """First, middle and last."""
    yield from (frames[at] for at in sorted({0, len(frames) // 2, len(frames) - 1}) if frames)


def _frames(frames: Sequence[FrameTriple]) -> list[list[tuple[str, str]]]:
    """Rows of pictures, as many as there is room for, made smaller where none fits."""
    room, found = _PICTURES, []
    for frame in frames[:_TRIPLES]:
        uris = [
            _small(uri, _PICTURES // 9) for uri in (frame.actual, frame.reference, frame.difference)
        ]
        names = (f"candidate, {frame.index}", "reference", "difference")
        room -= sum(map(len, uris))
        if room < 0 or not all(uris):
            break
        found.append(list(zip(names, uris, strict=True)))
    return found


def _small(uri: str, most: int) -> str:
    """A picture that is no longer than this, by a whole factor smaller; empty for what is none."""
    kind = "data:image/png;base64,"
    if not uri.startswith(kind):
        return ""
    if len(uri) <= most:
        return uri
    from truestep.measure.pictures import pixels, png, reduced

    try:
        picture = pixels(base64.b64decode(uri[len(kind) :], validate=True))
    except ValueError:
        return ""
    factor = 1 + int((len(uri) / most) ** 0.5)
    small = reduced(picture[None], factor)[0]
    height, width = small.shape[:2]
    if not height or not width:
        return ""
    data = png(small.contiguous().numpy().tobytes(), width=width, height=height, level=9)
    again = kind + base64.b64encode(data).decode()
    return again if len(again) <= most else ""
