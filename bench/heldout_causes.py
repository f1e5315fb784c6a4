"""Held-out faults under `--depth cause`: what is said of each, and the table of it.

The faults and what is true of them were written down before any of them was run.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.bench_location import Bench, globals_restored
from bench.common import quiet, read
from bench.faults.draws import DRAWS
from bench.faults.heldout_stages import HELD, NO_CAUSE, PLAIN, STAGED, Held
from bench.faults.heldout_why import WHY
from truestep import check, record
from truestep.replay.check import check_pipeline
from truestep.replay.locating import locate_module
from truestep.testing.corpus.subjects import SUBJECTS
from truestep.verdict import Comparison

RIGHT, WRONG, ABSTAINS = "right", "wrong", "abstains"
COUNTED = (RIGHT, WRONG, ABSTAINS)
DRAW = 3
"""Of the plain pipelines' weights and inputs; no other benchmark uses it."""

Plant = Callable[[Any], Any]
Explain = Callable[[Plant], Comparison]


def fill(path: Path, subjects: Iterable[str], names: Iterable[str]) -> None:
    """Append a row for every held-out fault that has none.

    Args:
        path: Of the rows.
        subjects: Only these; all where there is none.
        names: Only these faults; all where there is none.
    """
    quiet()
    done = {row["entry"] for row in read(path)}
    for subject in (*STAGED, *PLAIN):
        left = [e for e in HELD.values() if e.subject == subject and e.name not in done]
        left = [e for e in left if not names or e.name in names]
        if not left or (subjects and subject not in subjects):
            continue
        explain = explainer(subject, DRAW)
        for entry in left:
            row = run(explain, entry)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), file=sys.stderr, flush=True)
            gc.collect()


def explainer(subject: str, draw: int) -> Explain:
    """Gives the check of a subject with a fault in it, at depth `cause`.

    Args:
        draw: Of a plain pipeline's weights and inputs.
    """
    return _staged(subject) if subject in STAGED else _plain(subject, draw)


def _staged(subject: str) -> Explain:
    bench = Bench.of(STAGED[subject], "float32")
    case = bench.subject.case(DRAWS[0], bench.dtype)

    def explain(plant: Plant) -> Comparison:
        pipe = bench.subject.load(DRAWS[0], bench.dtype)
        pipe = plant(pipe) or pipe
        checked = check_pipeline(pipe, bench.recording, case=case)
        if checked.verdict.passed:
            return checked
        return locate_module(pipe, bench.trusted, bench.recording, checked, explain=True)

    return explain


def _plain(subject: str, draw: int) -> Explain:
    family = SUBJECTS[subject]
    recording = record(family.build(draw), call=family.inputs(draw))

    def explain(plant: Plant) -> Comparison:
        pipe = family.build(draw)
        pipe = plant(pipe) or pipe
        return check(pipe, recording, depth="cause", trusted=family.build(draw))

    return explain


def run(explain: Explain, entry: Held) -> dict[str, Any]:
    """Plant a fault, and ask for its cause."""
    row: dict[str, Any] = {"subject": entry.subject, "entry": entry.name, "group": entry.group}
    start = time.perf_counter()
    with globals_restored():
        torch.manual_seed(0)
        checked = explain(entry.apply)
    row["seconds"] = round(time.perf_counter() - start, 2)
    if checked.verdict.passed:
        return {**row, "outcome": "without effect", "text": checked.verdict.value}
    first = checked.first_divergence
    cause = first.cause if first is not None else None
    named = (first.kind or "") if first is not None else ""
    kind = cause.kind if cause is not None else None
    if kind is None and named.startswith("called in another order"):
        kind = "order"
    return {
        **row,
        "outcome": outcome(entry, kind),
        "stage": first.stage if first is not None else None,
        "module": first.fqn if first is not None else None,
        "kind": kind,
        "text": cause.text if cause is not None else named,
        "tried": cause.tried if cause is not None else None,
        "notes": list(checked.notes),
    }


def outcome(entry: Held, kind: str | None) -> str:
    """Whether a kind of cause is one of the fault's."""
    if kind is None:
        return ABSTAINS
    return RIGHT if kind in entry.kinds else WRONG


def report(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown; rows are judged by the labels of now."""
    ran = [row for row in rows if row["outcome"] in COUNTED]
    counted = [{**row, "outcome": outcome(HELD[row["entry"]], row["kind"])} for row in ran]
    named = [row for row in counted if row["group"] != NO_CAUSE]
    other = [row for row in counted if row["group"] == NO_CAUSE]
    silent = [row["entry"] for row in rows if row["outcome"] == "without effect"]
    lines = [
        "# What is wrong, of faults that were held out",
        "",
        f"Of {len(named)} faults with a cause of the classes that are looked for, the first cause "
        f"named was right for {share(named, RIGHT)} and wrong for {share(named, WRONG)}; for "
        f"{share(named, ABSTAINS)} nothing was named. Of {len(other)} faults of which no such "
        f"cause is true, {share(other, WRONG)} were given one. The faults and their labels were "
        "written before the first of them was run, without a look at the causes. Written by "
        "`python -m bench.bench_causes --held-out`.",
        "",
        *_corrected(ran, counted),
        *_places(named),
        f"Without effect on the check, and not counted: {', '.join(silent) or 'none'}.",
        "",
        *counts("class", "group", list(dict.fromkeys(e.group for e in HELD.values())), counted),
        *counts("model", "subject", [*STAGED, *PLAIN], counted),
    ]
    unnamed = [row for row in named if row["outcome"] == ABSTAINS]
    for title, picked in (
        ("Wrong", [row for row in counted if row["outcome"] == WRONG]),
        ("Nothing named", unnamed),
        ("Right", [row for row in counted if row["outcome"] == RIGHT]),
        ("No cause is true, and none was named", [r for r in other if r["outcome"] == ABSTAINS]),
    ):
        lines += [f"## {title}", "", *_told(picked), ""]
    return "\n".join(lines)


def _corrected(ran: list[dict[str, Any]], counted: list[dict[str, Any]]) -> list[str]:
    """Which labels were mended after the run, and what the count was before."""
    pairs = list(zip(ran, counted, strict=True))
    mended = [was["entry"] for was, now in pairs if was["outcome"] != now["outcome"]]
    if not mended:
        return []
    before = [row for row in ran if row["group"] != NO_CAUSE]
    return [
        f"The labels of {len(mended)} faults lacked the kind that says their own words, since the "
        "names of kinds were not read beforehand (`addend missing`, `mask missing`): "
        f"{', '.join(mended)}. By the labels as they were frozen {share(before, RIGHT)} are right "
        f"and {share(before, WRONG)} wrong.",
        "",
    ]


def _places(named: list[dict[str, Any]]) -> list[str]:
    """The same by where a fault acts: causes are looked for in the first two alone."""
    inside, staged, plain = [], [], []
    for row in named:
        around = HELD[row["entry"]].apply.__module__.endswith("heldout_stages")
        (inside if not around else staged if row["subject"] in STAGED else plain).append(row)
    lines = ["| where it acts | faults | right | wrong | abstains |", "|---|---|---|---|---|"]
    for text, rows in (
        ("inside a model", inside),
        ("around it, in truestep's own runtime", staged),
        ("around it, in a plain pipeline", plain),
    ):
        cells = [str(sum(row["outcome"] == name for row in rows)) for name in COUNTED]
        lines.append(f"| {text} | {len(rows)} | {' | '.join(cells)} |")
    return [*lines, ""]


def counts(title: str, key: str, values: list[str], rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {title} | faults | right | wrong | abstains |", "|---|---|---|---|---|"]
    for value in values:
        own = [row["outcome"] for row in rows if row[key] == value]
        if own:
            cells = " | ".join(str(own.count(name)) for name in COUNTED)
            lines.append(f"| {value} | {len(own)} | {cells} |")
    return [*lines, ""]


def _told(rows: list[dict[str, Any]]) -> list[str]:
    """Each row: what is true, what was said, and a remark where that is not plainly right."""
    if not rows:
        return ["None."]
    told = any(row["entry"] in WHY for row in rows)
    heads = ["fault", "class", "what is true", "module", "what was said", *["remark"] * told]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        entry = HELD[row["entry"]]
        cells = [entry.name, entry.group, entry.truth, row["module"], row["text"]]
        cells += [WHY.get(entry.name, "")] * told
        texts = (" ".join(str(cell or "").split()).replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def share(rows: list[dict[str, Any]], wanted: str) -> str:
    count = sum(row["outcome"] == wanted for row in rows)
    return f"{count} ({count / max(len(rows), 1):.1%})"


def _line(row: dict[str, Any]) -> str:
    head = f"{row['subject']:8s} {row['entry']:38s} {row['outcome']:10s}"
    return f"{head} {row.get('kind') or '-'}: {row.get('text') or '-'} {row['seconds']}s"
