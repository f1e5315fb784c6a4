"""Where is a trainer not the model that inference runs? Faults of a training step, and twins.

Every fault is planted in one step of training of a tiny transformer; `check_training` has to fail,
and to name the module (or the part of the trainer's own code) that it was planted in.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, read
from bench.faults.training import FAULTS, SUBJECTS, TWINS, Planted, build, entries
from truestep import Recording, check_training, record_training
from truestep.verdict import Comparison


def main() -> None:
    """Fill `training.jsonl`, and write `training.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.output / "training.jsonl"
    done = {row["entry"] for row in read(path)}
    references: dict[str, Recording] = {}
    for entry in entries():
        if entry.name in done or (options.entry and entry.name not in options.entry):
            continue
        if entry.subject not in references:
            references[entry.subject] = record_training(partial(build, None, entry.subject))
        row = {"entry": entry.name, **run(entry, references[entry.subject])}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    (options.output / "training.md").write_text(report(read(path)), "utf-8")


def run(entry: Planted, reference: Recording) -> dict[str, Any]:
    """Check a trainer with a fault, or a twin."""
    start = time.perf_counter()
    checked = check_training(partial(build, entry, entry.subject), reference)
    first = checked.first_divergence
    return {
        "subject": entry.subject,
        "verdict": checked.verdict.value,
        "exit_code": checked.exit_code,
        "named": named(entry, checked),
        "stage": first.stage if first else "",
        "module": (first.fqn or "") if first else "",
        "said": "; ".join(p for p in (first.kind, first.operator) if p) if first else "",
        "sentence": checked.sentence,
        "seconds": round(time.perf_counter() - start, 2),
    }


def named(entry: Planted, checked: Comparison) -> bool:
    """Whether the place is that of the fault, and what is said of it the fault's."""
    first = checked.first_divergence
    if first is None or not entry.stage:
        return False
    said = f"{first.kind} {first.operator} {checked.sentence}"
    placed = first.stage == entry.stage and (not entry.module or first.fqn == entry.module)
    return placed and entry.word in said


def report(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    by_name = {row["entry"]: row for row in rows}
    faults = [by_name[e.name] for e in FAULTS if e.name in by_name]
    twins = [by_name[e.name] for e in TWINS if e.name in by_name]
    alone = {entry.name for entry in FAULTS if entry.backward}
    backward = [row for row in faults if row["entry"] in alone]

    def count(listed: list[dict[str, Any]]) -> str:
        found = sum(row["exit_code"] == 1 for row in listed)
        return f"{found} of {len(listed)} found, {sum(row['named'] for row in listed)} named"

    accused = sum(row["exit_code"] != 0 for row in twins)
    lines = [
        "# A training step",
        "",
        f"Of faults of the gradient alone, under a right loss and forward: {count(backward)}. "
        f"Of all faults: {count(faults)}. Of {len(twins)} harmless twins {accused} accused. "
        f"Subjects: {', '.join(SUBJECTS)}, a tiny Flux transformer in float32 on a CPU; the "
        "faults and what has to be said of each are declared in `bench/faults/training.py`.",
        "",
        "| fault | subject | backward alone | found | named | where | what is said |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in faults:
        marks = ["yes" if flag else "no" for flag in (row["exit_code"] == 1, row["named"])]
        where = row["module"] or row["stage"]
        only = "yes" if row["entry"] in alone else "no"
        cells = (row["entry"], row["subject"], only, *marks, where, _cell(row["said"]))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| twin | subject | verdict | what is said |", "|---|---|---|---|"]
    for row in twins:
        cells = (row["entry"], row["subject"], row["verdict"], _cell(row["sentence"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
