"""Record a trusted subject: its calls, their raised twins, and the floor that judges others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from truestep.calls.benign import expected, measure, measure_end
from truestep.calls.choosing import chosen_steps, made_at
from truestep.calls.classes import Kind, kind_of
from truestep.calls.instructions import prepare
from truestep.calls.passes import with_passes
from truestep.calls.precision import narrow, with_raised
from truestep.calls.recorder import recorded
from truestep.calls.recording import CallRecording, holds_tensors, host_copy, trees_of
from truestep.calls.seen import Plan
from truestep.calls.subject import Subject
from truestep.calls.thinning import answerable, thinned
from truestep.calls.values import tensors
from truestep.judge.refusals import refuse_empty_content
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.manifest import Keep
from truestep.recording.partial import NOWHERE, RUN, Partial

Note = Callable[[str], None]

_CONTENT = ("latent", "prediction", "update", "output")
"""Stages whose outputs must be full of numbers for a recording to judge anything."""


@own_randomness()
def record(
    subject: Subject,
    *,
    floor: bool = True,
    steps: Iterable[int] | None = None,
    keep: Keep = "all",
    end: bool = False,
    progress: Progress | None = None,
    kept: Partial = NOWHERE,
) -> CallRecording:
    """Run a trusted subject and keep every call of its components, and the noise floor.

    Args:
        subject: See `subject_of`.
        floor: Measure the noise floor (about a dozen forced runs at a few steps).
        steps: Where models are run for it; default `default_steps`.
        end: Also measure that of what a free run ends with (as many free runs).
        progress: Told (what, done, total) while it runs.
        keep: `all` tensors of every call; or what checks at `steps` and at these read: `thinned`.
        kept: What is finished, where a floor is measured; begun by whoever knows what runs.

    Raises:
        UsageError: It gives nothing that could be judged, something else when it is run again, or
            is being watched already.
    """
    if floor:
        prepare()

    def first(note: Note) -> Recording:
        made = recorded(subject, progress)
        _refuse_empty(made)
        return made.recording

    keeping = kept if floor else NOWHERE
    recording = CallRecording(keeping.recording(RUN, first, lambda text: None))
    elsewhere = recording.recording.manifest.settings.get("elsewhere", {})
    notes = [f"calls of {name} from other threads were not recorded" for name in elsewhere]
    for name, component in subject.components.items():
        if kind_of(component) is Kind.SCHEDULER and not recording.stepped_by(name):
            notes.append(f"{name}.step was never called: is it built anew inside the run?")
    recording, said = answerable(subject, recording)
    notes += [said] if said else []
    recording = with_passes(subject, recording)
    chosen = chosen_steps(recording, steps)
    stay = None if keep == "all" else chosen | (chosen_steps(recording, keep) if keep else set())
    if not floor:
        recording = recording.with_floor(None, notes)
        return _thinned(subject, recording, stay)

    plan = Plan(made_at(chosen))
    raised = Plan(made_at(chosen | (stay or set())))
    recording = _raised(subject, recording, raised, notes.append, kept)
    kept.expect(expected(subject, recording, plan, end=end))
    measured = measure(subject, recording, plan, notes.append, progress, kept)
    if end:
        free = measure_end(subject, recording, notes.append, kept)
        measured = measured.model_copy(update={"runs": (*measured.runs, *free)})
    recording = recording.with_floor(measured, notes)
    return _thinned(subject, recording, stay)


def _thinned(
    subject: Subject, recording: CallRecording, stay: frozenset[int] | None
) -> CallRecording:
    return recording if stay is None else thinned(subject, recording, stay)


def _raised(
    subject: Subject, reference: CallRecording, plan: Plan, note: Note, kept: Partial
) -> CallRecording:
    """See `with_raised`: what it adds is kept by itself."""
    if narrow(reference) is None:
        return reference
    before = reference.recording.manifest

    def make(tell: Note) -> Recording:
        made = with_raised(subject, reference, plan, tell).recording
        more = tuple(e for e in made.manifest.tensors if e.name not in reference.recording)
        manifest = before.model_copy(update={"tensors": more, "calls": ()})
        copies = {e.name: host_copy(made[e.name]) for e in more}  # laid out as when read again
        return Recording.in_memory(copies, manifest)

    more = kept.recording("raised", make, note)
    table = (*before.tensors, *more.manifest.tensors)
    return reference.with_manifest(before.model_copy(update={"tensors": table}), dict(more))


def _refuse_empty(recording: CallRecording) -> None:
    """Refuse what can judge nothing: a model may be silent at some steps, not at all of them."""
    given: dict[str, dict[str, torch.Tensor]] = {}
    for call in recording.calls:
        if call.stage in _CONTENT and call.kind == "model" and holds_tensors(call):
            outputs = given.setdefault(f"{call.component}.{call.method}", {})
            for side, tree in trees_of(call):
                if side == "out":
                    outputs.update((n, recording.recording[n]) for _, n in tensors(tree))
    for where, outputs in given.items():
        refuse_empty_content(outputs, where=where)
