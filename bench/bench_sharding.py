"""Ports sharded over ranks of gloo: right splits, and planted faults named at their collective.

    python -m bench.bench_sharding [--world N] [--only TEXT] [--output bench/results/sharding.md]

One JSON line a run; the table is written when all have run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.sharding.corpus import DTYPES, PORT, Fault, faulty, is_named, make, reference, right
from truestep.engines.named import run_of
from truestep.engines.ranks.checking import check_paths, gathered_from
from truestep.engines.ranks.files import files_of
from truestep.engines.ranks.locating import locate
from truestep.engines.run import Run
from truestep.engines.running import run_engine
from truestep.engines.trusted import Trusted
from truestep.engines.watch.request import Looked
from truestep.errors import TruestepError

WORLDS = (2, 4)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        for world in options.world or WORLDS:
            faults = faulty(world)
            cases = [*right(world), *faults]
            cases = [case for case in cases if not options.only or options.only in case]
            for case, path in recorded(folder, world, cases).items():
                row = judged(folder, case, path, world, faults.get(case))
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.output:
        Path(options.output).write_text(table(rows), encoding="utf-8")
    return 0 if all(row["right"] for row in rows) else 1


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Judge sharded ports.")
    parser.add_argument("--world", type=int, action="append", choices=WORLDS)
    parser.add_argument("--only", default="", help="Cases that have this in their name.")
    parser.add_argument("--output", default="")
    return parser.parse_args()


def recorded(folder: Path, world: int, cases: Sequence[str]) -> dict[str, Path]:
    """Run cases as generations of one program; returns the first rank's recording of each."""
    if not cases:
        return {}
    output = folder / f"on-{world}" / "run.safetensors"
    output.parent.mkdir()
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    program = [torchrun, "--nproc-per-node", str(world), str(PORT), str(folder), *cases]
    ran = run_engine(program, output, inside=Looked())
    if ran.code or ran.failures:
        raise RuntimeError(f"the port ended with {ran.code}: {ran.failures}")
    numbers = ["", *(f".{number}" for number in range(2, len(cases) + 1))]
    paths = [output.with_name(f"run.rank0{number}.safetensors") for number in numbers]
    return dict(zip(cases, paths, strict=True))


def judged(folder: Path, case: str, path: Path, world: int, fault: Fault | None) -> dict[str, Any]:
    """The verdict on one case, and whether it is what it should be."""
    kind, name, inputs, dtype = case.split("/")
    row: dict[str, Any] = {"ranks": world, "kind": kind, "fault": name}
    row |= {"inputs": inputs, "dtype": dtype}
    known = run_of(reference(folder, inputs, dtype))
    try:
        result = check_paths([path], folder / "wan", reference=known)
    except TruestepError as error:
        return {**row, "verdict": "error", "right": False, "notes": [str(error)]}
    first = result.first_divergence
    found = result.verdict.value in ("drifted", "invalid")
    row |= {"verdict": result.verdict.value, "at": first.name if first else ""}
    row["found"] = found
    row["named"] = is_named(fault, result.notes) if fault else None
    row["right"] = found if fault else result.verdict.passed
    if not fault:
        inside = inner(folder, path, known)
        row |= {"inside": inside, "right": row["right"] and not inside}
    told = ("ranks:", "first wrong", "the collective", "no collective", "not located")
    row["notes"] = [note for note in result.notes if note.startswith(told)]
    return row


def inner(folder: Path, path: Path, known: Run) -> list[str]:
    """Of a right split, what is said to be wrong inside of its predictions all the same."""
    gathered = gathered_from(files_of([path]), folder / "wan", known)
    trusted = Trusted(folder / "wan", gathered.run.dtype)
    told = []
    for step in gathered.run.steps:
        for one in step.passes:
            located = locate(gathered, known, trusted, step.number, one.branch)
            told += located.notes() if located else []
    return told


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    faults = [row for row in rows if row["fault"] != "none"]
    others = [row for row in rows if row["fault"] == "none"]
    found = sum(bool(row.get("found")) for row in faults)
    named = sum(bool(row.get("named")) for row in faults)
    passed = sum(row["right"] for row in others)
    lines = [
        "# Sharded ports",
        "",
        "`make bench-sharding`: a tiny Wan on 2 and 4 ranks of gloo, sharded by plain torch and by "
        "diffusers' own context parallelism.",
        "",
        f"- **{found} of {len(faults)}** planted faults found, **{named}** named at the collective "
        "or where one is missing.",
        f"- **{passed} of {len(others)}** right splits pass "
        f"({', '.join(sorted({row['kind'] for row in others}))}; even and uneven lengths; "
        f"{' and '.join(DTYPES)}); "
        f"{sum(row['verdict'] in ('drifted', 'invalid') for row in others)} accused.",
        "",
        "| ranks | split | fault | verdict | first seam | named | what is said |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in faults:
        told = [note for note in row["notes"] if not note.startswith("ranks:")]
        said = "; ".join(told).replace("|", "/")
        named_so = "yes" if row.get("named") else "no"
        cells = [row["ranks"], row["kind"], row["fault"], row["verdict"], row.get("at", "")]
        lines.append(f"| {' | '.join(map(str, cells))} | {named_so} | {said} |")
    lines += ["", "| ranks | right split | inputs | dtype | verdict |", "|---|---|---|---|---|"]
    for row in others:
        cells = [row[key] for key in ("ranks", "kind", "inputs", "dtype", "verdict")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
