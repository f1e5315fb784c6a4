"""`truestep record`: seed or update the references of cases."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import (
    case_device_class,
    case_options,
    changed_cases,
    choose_cases,
    end,
    load_change,
    progress_bar,
    set_option,
)
from truestep.cli.words import case_words, spelled
from truestep.text import say, visible

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.recording.format import Recording
    from truestep.recording.store import Place, Store


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
    Of several cases those that have a reference keep it, and the others are recorded; a single one
    that has one is an error. The last line is the command that checks against it.
    """
    from truestep.errors import TruestepError, UsageError
    from truestep.files import require_room
    from truestep.recording.format import WHAT
    from truestep.recording.store import DEFAULT_ROOT, Store, place_of

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    if output is not None and len(cases) != 1:
        raise UsageError(f"--output takes one case, {len(cases)} were chosen")
    cases = changed_cases(cases, changes)
    store = Store(references or DEFAULT_ROOT)
    apply = load_change(change)
    require_room(output or store.root / "reference", WHAT)  # before any compute is spent
    kept = {} if output or update else _existing(store, cases, tier)
    if len(cases) == 1:
        for place in kept.values():
            store.refuse_existing(place, update=False)
    broken = 0
    for name, case in cases.items():
        if name in kept:
            say(f"KEPT {name}: it has a reference, {store.root / kept[name].name}")
            continue
        try:
            recording = _recorded(case, output, level=level, floor=floor, apply=apply)
            path = output or store.save(recording, place_of(recording, tier=tier), update=update)
        except TruestepError as error:
            if len(cases) == 1:
                raise
            broken += 1  # one broken case must not cost the others' references
            text = f"{type(error).__name__}: {spelled(error, name)}"
            say(f"BROKEN {visible(name)}: {text}", err=True, lines=True)
            continue
        _told(name, recording, path)
        if level == "full":
            named = not (changes or output)
            words = (
                case_words(name, verb="check") if named else shlex.join(["--reference", str(path)])
            )
            say(f"check: truestep check {words}")
    end(2 if broken else 0)


def _existing(store: Store, cases: Mapping[str, Case], tier: str) -> dict[str, Place]:
    """The references that cases have on the device class they run on here."""
    places = [place for place in store.places() if place.tier == tier]
    found = {}
    for name, case in cases.items():
        for place in places:
            if (place.case_id, place.device_class) == (case.id, case_device_class(case)):
                found[name] = place
    return found


def _recorded(case: Case, output: Path | None, **options: Any) -> Recording:
    from truestep.replay.record import record

    with progress_bar() as progress:
        return record(case, path=output, progress=progress, **options)


def _told(name: str, recording: Recording, path: Path) -> None:
    manifest = recording.manifest
    runs = len(manifest.noise_floor.runs) if manifest.noise_floor else 0
    say(
        f"RECORDED {name}: {len(manifest.tensors)} tensors, {manifest.forwards} forwards, "
        f"noise floor from {runs} benign runs"
    )
    say(f"reference: {path}")
