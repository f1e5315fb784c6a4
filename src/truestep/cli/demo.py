"""`truestep demo`: the main job, told on the builtin model with numbers measured here."""

from __future__ import annotations

import time
from pathlib import Path

import click

from truestep.text import say


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
    from truestep.cli.common import end, progress_bar

    start = time.perf_counter()
    say("loading torch, diffusers and the builtin digits model ...", err=True)
    from truestep import demo
    from truestep.replay.record import record_pipeline
    from truestep.report import html
    from truestep.runtime.loading import load

    output.mkdir(parents=True, exist_ok=True)
    pipe = load(demo.CASE)
    say("1  generate: a text-to-video model trained on real handwritten digits")
    say(f"   video: {demo.write_clips(output, pipe)}  ({', '.join(demo.PROMPTS)})")

    say(f"2  record a trusted run: {demo.CASE.prompt!r}, {demo.CASE.steps} steps")
    with progress_bar() as progress:
        recording = record_pipeline(pipe, case=demo.CASE, progress=progress)
    path = output / "reference.safetensors"
    recording.save(path)
    floor = recording.manifest.noise_floor
    runs = [run for run in floor.runs if run.pair == "float32/float32"] if floor else []
    worst = max(m.rel_l2 for run in runs for m in run.tensors)
    say(
        f"   noise floor: {len(runs)} harmless runs ({', '.join(sorted({r.kind for r in runs}))}), "
        f"largest rel_l2 {worst:.1e}"
    )
    say(f"   reference: {path}")

    say("3  change something, and ask: is it still the same model?")
    header = ("change", "truestep", "first seen in", "x floor", "usual cosine gate")
    say("   {:<30} {:<11} {:<20} {:>8}   {}".format(*header))
    outcomes = []
    for change in demo.changes():
        outcome = demo.try_change(change, pipe, recording)
        outcomes.append(outcome)
        say("   " + _line(outcome))

    report = output / "report.html"
    html.write_many(report, [outcome.comparison for outcome in outcomes])
    bugs = [o for o in outcomes if not o.change.harmless]
    caught = sum(o.comparison.verdict.exit_code == 1 for o in bugs)
    fine = [o for o in outcomes if o.change.harmless]
    accepted = sum(o.comparison.verdict.passed for o in fine)
    missed = sum(o.gate.passed is True for o in bugs)
    costs = [o.comparison.cost.share for o in outcomes if o.comparison.cost]
    say()
    say(
        f"truestep caught {caught} of {len(bugs)} port bugs and accepted {accepted} of {len(fine)} "
        f"harmless changes, each at {min(costs):.0%} to {max(costs):.0%} of a generation's "
        f"forwards; the cosine gate (5e-3, 1e-2) let {missed} of {len(bugs)} bugs pass."
    )
    say(f"report: {report}")
    say(f"repeat: truestep demo --output {output}")
    say(f"{time.perf_counter() - start:.0f} s", err=True)
    end(0 if caught == len(bugs) and accepted == len(fine) else 1)


def _line(outcome: object) -> str:
    from truestep.demo import Outcome

    assert isinstance(outcome, Outcome)
    comparison, gate = outcome.comparison, outcome.gate
    first = comparison.first_divergence
    ratios = [row.ratio for row in comparison.rows if row.ratio is not None]
    place = "-"
    if first is not None:
        step = f", step {first.step}" if first.step is not None else ""
        place = f"{first.stage}{step}"
    verdict = "passes" if gate.passed else "fails"
    distance = gate.metrics["full_cosine_distance"]
    return "{:<30} {:<11} {:<20} {:>8}   {} ({:.1e})".format(
        outcome.change.name,
        comparison.verdict.value,
        place,
        f"{max(ratios, default=0.0):.3g}",
        verdict,
        distance,
    )
