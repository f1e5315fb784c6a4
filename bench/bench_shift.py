"""Ends of benign shifts, and of faults that move the end as far: which are told apart.

Every shift is run freely, and judged at `--depth final`. Where its end lies, faults are made as
small as it takes to end as far away (by free runs, in a search over their size), and judged
likewise. `python -m bench.bench_shift --runs 1000` goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, quiet
from bench.faults.draws import DRAWS, Draw
from bench.faults.shifts import FAULTS, SHIFTS
from bench.faults.subjects import Wan, subjects
from truestep.errors import TruestepError
from truestep.judge.shift import FAULTS as FAULTY
from truestep.measure.distance import distance
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.raised import raised
from truestep.replay.record import record_pipeline
from truestep.runtime.pipeline import generate
from truestep.verdict import Comparison, Verdict, detectable

SUBJECTS = ("digits", "tiny-wan2.1", "tiny-wan2.2", "tiny-cosmos")
DTYPES = ("float32", "bfloat16")
MATCHED = 1.5
"""A fault is of a shift's size where their ends are within this factor."""

TRIES = 12
STEPS = 8
EACH = 5
"""Shifts to a fault: they are run in turns, so that what is there at any time says something."""

Row = dict[str, Any]


class Bench:
    """Subjects, their recordings, and the runs that are done."""

    def __init__(self, output: Path, folder: Path) -> None:
        self.output, self.folder = output, folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = output.read_text().splitlines() if output.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]
        self.done = {row["name"] for row in self.rows}
        self._recordings: dict[str, Recording] = {}

    def recording(self, subject: Wan, draw: Draw, dtype: str, free: bool) -> Recording:
        """What is trusted, recorded once; `free` with a floor of free runs."""
        name = f"{subject.name}-{dtype}-{draw.seed}-{'final' if free else 'steps'}"
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            plain, case = subject.load(draw, dtype), subject.case(draw, dtype)
            record_pipeline(plain, case=case, floor="final" if free else "steps").save(path)
        if name not in self._recordings:
            self._recordings[name] = Recording.open(path)
        return self._recordings[name]

    def keep(self, row: Row) -> None:
        """Add a run to the file."""
        self.rows.append(row)
        self.done.add(row["name"])
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def places() -> Iterator[tuple[Wan, Draw, str]]:
    """Subjects, draws and precisions."""
    for draw in DRAWS:
        for subject in subjects(SUBJECTS):
            for dtype in DTYPES:
                if isinstance(subject, Wan):
                    short = {**subject.settings, "steps": STEPS}
                    yield replace(subject, settings=short), draw, dtype


@dataclass(frozen=True)
class Judged:
    """An end, judged alone, and by the stages at every step.

    Attributes:
        end: `check --depth final`, which looks at stages where the end is not within its floor.
        stages: What every stage shows.
        outcome: `fault`, `undecided` or `benign shift`, whatever the end's own floor says.
    """

    end: Comparison
    stages: Comparison
    outcome: str


def exact_end(place: tuple[Wan, Draw, str], change: Callable[[Any], None]) -> torch.Tensor:
    """The end of a free run in float64: what a change does, without rounding."""
    subject, draw, dtype = place
    pipe = subject.load(draw, dtype)
    change(pipe)
    with raised(pipe, "float64") as lifted:
        end = generate(lifted)
    assert isinstance(end, torch.Tensor)
    return end


def judged(
    bench: Bench, place: tuple[Wan, Draw, str], change: Callable[[Any], None], *, free: bool
) -> Judged:
    """The end and, whatever it shows, the stages at every step."""
    subject, draw, dtype = place
    recording = bench.recording(subject, draw, dtype, free)
    case = subject.case(draw, dtype)
    pipe = subject.load(draw, dtype)
    change(pipe)
    end = check_pipeline(pipe, recording, case=case, depth="final")
    stages = check_pipeline(pipe, recording, case=case, steps=tuple(range(STEPS)))
    return Judged(end, stages, end.shift.outcome if end.shift else by_stages(stages.verdict))


def by_stages(verdict: Verdict) -> str:
    """The outcome of an end that is within its floor."""
    if verdict in FAULTY:
        return "fault"
    return "benign shift" if verdict.passed else "undecided"


def told(name: str, found: Judged, **fields: Any) -> Row:
    """A line of the file."""
    row = found.end.rows[0]
    return {
        "name": name,
        **fields,
        "outcome": found.outcome,
        "end": found.end.verdict.value,
        "by its floor": found.end.shift is None,
        "stages": found.stages.verdict.value,
        "distance": row.metrics.rel_l2 if row.metrics else math.nan,
        "over": row.ratio,
        "seen from": detectable(found.stages.rows),
        "share": share_of_seed(found.end),
        "text": found.stages.sentence,
    }


def share_of_seed(result: Comparison) -> float | None:
    """The end's distance over that of another seed."""
    if result.shift is None:
        return None
    seeds = [rung.distance for rung in result.shift.rungs if rung.name == "other seed"]
    return result.shift.distance / seeds[0] if seeds else None


def run_shift(bench: Bench, number: int, place: tuple[Wan, Draw, str]) -> None:
    """One benign shift."""
    subject, draw, dtype = place
    kind = [*SHIFTS][number % len(SHIFTS)]
    name = f"shift/{kind}/{number}/{subject.name}/{dtype}/{draw.seed}"
    if name in bench.done:
        return
    torch._dynamo.reset()

    def change(pipe: Any) -> None:
        SHIFTS[kind](pipe, random.Random(number))

    result = judged(bench, place, change, free=number // len(SHIFTS) % 2 == 0)
    where = {"subject": subject.name, "dtype": dtype, "kind": kind}
    bench.keep(told(name, result, **where))


def run_fault(bench: Bench, number: int, place: tuple[Wan, Draw, str]) -> None:
    """A fault whose end is as far away as that of a shift that was run."""
    subject, draw, dtype = place
    kind = [*FAULTS][number % len(FAULTS)]
    name = f"fault/{kind}/{number}/{subject.name}/{dtype}/{draw.seed}"
    shifts = [
        row["distance"]
        for row in bench.rows
        if row["name"].startswith("shift/")
        and (row["subject"], row["dtype"]) == (subject.name, dtype)
        and row["distance"] > 0
    ]
    if name in bench.done or not shifts:
        return
    target = random.Random(number).choice(shifts)
    size, distance_found = matched(place, kind, target)
    free = number // len(FAULTS) % 2 == 0
    result = judged(bench, place, lambda pipe: FAULTS[kind](pipe, size), free=free)
    where = {"subject": subject.name, "dtype": dtype, "kind": kind}
    apart = abs(math.log(max(distance_found, 1e-30) / target))
    sized = {"target": target, "size": size, "alone": distance_found}
    sized |= {"matched": apart <= math.log(MATCHED)}
    bench.keep(told(name, result, **where, **sized))


def matched(place: tuple[Wan, Draw, str], kind: str, target: float) -> tuple[float, float]:
    """The size of a fault that by itself moves the end by `target`, and how far it moves it.

    By bisection on a logarithmic scale, without rounding; weights are rounded as they are stored.
    """
    reference = exact_end(place, lambda pipe: None)

    def reached(size: float) -> float:
        end = exact_end(place, lambda pipe: FAULTS[kind](pipe, size))
        return distance(end, reference).rel_l2

    low, high = math.log(1e-9), math.log(1.0)
    best = (1.0, math.inf)
    for _ in range(TRIES):
        middle = (low + high) / 2
        found = reached(math.exp(middle))
        if abs(math.log(max(found, 1e-30) / target)) < abs(math.log(max(best[1], 1e-30) / target)):
            best = (math.exp(middle), found)
        if 1 / MATCHED**0.5 < found / target < MATCHED**0.5:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return best


def table(rows: list[Row]) -> str:
    """The results in Markdown."""
    shifts = [row for row in rows if row["name"].startswith("shift/")]
    faults = [row for row in rows if row["name"].startswith("fault/") and row["matched"]]
    lines = ["# Shift or fault", "", *_HEAD, ""]
    lines += ["| | runs | called fault | undecided | at rounding |", "|---|---:|---:|---:|---:|"]
    for title, chosen in (("shifts", shifts), ("faults of their size", faults)):
        for dtype in DTYPES:
            own = [row for row in chosen if row["dtype"] == dtype]
            found = Counter(row["outcome"] for row in own)
            cells = (len(own), *(found[name] for name in ("fault", "undecided", "benign shift")))
            lines.append(f"| {title}, {dtype} | {' | '.join(map(str, cells))} |")
    lines += ["", *_spread(shifts, faults), "", *_gates(shifts, faults)]
    return "\n".join([*lines, "", *_kinds(shifts, faults)]) + "\n"


_HEAD = (
    "`python -m bench.bench_shift`: arithmetic of other kernels, in layers drawn by a seed, each",
    "run freely and judged at `--depth final`; and faults that by themselves, in float64, move the",
    "end as far as one of these shifts does. What stages show at every step decides. Half of the",
    "references have no floor of free runs (`record` without `--floor final`). Tiny random models",
    f"and the digits model, {STEPS} steps. In float32 a fault of that size is rounding itself:",
    "there shifts move the end by less than a fault would have to, and nothing is mistaken.",
)


def _spread(shifts: list[Row], faults: list[Row]) -> Iterator[str]:
    yield "| how far the end moves, rel_l2 | least | median | furthest |"
    yield "|---|---:|---:|---:|"
    for title, chosen, key in (("shifts", shifts, "distance"), ("faults alone", faults, "alone")):
        for dtype in DTYPES:
            far = sorted(row[key] for row in chosen if row["dtype"] == dtype)
            if far:
                numbers = (far[0], statistics.median(far), far[-1])
                yield f"| {title}, {dtype} | " + " | ".join(f"{n:.1e}" for n in numbers) + " |"
    shares = [row["share"] for row in shifts if row["share"] is not None]
    if shares:
        yield ""
        yield f"Furthest shift, as a share of another seed's distance: {max(shares):.2g}."


def _gates(shifts: list[Row], faults: list[Row]) -> Iterator[str]:
    """What a limit on the distance of the end does, at the level of the furthest shift."""
    yield "| a limit on the end's distance that no shift exceeds | faults of their size caught |"
    yield "|---|---:|"
    for dtype in DTYPES:
        own = [row["distance"] for row in shifts if row["dtype"] == dtype]
        against = [row["distance"] for row in faults if row["dtype"] == dtype]
        if own and against:
            caught = sum(distance > max(own) for distance in against)
            yield f"| {dtype}: {max(own):.1e} | {caught} of {len(against)} |"


def _kinds(shifts: list[Row], faults: list[Row]) -> Iterator[str]:
    yield "| kind | runs | called fault | undecided |"
    yield "|---|---:|---:|---:|"
    for title, chosen, names in (("", shifts, SHIFTS), ("fault: ", faults, FAULTS)):
        for kind, dtype in ((kind, dtype) for kind in names for dtype in DTYPES):
            own = [row for row in chosen if (row["kind"], row["dtype"]) == (kind, dtype)]
            found = Counter(row["outcome"] for row in own)
            cells = f"{len(own)} | {found['fault']} | {found['undecided']}"
            yield f"| {title}{kind}, {dtype} | {cells} |"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("build/shift.jsonl"))
    options = parser.parse_args()
    quiet()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.output, options.output.parent / "shift-recordings")
    every = [*places()]
    for number in range(max(options.runs, options.faults * EACH)):
        if number < options.runs:
            half = 2 * number // options.runs  # the other precision of each kind
            _tried(run_shift, bench, number, every[(number * 7 + half) % len(every)])
        if number % EACH == EACH - 1 and number // EACH < options.faults:
            fault, half = number // EACH, 2 * (number // EACH) // options.faults
            _tried(run_fault, bench, fault, every[(fault * 7 + half) % len(every)])
    (RESULTS / "shift.md").write_text(table(bench.rows))
    print(table(bench.rows))


def _tried(
    run: Callable[[Bench, int, tuple[Wan, Draw, str]], None],
    bench: Bench,
    number: int,
    place: tuple[Wan, Draw, str],
) -> None:
    try:
        run(bench, number, place)
    except TruestepError as error:
        print(f"{run.__name__} {number}: {error}")


if __name__ == "__main__":
    main()
