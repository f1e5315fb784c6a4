"""What is wrong, in one line: is the cause that a check names the fault that was planted?

Every fault that acts inside a model is planted in diffusers' models and in a port of one; `--depth
cause` then names a cause or abstains. Labels are declared with the faults (`faults/causes.py`).
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

from bench import heldout_causes
from bench.bench_location import SAME, Bench, globals_restored
from bench.common import RESULTS, read
from bench.faults.causes import LABELS, OF_STAGES
from bench.faults.draws import DRAWS
from bench.faults.entry import Fault, NotApplicable
from bench.faults.heldout_stages import PLAIN, STAGED
from bench.faults.port import PORTED
from bench.faults.registry import FAULTS
from truestep.replay.check import check_pipeline
from truestep.replay.locating import locate_module

SUBJECTS = ("tiny-wan2.1", "tiny-wan2.2-5b", "digits", "tiny-wan2.2", "tiny-cosmos")
PORT = "renamed, fused"
ALL = {**LABELS, **OF_STAGES}
RIGHT, WRONG, ABSTAINS = "right", "wrong", "abstains"


def main() -> None:
    """Fill `causes.jsonl`, and write `causes.md`; those held out have files of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = dict.fromkeys((*SUBJECTS, *STAGED, *PLAIN))
    parser.add_argument("--subject", action="append", default=[], choices=choices)
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--held-out", action="store_true", help="faults no cause was made for")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.held_out:
        _held_out(options)
        return
    path = options.output / "causes.jsonl"
    rows = read(path)
    done = {(row["subject"], row["port"], row["entry"]) for row in rows}
    for name in options.subject or SUBJECTS:
        bench = None
        for port, entry in _entries(options.entry):
            if (name, port, entry.name) in done:
                continue
            bench = bench or Bench.of(name, "float32")
            row = {"subject": name, "port": port, "entry": entry.name, **run(bench, entry)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), file=sys.stderr, flush=True)
            gc.collect()
    (options.output / "causes.md").write_text(report(read(path)), "utf-8")


def _held_out(options: argparse.Namespace) -> None:
    """Fill `causes-heldout.jsonl`, and write `causes-heldout.md`."""
    path = options.output / "causes-heldout.jsonl"
    heldout_causes.fill(path, options.subject, options.entry)
    text = heldout_causes.report(read(path))
    (options.output / "causes-heldout.md").write_text(text, "utf-8")


def _entries(names: Iterable[str]) -> list[tuple[str, Fault]]:
    every = [(SAME, FAULTS[name]) for name in ALL]
    every += [(PORT, PORTED[name]) for name in LABELS if name in PORTED]
    return [(port, entry) for port, entry in every if not names or entry.name in names]


def run(bench: Bench, entry: Fault) -> dict[str, Any]:
    """Plant a fault, and ask for its cause."""
    case = bench.subject.case(DRAWS[0], bench.dtype)
    with globals_restored():
        torch.manual_seed(0)
        try:
            pipe = bench.subject.load(DRAWS[0], bench.dtype)
            pipe = entry.apply(pipe) or pipe
        except (NotApplicable, AttributeError, KeyError) as error:
            return {"outcome": "not applicable", "text": str(error)}
        checked = check_pipeline(pipe, bench.recording, case=case)
        if checked.verdict.passed:
            return {"outcome": "without effect", "text": checked.verdict.value}
        start = time.perf_counter()
        checked = locate_module(pipe, bench.trusted, bench.recording, checked, explain=True)
    first = checked.first_divergence
    cause = first.cause if first is not None else None
    named = first.kind or "" if first is not None else ""
    return {
        "outcome": outcome(entry.name, cause.kind if cause is not None else None, named),
        "module": first.fqn if first is not None else None,
        "kind": cause.kind if cause is not None else None,
        "text": cause.text if cause is not None else named,
        "tried": cause.tried if cause is not None else None,
        "seconds": round(time.perf_counter() - start, 2),
    }


def outcome(entry: str, kind: str | None, named: str) -> str:
    """Whether a cause is the fault's; calls in another order are named without a hypothesis."""
    if kind is None and named.startswith("called in another order"):
        kind = "order"
    if kind is None:
        return ABSTAINS
    return RIGHT if kind in ALL[entry] else WRONG


def report(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    counted = [row for row in rows if row["outcome"] in (RIGHT, WRONG, ABSTAINS)]
    share = {
        name: sum(row["outcome"] == name for row in counted) for name in (RIGHT, WRONG, ABSTAINS)
    }
    total = max(len(counted), 1)
    lines = [
        "# What is wrong, in one line",
        "",
        f"Of {len(counted)} faults planted inside models, the cause was named rightly for "
        f"{share[RIGHT]} ({share[RIGHT] / total:.1%}) and wrongly for {share[WRONG]} "
        f"({share[WRONG] / total:.1%}); for {share[ABSTAINS]} nothing was named. A fault counts "
        "once for every model and port; the labels are declared with the corpus.",
        "",
        "| model | port | faults | right | wrong | abstains |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["subject"], row["port"]) for row in counted):
        own = [row["outcome"] for row in counted if (row["subject"], row["port"]) == key]
        cells = " | ".join(str(own.count(name)) for name in (RIGHT, WRONG, ABSTAINS))
        lines.append(f"| {key[0]} | {key[1]} | {len(own)} | {cells} |")
    lines += ["", "## Every fault", "", "<details><summary>All rows</summary>", ""]
    lines += ["| fault | model | port | outcome | module | cause |", "|---|---|---|---|---|---|"]
    for row in counted:
        cells = [
            row["entry"],
            row["subject"],
            row["port"],
            row["outcome"],
            row["module"],
            row["text"],
        ]
        texts = (" ".join(str(cell or "").split()).replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join([*lines, "", "</details>", ""])


def _line(row: dict[str, Any]) -> str:
    head = f"{row['subject']:15s} {row['port']:14s} {row['entry']:32s} {row['outcome']:10s}"
    return f"{head} {row.get('kind') or '-'}: {row.get('text') or '-'} {row.get('seconds', '')}s"


if __name__ == "__main__":
    main()
