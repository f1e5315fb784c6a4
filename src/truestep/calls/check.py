"""Check a subject against a recording of calls: run it once, forced, and judge every call alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from truestep.calls.choosing import cached_components, chosen_steps, made_at, repeats
from truestep.calls.forcing import Forcing
from truestep.calls.freely import other_noise, run_twice
from truestep.calls.judging import (
    RAISED,
    UNEXPECTED,
    Sides,
    comparison_of,
    in_order,
    pairs,
    rows_of,
    sides_of,
)
from truestep.calls.keys import key_of
from truestep.calls.layouts import Layouts
from truestep.calls.precision import raised, recorded_precision, without_unraised
from truestep.calls.recording import CallRecording, read, trees_of
from truestep.calls.regrouped import Regrouped
from truestep.calls.scouting import found_layouts
from truestep.calls.seen import Forced, Plan, Proceed, as_it_is
from truestep.calls.subject import Subject
from truestep.calls.values import opaque
from truestep.environment import Environment
from truestep.judge.floor import Limits
from truestep.judge.repeats import UNSTEADY, said_unsteady
from truestep.judge.seen import with_seen
from truestep.judge.shift import Ends, explained, is_moved, with_shift
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.manifest import CallEntry
from truestep.runtime.identity import device_of
from truestep.verdict import Comparison, Row, Side, Verdict


@own_randomness()
def check(
    subject: Subject,
    reference: CallRecording | str | Path,
    *,
    steps: Iterable[int] | None = None,
    tolerance: float | None = None,
    pair: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run a candidate once on a recording's inputs and judge every call, and the code between.

    Args:
        subject: The candidate; its own code runs.
        reference: What a trusted subject was recorded as.
        steps: At which steps models are run; everything else always is. Default `default_steps`.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        pair: Declared working precisions, `candidate/reference`.

    Returns:
        The comparison; its sentence begins with the place where it went wrong.

    Raises:
        FileFormatError: The reference cannot be read.
        UsageError: A step is not in it, or a component is being watched already.
    """
    recording = reference if isinstance(reference, CallRecording) else read(reference)
    precision = recorded_precision(recording) if tolerance is None else ""
    limits = Limits(recording.floor, pair, tolerance, raised=bool(precision))
    stateful = frozenset(cached_components(subject))
    how = How(chosen_steps(recording, steps), stateful, progress=progress)
    result = _forced(subject, recording, how)
    rows = rows_of(recording, result, limits)
    if any(_of_passes(row) for row in rows):
        layouts = found_layouts(subject, recording)
        if layouts:
            how = replace(how, layouts=layouts)
            result = _forced(subject, recording, how)
            rows = rows_of(recording, result, limits)
    unsteady = {row.fqn.rpartition(".")[0] for row in rows if row.fqn and UNSTEADY in row.note}
    if unsteady and len(how.steps) < recording.steps:
        every = replace(how, stateful=how.stateful | unsteady)
        again = _forced(subject, recording, every)
        alike = rows_of(recording, _forced(subject, recording, how), limits)
        if _failing(alike) == _failing(rows):
            # Skipped steps are what the state that it keeps lacked.
            how, result, rows = every, again, rows_of(recording, again, limits)
    notes: list[str] = []
    if precision:
        limits = replace(limits, raised=False)
        with raised(subject, precision, notes.append):
            lifted = _forced(subject, recording, how, precision)
            unraised = without_unraised(recording, lifted, precision)
            more = rows_of(recording, lifted, limits)
        failed = [row.note for row in more if row.name.endswith(RAISED)]
        rows = rows_of(recording, result, limits) if failed else in_order(rows, more, precision)
        notes += [f"not judged in {precision}: the candidate {text}" for text in failed]
        if unraised:
            numbered = ", ".join(map(str, unraised))
            notes.append(f"models not judged in {precision} at steps {numbered}: not recorded so")
            rows = [_unsure(recording, row, how.steps.intersection(unraised)) for row in rows]
    found = said_unsteady(comparison_of(rows, _sides(subject, recording, how, notes)))
    return with_seen(found, *sides_of(pairs(recording, result)))


@own_randomness()
def check_end(
    subject: Subject,
    reference: CallRecording | str | Path,
    *,
    tolerance: float | None = None,
    pair: str | None = None,
) -> Comparison:
    """Run a candidate freely, twice, and judge what it ends with.

    Args:
        subject: The candidate; its own code runs, on what itself computes.
        reference: What a trusted subject was recorded as.
        tolerance: Judge rel_l2 by this limit instead of the noise floor of free runs.
        pair: Declared working precisions, `candidate/reference`.

    Raises:
        FileFormatError: The reference cannot be read.
        UsageError: A component is being watched already.
    """
    recording = reference if isinstance(reference, CallRecording) else read(reference)
    limits = Limits(floor=recording.end_floor, pair=pair, tolerance=tolerance)
    rows = rows_of(recording, run_twice(subject, recording), limits)
    fields = {
        "looked_at": ("what two free runs end with, one after the other",),
        "not_looked_at": ("each call on its own (--depth steps)", "what is made of the end"),
    }
    ended = said_unsteady(comparison_of(rows, named_sides(subject, recording, fields)))
    if tolerance is not None or not is_moved(rows):
        return ended
    kept = recording.judged_steps
    every = range(recording.steps) if kept is None else None
    stages = check(subject, recording, steps=every, pair=pair)
    left = recording.steps - len(kept) if kept is not None else 0
    unseen = f"the recording keeps no models at {left} steps (record it with --keep all)"
    ends = Ends(rows, recording.end_floor, other_noise(subject, recording), pair or "")
    return with_shift(ended, stages, explained(ends, stages, unseen=unseen if left else ""))


def _of_passes(row: Row) -> bool:
    """Whether a row fails as rows do where passes are grouped otherwise."""
    return not row.verdict.passed and (row.stage == "prediction" or row.name.endswith(UNEXPECTED))


def _failing(rows: Iterable[Row]) -> list[str]:
    return [row.name for row in rows if not row.verdict.passed]


def _unsure(recording: CallRecording, row: Row, steps: Collection[int]) -> Row:
    """What a model gave at a step that was asked for, where 16 bits alone hide faults."""
    if row.verdict is not Verdict.EQUIVALENT or row.stage != "prediction" or row.step not in steps:
        return row
    place = key_of(row.name)
    calls = recording.by_method.get((place.component, place.method), ())
    if place.side != "out" or place.precision or not any(c.kind == "model" for c in calls):
        return row
    note = f"judged in its own precision alone: record it with --keep {row.step}"
    return row.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "note": note})


@dataclass(frozen=True)
class How:
    """How models are checked.

    Attributes:
        steps: At which they are run.
        stateful: Components that are run at every step up to the last of them.
        layouts: How the candidate groups its guidance passes, where that is otherwise.
        progress: Told of every call of a model.
    """

    steps: frozenset[int]
    stateful: frozenset[str]
    layouts: Layouts = field(default_factory=dict)
    progress: Progress | None = None


def _forced(subject: Subject, recording: CallRecording, how: How, precision: str = "") -> Forced:
    """One forced run."""
    made = made_at(how.steps, how.stateful)
    plan = Plan(
        made=made,
        by=_telling(recording, made, how.progress, precision),
        precision=getattr(torch, precision) if precision else None,
        raised=precision,
        again={} if precision else repeats(recording, how.steps, how.stateful),
    )
    forcing = Regrouped(recording, plan, how.layouts) if how.layouts else Forcing(recording, plan)
    return forcing.run(subject)


def _telling(
    recording: CallRecording,
    made: Callable[[CallEntry], bool],
    progress: Progress | None,
    precision: str,
) -> Callable[[CallEntry, Proceed], Proceed]:
    """What tells of every call of a model before it is made."""
    if progress is None:
        return as_it_is
    todo = [id(call) for call in recording.calls if call.kind == "model" and made(call)]
    places = {call: at for at, call in enumerate(todo)}

    def by(call: CallEntry, proceed: Proceed) -> Proceed:
        if id(call) in places:
            progress(f"check in {precision}" if precision else "check", places[id(call)], len(todo))
        return proceed

    return by


def _sides(subject: Subject, recording: CallRecording, how: How, said: Sequence[str]) -> Sides:
    """What was compared, in words."""
    steps = ", ".join(map(str, sorted(how.steps)))
    looked = [f"{len(recording.calls)} calls and the code between them"]
    looked += [f"models run at steps {steps}"] if steps else []
    skipped = recording.steps - len(how.steps)
    opaque_parts = sorted(set(_opaque(recording)))
    left_out = recording.judged_steps is not None and skipped
    judged = f", judged at steps {steps}: the recording keeps no others (--keep all)"
    often = f"run at every step{judged if left_out else ''}"
    notes = [f"{name} keeps something between calls: {often}" for name in how.stateful]
    notes += {f"{method[0]}: {layout}" for (method, _), layout in how.layouts.items()}
    fields = {
        "looked_at": tuple(looked),
        "not_looked_at": (
            *([f"models at {skipped} other steps"] if skipped else []),
            *([f"values of {', '.join(opaque_parts[:5])}"] if opaque_parts else []),
        ),
        "notes": (*sorted(notes), *said),
    }
    return named_sides(subject, recording, fields)


def named_sides(subject: Subject, recording: CallRecording, fields: dict[str, Any]) -> Sides:
    """The two sides, with what is said beside them."""
    environment = Environment.current(device_of(subject.components), attention=None)
    manifest = recording.recording.manifest
    return Sides(
        actual=Side(label=subject.label, environment=dict(environment)),
        reference=Side(
            label=str(manifest.settings.get("label", "reference")),
            path=str(recording.recording.path) if recording.recording.path else None,
            environment=manifest.environment,
        ),
        fields={"environment_differences": environment.differences(manifest.environment), **fields},
    )


def _opaque(recording: CallRecording) -> Iterator[str]:
    for call in recording.calls:
        for _, tree in trees_of(call):
            for _, name in opaque(tree):
                if name not in ("builtins.function", "builtins.type"):
                    yield name
