"""`truestep demo`: the main job, told on the builtin model with numbers measured here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.screen import aligned, facts, rows
from truestep.text import quoted, say

if TYPE_CHECKING:
    from truestep.demo import Outcome


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the video, the reference and the report.",
)
def command(output: Path) -> None:
    """Record a reference, try two harmless changes and three port bugs, write a report and a video.

    Every number is measured on this machine while you wait.
    """
    from truestep.cli.common import end, print_screen, progress_bar

    start = time.perf_counter()
    say("loading torch, diffusers and the builtin digits model ...", err=True)
    from truestep import demo
    from truestep.replay.record import record_pipeline
    from truestep.report import html
    from truestep.runtime.loading import load

    output.mkdir(parents=True, exist_ok=True)
    pipe = load(demo.CASE)
    _tell("1  generate: a text-to-video model trained on real handwritten digits")
    _tell(f"   video: {demo.write_clips(output, pipe)}  ({', '.join(demo.PROMPTS)})")

    _tell(f"2  record a trusted run: {demo.CASE.prompt!r}, {demo.CASE.steps} steps")
    with progress_bar() as progress:
        recording = record_pipeline(pipe, case=demo.CASE, progress=progress)
    path = output / "reference.safetensors"
    recording.save(path)
    floor = recording.manifest.noise_floor
    runs = [run for run in floor.runs if run.pair == "float32/float32"] if floor else []
    worst = max(m.rel_l2 for run in runs for m in run.tensors)
    _tell(
        f"   noise floor: {len(runs)} harmless runs ({', '.join(sorted({r.kind for r in runs}))}), "
        f"largest rel_l2 {worst:.1e}"
    )
    _tell(f"   reference: {path}")

    _tell("3  change something, and ask: is it still the same model?")
    outcomes = []
    for change in demo.changes():
        outcome = demo.try_change(change, pipe, recording)
        outcomes.append(outcome)
        _tell("   " + "  ".join(_cells(outcome)))

    report = output / "report.html"
    html.write_many(report, [outcome.comparison for outcome in outcomes])
    bugs = [o for o in outcomes if not o.change.harmless]
    caught = sum(o.comparison.verdict.exit_code == 1 for o in bugs)
    fine = [o for o in outcomes if o.change.harmless]
    accepted = sum(o.comparison.verdict.passed for o in fine)
    missed = sum(o.gate.passed is True for o in bugs)
    costs = [o.comparison.cost.share for o in outcomes if o.comparison.cost]
    head = ("change", "truestep", "seen in", "x floor", "cosine")
    print_screen(
        f"truestep caught {caught} of {len(bugs)} port bugs and accepted {accepted} of {len(fine)} "
        f"harmless changes; the cosine gate (5e-3, 1e-2) let {missed} of {len(bugs)} bugs pass",
        rows(aligned([head, *map(_summed, outcomes)], left=(0, 1, 2, 4))),
        facts([("cost", f"{min(costs):.0%} to {max(costs):.0%} of a generation's forwards each")]),
        ending=[f"report: {report}", f"repeat: truestep demo --output {quoted(str(output))}"],
    )
    say(f"{time.perf_counter() - start:.0f} s", err=True)
    end(0 if caught == len(bugs) and accepted == len(fine) else 1)


def _tell(line: str) -> None:
    """What is being done, while one waits."""
    say(line, err=True)


def _summed(outcome: Outcome) -> tuple[str, ...]:
    """A row as short as the names of the changes let it be; what is left out was told above."""
    *told, gate = _cells(outcome)
    return (*told, gate.partition(" ")[0])


def _cells(outcome: Outcome) -> tuple[str, ...]:
    """A row of the table: what was changed, and what truestep and the gate say of it."""
    comparison, gate = outcome.comparison, outcome.gate
    first = comparison.first_divergence
    ratios = [row.ratio for row in comparison.rows if row.ratio is not None]
    place = "-"
    if first is not None:
        step = f", step {first.step}" if first.step is not None else ""
        place = f"{first.stage}{step}"
    verdict = "passes" if gate.passed else "fails"
    distance = gate.metrics["full_cosine_distance"]
    worst = f"{max(ratios, default=0.0):.3g}"
    told = (outcome.change.name, comparison.verdict.value, place, worst)
    return (*told, f"{verdict} ({distance:.1e})")
