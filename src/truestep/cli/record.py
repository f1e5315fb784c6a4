"""`truestep record`: seed or update the references of cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.cases import (
    Words,
    any_or_recorded,
    case_device_class,
    changed_cases,
    choose_any,
    of_calls,
)
from truestep.cli.common import (
    Told,
    case_options,
    end,
    from_disk_option,
    load_change,
    low_memory_option,
    numbers,
    progress_bar,
    set_option,
    subject_options,
    verbose,
    verbose_option,
)
from truestep.cli.words import case_words, spelled
from truestep.text import pasteable, say, visible

if TYPE_CHECKING:
    from truestep.case import AnyCase
    from truestep.errors import TruestepError
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Keep
    from truestep.recording.store import Place, Store


@click.command("record")
@case_options
@subject_options
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Record the case of this recording again: with --update in its place, or to --output.",
)
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
@click.option(
    "--keep",
    metavar="all|I,J,...",
    default="",
    help="Keep every step, or these beside those that a check reads: first, three in a row, last.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what it would take: memory, time and bytes; nothing is computed.",
)
@from_disk_option
@low_memory_option
@click.option(
    "--resume/--no-resume",
    help="Go on from the last benign run that a record which was stopped has finished.",
)
@click.option(
    "--runs",
    type=click.IntRange(1, 2000),
    metavar="N",
    help="Add N benign runs to the noise floor, of references that are there too, and measure the "
    "false alarms: a tighter floor sees smaller faults.",
)
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@verbose_option
def command(  # 23 parameters, long: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    inputs: tuple[str, ...],
    loras: tuple[str, ...],
    prepare: str | None,
    pipeline: str | None,
    subject: str | None,
    references: Path | None,
    reference: Path | None,
    output: Path | None,
    update: bool,
    level: str,
    floor: str,
    keep: str,
    dry_run: bool,
    from_disk: bool,
    low_memory: bool,
    resume: bool,
    runs: int | None,
    changes: tuple[str, ...],
    change: str | None,
) -> None:
    """Record a case as its reference: everything it computed, and its measured noise floor.

    CASES are names in the case file, case files, or one model together with --prompt; none is all.
    A model is the folder or hub id of any diffusers pipeline; --set and --input give its call other
    arguments. Of several cases those that have a reference keep it, and the others are recorded; a
    single one that has one is an error. What is finished is kept until all is: --resume goes on
    with a record that was stopped. The last line is the command that checks against it.
    """
    from truestep.cli.dry_run import Written, foresee
    from truestep.cli.dry_run import dry_run as tell
    from truestep.errors import TruestepError
    from truestep.files import require_room
    from truestep.recording.format import WHAT
    from truestep.recording.store import DEFAULT_ROOT, Store, is_draft

    root = references or DEFAULT_ROOT
    words = Words(names, case_file, tier, prompt, pipeline, subject, inputs, root, loras, prepare)
    cases, output = _chosen(words, changes, reference, output, update=update)
    weights = {"from_disk": from_disk, "low_memory": low_memory}
    options = _options(level=level, floor=floor, keep=keep, apply=change, **weights)
    written = Written(output or root, options["keep"], options["floor"], level == "full")
    if dry_run:
        end(tell(cases, "record", written, change=change, **weights))
    require_room(output or root / "reference", WHAT)  # before any compute is spent
    kept = {} if output or update else _existing(Store(root), cases, tier, refuse=runs is None)
    saving, broken = _Saving(Store(root), output, tier, update, resume, told := Told()), 0
    for name, case in cases.items():
        if saving.keeps(name, case, kept, runs):
            continue
        try:
            foresee(name, case, written, **weights)
            recording, path = saving.recorded(case, **options)
        except TruestepError as error:
            if len(cases) == 1:
                raise
            broken += 1  # one broken case must not cost the others' references
            _say_broken(name, error)
            continue
        known = not output and not is_draft(root, path)
        check = _check(words, name, case, path, changed=bool(changes), stored=known)
        lines = _told(name, recording, apart=from_disk or low_memory)
        told.say(lines, ending=_ending(path, check, level))
        saving.add(runs, name, case)
    told.end()
    end(2 if broken else 0)


def _chosen(
    words: Words,
    changes: tuple[str, ...],
    reference: Path | None,
    output: Path | None,
    *,
    update: bool,
) -> tuple[dict[str, AnyCase], Path | None]:
    """The cases as they are changed, and the file that the only one is written to, if one is."""
    from truestep.errors import UsageError

    if reference is None:
        cases = choose_any(words)
    else:
        cases = any_or_recorded(words, reference)
        output = output or _replaced(reference, words, update=update)
    if output is not None and len(cases) != 1:
        raise UsageError(f"--output takes one case, {len(cases)} were chosen")
    return _accepted(changed_cases(cases, changes)), output


def _options(*, keep: str, apply: str | None, **given: Any) -> dict[str, Any]:
    """Options of `truestep.record` by name."""
    steps: Keep = "all" if keep == "all" else numbers(keep, "--keep") if keep else ()
    return {**given, "keep": steps, "apply": load_change(apply)}


def _accepted(cases: dict[str, AnyCase]) -> dict[str, AnyCase]:
    """The cases, unless one of them cannot be recorded."""
    for case in cases.values():
        _refuse(case)
    return cases


def _say_broken(name: str, error: TruestepError) -> None:
    text = f"{type(error).__name__}: {spelled(error, name)}"
    say(f"BROKEN {visible(name)}: {text}", err=True, lines=True)


def _ending(path: Path, check: str, level: str) -> list[str]:
    """Where a reference is, and the command that checks against it; only tensors are replayed."""
    return [f"reference: {path}", *([check] if level == "full" else [])]


def _check(
    words: Words, name: str, case: AnyCase, path: Path, *, changed: bool, stored: bool
) -> str:
    """The command that checks against a reference: by its name where that finds it."""
    said = words.says_case and of_calls(case)
    by_name = (said or not changed) and stored
    chosen = case_words(name, verb="check", with_changes=said) if by_name else ""
    return f"check: truestep check {chosen or pasteable(['--reference', str(path)])}"


def _replaced(reference: Path, words: Words, *, update: bool) -> Path:
    """The recording that is made anew, if that was said."""
    from truestep.errors import UsageError

    if words.names:
        raise click.UsageError("--reference names the case: leave CASES out, or give --output")
    if not update:
        raise UsageError(
            "the recording would be replaced",
            where=str(reference),
            hint="--update  # replaces it; with --output it stays",
        )
    return reference


def _refuse(case: AnyCase) -> None:
    """Refuse options and arguments that a case cannot have, before any forward."""
    from truestep.call_case import CallCase

    if not isinstance(case, CallCase):
        return
    from truestep.engines.diffusers import refuse

    refuse(case)


def _existing(
    store: Store, cases: Mapping[str, AnyCase], tier: str, *, refuse: bool
) -> dict[str, Place]:
    """The references that cases have on the device class they run on here.

    Args:
        refuse: Whether the only case may have none.

    Raises:
        UsageError: There is one of the only case.
    """
    places = [place for place in store.known() if place.tier == tier]
    found = {}
    for name, case in cases.items():
        for place in places:
            if (place.case_id, place.device_class) == (case.id, case_device_class(case)):
                found[name] = place
    for place in found.values() if refuse and len(cases) == 1 else ():
        store.refuse_existing(place, update=False)
    return found


@dataclass(frozen=True)
class _Saving:
    """Where recordings go, and whether those that were stopped are gone on with."""

    store: Store
    output: Path | None
    tier: str
    update: bool
    resume: bool
    told: Told

    def keeps(self, name: str, case: AnyCase, kept: Mapping[str, Place], runs: int | None) -> bool:
        """Whether a case keeps the reference that is there; see `add`."""
        if name not in kept:
            return False
        where = self.store.root / kept[name].name
        self.told.say([f"KEPT {name}: it has a reference"], ending=[f"reference: {where}"])
        self.add(runs, name, case)
        return True

    def add(self, runs: int | None, name: str, case: AnyCase) -> None:
        """Add benign runs to a reference that is there now, if that was asked for."""
        from truestep.cli.benign_runs import add_runs

        if runs is not None:
            where = self.output
            add_runs({name: case}, runs, self.store, self.told, reference=where, tier=self.tier)

    def recorded(self, case: AnyCase, **options: Any) -> tuple[Recording, Path]:
        """Record a case, keep what is finished until all is, and save it."""
        from truestep.engines.subjects import record
        from truestep.recording.partial import beside
        from truestep.recording.store import place_of

        own = self.store.partial_of(case.id, self.tier, case_device_class(case))
        tell = partial(say, err=True)
        with beside(self.output or own, resume=self.resume, tell=tell) as finished:
            with progress_bar() as progress:
                options |= {"progress": progress, "resume": finished}
                recording = record(case, path=self.output, **options)
            place = place_of(recording, tier=self.tier)
            path = self.output or self.store.save(recording, place, update=self.update)
            finished.remove()
        return recording, path


def _told(name: str, recording: Recording, *, apart: bool) -> Iterator[str]:
    """What was recorded, in words.

    Args:
        name: Of the case.
        recording: Of it.
        apart: Whether its weights were in their files, so that its floor lacks a benign run.
    """
    from truestep.cli.contents import kept_text

    manifest = recording.manifest
    runs = len(manifest.noise_floor.runs) if manifest.noise_floor else 0
    yield (
        f"RECORDED {name}: {len(manifest.tensors)} tensors, {manifest.forwards} forwards, "
        f"noise floor from {runs} benign runs"
    )
    kept = kept_text(manifest)
    if kept:
        yield f"kept: {kept} (more: --keep all)"
    if "prepared" in manifest.settings:
        yield f"prepared: {manifest.settings['prepared']}"
    notes = (*(manifest.notes if apart else ()), *manifest.settings.get("idle", ()))
    shown = notes if verbose() else notes[:_NOTES]
    yield from (f"note: {text}" for text in shown)
    if len(notes) > len(shown):
        yield f"... {len(notes) - len(shown)} more notes (-v)"


_NOTES = 2
