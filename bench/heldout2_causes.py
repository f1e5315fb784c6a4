"""The second set of held-out faults under `--depth cause`: what is said of each, and the table.

The faults, what is true of them and how a text is judged were written down before any was run
(`faults.heldout2`): `python -m bench.heldout2_causes --output FOLDER [--subject NAME ...]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.bench_location import globals_restored
from bench.common import RESULTS, quiet, read
from bench.faults.heldout2_stages import HELD2, NO_CAUSE, PLAIN2, STAGED, Held2, judged
from bench.faults.heldout2_why import READ
from bench.heldout_causes import Explain, counts, explainer, share

COUNTED = ("right", "wrong", "abstains")
DRAW = 4
"""Of the plain pipelines' weights and inputs; no other benchmark uses it."""


def main() -> None:
    """Append a row for every fault that has none, and write the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", action="append", default=[], choices=(*STAGED, *PLAIN2))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="causes-heldout2", help="of the rows' file")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.output / f"{options.name}.jsonl"
    if not options.table:
        fill(path, options.subject or (*STAGED, *PLAIN2))
    (options.output / f"{options.name}.md").write_text(report(read(path)), encoding="utf-8")


def fill(path: Path, subjects: Iterable[str]) -> None:
    """Append a row for every held-out fault of the subjects that has none."""
    quiet()
    done = {row["entry"] for row in read(path)}
    for subject in subjects:
        left = [e for e in HELD2.values() if e.subject == subject and e.name not in done]
        if not left:
            continue
        explain = explainer(subject, DRAW)
        for entry in left:
            row = run(explain, entry)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            said = f"{row['outcome']:10s} {row.get('kind') or '-'}: {row.get('text') or '-'}"
            print(f"{entry.name:42s} {said} {row['seconds']}s", file=sys.stderr, flush=True)
            gc.collect()


def run(explain: Explain, entry: Held2) -> dict[str, Any]:
    """Plant a fault, and ask for its cause."""
    row: dict[str, Any] = {"subject": entry.subject, "entry": entry.name, "group": entry.group}
    start = time.perf_counter()
    with globals_restored():
        torch.manual_seed(0)
        try:
            checked = explain(entry.apply)
        except Exception as error:
            row["seconds"] = round(time.perf_counter() - start, 2)
            return {**row, "outcome": "failed", "text": f"{type(error).__name__}: {error}"}
    row["seconds"] = round(time.perf_counter() - start, 2)
    if checked.verdict.passed:
        return {**row, "outcome": "without effect", "text": checked.verdict.value}
    first = checked.first_divergence
    cause = first.cause if first is not None else None
    named = (first.kind or "") if first is not None else ""
    kind = cause.kind if cause is not None else None
    if kind is None and named.startswith("called in another order"):
        kind = "order"
    text = cause.text if cause is not None else named
    stage = first.stage if first is not None else ""
    mend = getattr(cause, "mend", None) or ""
    return {
        **row,
        "outcome": judged(entry, kind, f"{text} {mend}", stage),
        "stage": stage,
        "module": first.fqn if first is not None else None,
        "kind": kind,
        "text": text,
        "mend": mend,
        "tried": cause.tried if cause is not None else None,
        "notes": list(checked.notes),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    counted = [row for row in rows if row["outcome"] in COUNTED]
    named = [row for row in counted if row["group"] != NO_CAUSE]
    other = [row for row in counted if row["group"] == NO_CAUSE]
    lines = [
        "# What is wrong, of a second set of faults that were held out",
        "",
        f"Of {len(named)} faults the first cause named was right for {share(named, 'right')} and "
        f"wrong for {share(named, 'wrong')}; for {share(named, 'abstains')} nothing was named. "
        f"Of {len(other)} of which no cause is true, {share(other, 'wrong')} were given one. The "
        "faults, and how what is said of them is judged, were written before the first was run, "
        "without a look at the causes: inside a model by the kind of cause, around it by regular "
        "expressions that its text must hold. Written by `python -m bench.heldout2_causes`.",
        "",
        *_places(named),
        *_by_reading(named, other),
    ]
    for outcome in ("without effect", "failed"):
        silent = [row["entry"] for row in rows if row["outcome"] == outcome]
        lines += [f"Not counted, {outcome}: {', '.join(silent) or 'none'}.", ""]
    groups = list(dict.fromkeys(entry.group for entry in HELD2.values()))
    lines += counts("class", "group", groups, counted)
    lines += counts("model", "subject", [*STAGED, *PLAIN2], counted)
    for title, picked in (
        ("Wrong", [row for row in counted if row["outcome"] == "wrong"]),
        ("Nothing named", [row for row in named if row["outcome"] == "abstains"]),
        ("Right", [row for row in counted if row["outcome"] == "right"]),
        (
            "No cause is true, and none was named",
            [row for row in other if row["outcome"] == "abstains"],
        ),
    ):
        lines += [f"## {title}", "", *_told(picked), ""]
    return "\n".join(lines)


def _places(named: list[dict[str, Any]]) -> list[str]:
    """The counts by where a fault acts."""
    inside = [row for row in named if not HELD2[row["entry"]].says]
    around = [row for row in named if HELD2[row["entry"]].says]
    lines = ["| where it acts | faults | right | wrong | abstains |", "|---|---|---|---|---|"]
    for text, rows in (
        ("inside a model", inside),
        ("around it, own runtime", [row for row in around if row["subject"] in STAGED]),
        ("around it, a plain pipeline", [row for row in around if row["subject"] in PLAIN2]),
    ):
        cells = [str(sum(row["outcome"] == name for row in rows)) for name in COUNTED]
        lines.append(f"| {text} | {len(rows)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _by_reading(named: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    """The counts once more, where a reader's judgement replaces the frozen rule's."""
    read_named = [{**row, "outcome": _read(row)} for row in named]
    given = [row for row in other if row["outcome"] == "wrong"]
    false = [row for row in given if _read(row) == "wrong"]
    return [
        "Read against what is true, after the run, the texts of "
        f"{sum(_read(row) != row['outcome'] for row in named)} of these faults are judged otherwise"
        f" (remarks below): right {share(read_named, 'right')}, wrong "
        f"{share(read_named, 'wrong')}. Of the {len(given)} causes given where none is true "
        f"{len(false)} say something false.",
        "",
    ]


def _read(row: dict[str, Any]) -> str:
    outcome: str = READ.get(row["entry"], (row["outcome"], ""))[0]
    return outcome


def _told(rows: list[dict[str, Any]]) -> list[str]:
    """Each row: what is true, and what was said."""
    if not rows:
        return ["None."]
    heads = ["fault", "class", "what is true", "place", "kind", "what was said", "read"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        entry = HELD2[row["entry"]]
        place = row["module"] or row["stage"]
        said = f"{row['text'] or ''} {row.get('mend') or ''}"
        cells = [entry.name, entry.group, entry.truth, place, row["kind"], said]
        cells.append(": ".join(READ.get(entry.name, ("",))))
        texts = (" ".join(str(cell or "").split()).replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return lines


if __name__ == "__main__":
    main()
