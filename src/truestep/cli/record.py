"""`truestep record`: seed or update the references of cases."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import (
    case_device_class,
    case_options,
    choose_cases,
    load_change,
    parse_changes,
    progress_bar,
    set_option,
)
from truestep.text import say


@click.command("record")
@case_options
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--output", type=click.Path(path_type=Path), help="Write one file instead.")
@click.option("--update", is_flag=True, help="Replace references that exist.")
@click.option(
    "--level",
    type=click.Choice(["full", "sketch", "stats"]),
    default="full",
    show_default=True,
    help="Keep tensors, 1,024 floats of each that tell how far another is, or moments only.",
)
@click.option(
    "--floor",
    type=click.Choice(["steps", "final", "none"]),
    default="steps",
    show_default=True,
    help="Noise floor to measure: of each stage, also of a free run, or none.",
)
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
def command(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    references: Path | None,
    output: Path | None,
    update: bool,
    level: str,
    floor: str,
    changes: tuple[str, ...],
    change: str | None,
) -> None:
    """Record a case as its reference: everything it computed, and its measured noise floor.

    CASES are names in the case file, case files, or one model together with --prompt; none is all.
    """
    from truestep.errors import UsageError
    from truestep.references.store import DEFAULT_ROOT, Store

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    if output is not None and len(cases) != 1:
        raise UsageError(f"--output takes one case, {len(cases)} were chosen")
    cases = {name: case.replace(**parse_changes(changes)) for name, case in cases.items()}
    store = Store(references or DEFAULT_ROOT)
    apply = load_change(change)
    if output is None and not update:
        for case in cases.values():  # before any compute is spent
            existing = [p for p in store.places() if (p.case_id, p.tier) == (case.id, tier)]
            for place in existing:
                if place.device_class == case_device_class(case):
                    store.refuse_existing(place, update=False)
    from truestep.recording.record import record
    from truestep.references.store import place_of

    for name, case in cases.items():
        with progress_bar() as progress:
            recording = record(
                case,
                path=output,
                level=level,  # type: ignore[arg-type]
                floor=floor,  # type: ignore[arg-type]
                apply=apply,
                progress=progress,
            )
        path = output or store.save(recording, place_of(recording, tier=tier), update=update)
        manifest = recording.manifest
        runs = len(manifest.noise_floor.runs) if manifest.noise_floor else 0
        say(
            f"RECORDED {name}: {len(manifest.tensors)} tensors, {manifest.forwards} forwards, "
            f"noise floor from {runs} benign runs"
        )
        say(f"reference: {path}")
