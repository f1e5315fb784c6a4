"""Run the corpus of many families under truestep's check: every fault and harmless twin.

    python -m bench.bench_families [--subject NAME] [--entry NAME] [--dtype DTYPE] [--output FOLDER]

Writes one JSON line a run to `families.jsonl` as it goes, and goes on where a killed run stopped;
then `bench.families_report` writes the table. A draw is a seed of weights, inputs and prompt:
subjects take turns at three of them, or have their twins planted on every draw (--every-draw).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, quiet, read
from bench.families_report import write
from truestep.errors import TruestepError
from truestep.testing import corpus

DRAWS = 3
DTYPES = ("float32", "bfloat16")


def main() -> None:
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "families.jsonl"
    quiet()
    torch.set_num_threads(1)
    done = {_key(row) for row in read(path)}
    for subject, entry, draw, dtype in plan(options):
        row = {"subject": subject.name, "entry": entry.name, "draw": draw, "dtype": dtype}
        if _key(row) in done:
            continue
        start = time.process_time()
        row.update(outcome(subject, entry, draw, dtype))
        row["seconds"] = round(time.process_time() - start, 2)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(_line(row), file=sys.stderr, flush=True)
    if options.report:
        write(read(path), options.output)


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Run the corpus of families.")
    parser.add_argument("--subject", action="append", default=[])
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPES)
    parser.add_argument("--every-draw", action="store_true", help="every twin on every draw")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-report", dest="report", action="store_false")
    return parser.parse_args()


def plan(options: Any) -> Iterator[tuple[corpus.Subject, corpus.Entry, int, str]]:
    """Every run, those of one subject, draw and precision in a row: they share a recording."""
    for dtype in options.dtype or DTYPES:
        for index, name in enumerate(corpus.subjects()):
            if options.subject and name not in options.subject:
                continue
            for draw in range(DRAWS):
                for subject, entry in corpus.pairs(name):
                    every = options.every_draw and entry.kind == "twin"
                    named = not options.entry or entry.name in options.entry
                    if named and (every or draw == index % DRAWS):
                        yield subject, entry, draw, dtype


def outcome(subject: corpus.Subject, entry: corpus.Entry, draw: int, dtype: str) -> dict[str, Any]:
    """What a run gives, as JSON; of one that cannot be made, why."""
    try:
        result = corpus.run(corpus.TRUESTEP, subject, entry, draw=draw, dtype=dtype)
    except corpus.NotApplicable as error:
        return {"kind": entry.kind, "not_applicable": str(error)}
    except TruestepError as error:
        return {"kind": entry.kind, "refused": error.what}
    row = dataclasses.asdict(result)
    return {**row, "effect": row["effect"] if math.isfinite(row["effect"]) else "inf"}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("subject", "entry", "draw", "dtype"))


def _line(row: dict[str, Any]) -> str:
    head = f"{row['subject']:14s} {row['dtype']:8s} {row['draw']} {row['entry']:32s}"
    if "not_applicable" in row:
        return f"{head} not applicable: {row['not_applicable']}"
    if "refused" in row:
        return f"{head} REFUSED: {row['refused']}"
    named = {True: "named", False: "WRONG PLACE", None: ""}[row["named"]]
    verdict = "passed" if row["passed"] else "caught"
    return f"{head} {float(row['effect']):8.1e} {verdict} {named:11s} {row['place']}"


if __name__ == "__main__":
    main()
