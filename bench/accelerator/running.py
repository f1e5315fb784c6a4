"""Sections of the bench, one after the other: each has its share of the time, and fails alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.accelerator import faults, floors, memory, overhead, plans
from bench.accelerator.place import Budget, Here, environment, first_line
from bench.accelerator.table import markdown

Row = dict[str, Any]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Section:
    """A part of the bench.

    Attributes:
        rows: Gives its results, one after the other.
        share: Of the time, in proportion to the others.
        counts: What is to be said of all rows together.
    """

    rows: Callable[[Here, Budget], Iterator[Row]]
    share: float
    counts: Callable[[Sequence[Row]], Mapping[str, Any]] | None = None


SECTIONS: dict[str, Section] = {
    "floors": Section(floors.rows, 2.0),
    "plans": Section(plans.rows, 1.0),
    "overhead": Section(overhead.rows, 1.5),
    "memory": Section(memory.rows, 1.0),
    "faults": Section(faults.rows, 4.0, faults.counts),
    "compiled": Section(floors.compiled_rows, 1.5),
}
"""In order: what one leaves over is shared by those after it."""


def run(
    here: Here,
    output: Path,
    *,
    seconds: float,
    names: Sequence[str] = (),
    sections: Mapping[str, Section] = SECTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run sections, and write what is known after each.

    Args:
        here: The device.
        output: A folder; `accelerator.json` and `accelerator.md` are written into it.
        seconds: For all of them together.
        names: Those to run; all where there is none.
        sections: What there is.
        clock: Tells the time in seconds.

    Returns:
        What was written.
    """
    whole = Budget(seconds, clock)
    chosen = [name for name in sections if not names or name in names]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "bench": "accelerator",
        "device": here.device,
        "scale": "real width" if here.real else "tiny",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
        "environment": environment(here),
        "sections": {name: {"status": "not reached", "rows": []} for name in sections},
    }
    for name in sections:
        if name not in chosen:
            report["sections"][name]["status"] = "not asked for"
    output.mkdir(parents=True, exist_ok=True)
    _write(report, output)
    for at, name in enumerate(chosen):
        shares = sum(sections[each].share for each in chosen[at:])
        budget = whole.part(sections[name].share / shares)
        report["sections"][name] = _section(name, sections[name], here, budget)
        rest = chosen[at + 1 :]
        if rest and not here.answers():
            report["sections"] |= _by_another_process(rest, here, whole.left())
            rest = []
        report["seconds_taken"] = round(seconds - whole.left(), 1)
        _write(report, output)
        if not rest:
            break
        here.clear()
    return report


def _by_another_process(names: Sequence[str], here: Here, seconds: float) -> dict[str, Any]:
    """Sections run where the device answers: after some errors of a kernel, CUDA does nothing more
    in the process that made them."""
    print("the device does not answer: another process goes on", file=sys.stderr, flush=True)
    chosen = [word for name in names for word in ("--section", name)]
    with tempfile.TemporaryDirectory(prefix="bench-accelerator-") as folder:
        options = ["--device", here.device, "--output", folder, "--seconds", f"{seconds:.0f}"]
        command = [sys.executable, "-m", "bench.accelerator", *options, *chosen]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        try:
            text = (Path(folder) / "accelerator.json").read_text(encoding="utf-8")
        except OSError:
            why = f"another process ended with {done.returncode} and wrote nothing"
            return {name: {"status": "failed", "error": why, "rows": []} for name in names}
    sections: dict[str, Any] = json.loads(text)["sections"]
    return {name: {**sections[name], "by": "another process"} for name in names}


def _section(name: str, section: Section, here: Here, budget: Budget) -> dict[str, Any]:
    budget = Budget(budget.seconds, budget.clock)  # what it cuts is its own
    rows: list[Row] = []
    found: dict[str, Any] = {"allowed_s": round(budget.seconds, 1), "rows": rows}
    try:
        if budget.allows("all of it"):
            for row in section.rows(here, budget):
                rows.append(row)
                print(f"{name}: {_line(row)}", file=sys.stderr, flush=True)
    except Exception as error:  # whatever one raises, the others go on
        found["error"] = first_line(error)
        found["traceback"] = traceback.format_exc().splitlines()[-12:]
        print(f"{name}: FAILED: {found['error']}", file=sys.stderr, flush=True)
    failed = sum("failed" in row for row in rows)
    found |= {"seconds": round(budget.seconds - budget.left(), 1), "cuts": budget.cuts}
    found["status"] = (
        "failed"
        if "error" in found
        else f"{failed} failed" if failed else "cut" if budget.cuts else "done"
    )  # fmt: skip
    if section.counts is not None:
        found["counts"] = section.counts(rows)
    return found


def _line(row: Row) -> str:
    """A row without its samples."""
    return "  ".join(str(v) for k, v in row.items() if not k.endswith("_s") and v not in ("", []))


def _write(report: Mapping[str, Any], output: Path) -> None:
    text = json.dumps(report, indent=1) + "\n"
    (output / "accelerator.json").write_text(text, encoding="utf-8")
    (output / "accelerator.md").write_text(markdown(report), encoding="utf-8")
