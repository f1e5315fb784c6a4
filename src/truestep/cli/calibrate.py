"""`truestep calibrate`: more benign runs for a reference's noise floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import chosen_or_recorded, find_reference
from truestep.cli.common import case_options, progress_bar
from truestep.text import say

if TYPE_CHECKING:
    from truestep.replay.calibration import Calibration


@click.command("calibrate")
@case_options
@click.option("--runs", type=click.IntRange(1, 2000), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Which changes are drawn.")
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--reference", type=click.Path(path_type=Path), help="One recording file.")
def command(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    runs: int,
    seed: int,
    references: Path | None,
    reference: Path | None,
) -> None:
    """Tighten a reference's noise floor: run harmless changes, measure the false alarms.

    Runs on the trusted side only: the model must still give what the reference holds. The benign
    runs are added to the reference; its tensors stay as they are.
    """
    from truestep.errors import UsageError
    from truestep.floors import NoiseFloor
    from truestep.recording.format import Recording
    from truestep.recording.store import DEFAULT_ROOT, Store, place_of
    from truestep.replay.calibration import calibrate
    from truestep.replay.check import check_pipeline
    from truestep.runtime.loading import load

    cases = chosen_or_recorded(
        names,
        reference=reference,
        references=references,
        case_file=case_file,
        prompt=prompt,
        tier=tier,
    )
    if reference is not None and len(cases) != 1:
        raise UsageError(f"--reference takes one case, {len(cases)} were chosen")
    for name, case in cases.items():
        path = reference or find_reference(name, case, references=references, tier=tier)
        recording = Recording.open(path)
        pipe = load(case)
        same = check_pipeline(pipe, recording, case=case)
        if not same.verdict.passed:
            raise UsageError(
                "the model does not give what its reference holds: it cannot calibrate it",
                where=str(path),
                measured=same.sentence,
                likely="another version of the model or of a library, or another machine",
                hint="truestep check CASE",
            )
        with progress_bar() as progress:
            found = calibrate(
                pipe,
                recording,
                recording.manifest.noise_floor or NoiseFloor(),
                runs=runs,
                seed=seed,
                progress=progress,
            )
        manifest = recording.manifest.model_copy(update={"noise_floor": found.floor})
        updated = Recording.in_memory(dict(recording), manifest)
        if reference is not None:
            updated.save(path)
        else:
            store = Store(references or DEFAULT_ROOT)
            path = store.save(updated, place_of(updated, tier=tier), update=True)
        say(f"CALIBRATED {name}: {found.added} benign runs added")
        _told(found)
        say(f"reference: {path}")


def _told(found: Calibration) -> None:
    from truestep.judge.rule import RATE

    say("  stage       runs  needed  floor    x floor  before  spread  outcomes")
    for row in found.stages:
        say(
            f"  {row.stage:<10}  {row.runs:4d}  {row.needed or '-':>6}  {row.floor:.1e}  "
            f"{row.bound:7.3g}  {row.before:6.3g}  {row.spread:6.0%}  {row.outcomes}"
        )
    say(
        f"  false alarms {found.flagged} of {found.added} benign runs, each judged by the "
        f"others: below {found.flagged_below:.1%} with 95 % confidence"
    )
    say(f"  bounds are made for 1 false alarm in {1 / RATE:,.0f} checks")
