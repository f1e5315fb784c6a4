"""Leave out of a recording what no check of it reads.

A check runs models at chosen steps. Elsewhere their inputs say nothing more, and between two of
these steps only what the scheduler needs for the next one is kept: what it is given, as far back
as is found by trying; some need every step.
Of what is encoded before the steps only what something reads is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from truestep.calls.arguments import Arguments
from truestep.calls.blocks import BLOCK
from truestep.calls.boundaries import Arrival
from truestep.calls.choosing import chosen_steps
from truestep.calls.classes import STEP, Kind
from truestep.calls.forcing import Forcing
from truestep.calls.keys import Path
from truestep.calls.rebuilding import Swaps, laid_over
from truestep.calls.recorder import held_tensors
from truestep.calls.recording import KEPT_STEPS, CallRecording, key, placed_trees, trees_of
from truestep.calls.seen import Plan
from truestep.calls.subject import Subject
from truestep.calls.values import Tree, dropped, tensors
from truestep.keys import PRECISIONS
from truestep.measure.distance import same_bits
from truestep.recording.manifest import LEFT_OUT, CallEntry

_BACK = (1, 2, 3, 4, 8)
"""Steps before a chosen one that are tried as what its scheduler needs; solvers go back by 4."""


def thinned(
    subject: Subject, reference: CallRecording, steps: Iterable[int] | None = None
) -> CallRecording:
    """A recording without what no check at some steps reads.

    Args:
        subject: What was recorded; it is played back, without its models.
        reference: Its recording.
        steps: Where models will be run; default `default_steps`.

    Returns:
        A smaller recording; the same one where nothing can be left out.
    """
    chosen = chosen_steps(reference, steps)
    read = _read(subject, reference)
    for back in (*_BACK, reference.steps):
        windows = {step - before for step in chosen for before in range(back + 1)}
        kept = _kept(reference, chosen, frozenset(windows), read)
        if _plays_back(subject, kept):
            return kept
    return reference


def _kept(
    reference: CallRecording,
    chosen: frozenset[int],
    windows: frozenset[int],
    read: frozenset[tuple[int, Path]],
) -> CallRecording:
    """A recording whose calls outside of windows keep no tensors."""
    shapes = {entry.name: entry for entry in reference.recording.manifest.tensors}

    def without(tree: Tree, number: int | None = None) -> Tree:
        def drop(path: Path, name: str) -> bool:
            return number is None or (number, path) not in read

        return dropped(tree, drop, lambda name: (shapes[name].shape, shapes[name].dtype))

    calls = []
    for number, call in enumerate(reference.calls):
        given, gave = keeps(call, chosen, windows, reference.steps)
        if call.kind == str(Kind.MODEL) and call.step is None and call.stage == "text":
            call = replace(call, output=without(call.output, number))
        if not given:
            arguments = {name: without(tree) for name, tree in call.arguments.items()}
            call = replace(call, arguments=arguments)
        if not gave and not call.live:
            call = replace(call, output=without(call.output))
        calls.append(call)
    manifest = reference.recording.manifest
    used = {name for call in calls for _, tree in trees_of(call) for _, name in tensors(tree)}
    used |= {name for call in calls for _, name in call.random}
    used |= _raised(calls, shapes)
    left_out = [entry.name for entry in manifest.tensors if entry.name not in used]
    update = {
        "calls": tuple(calls),
        "tensors": tuple(entry for entry in manifest.tensors if entry.name in used),
        "settings": {**manifest.settings, KEPT_STEPS: sorted(chosen), LEFT_OUT: left_out},
    }
    return reference.with_manifest(manifest.model_copy(update=update))


def _raised(calls: Iterable[CallEntry], names: Collection[str]) -> set[str]:
    """Names of what was raised to a higher precision, of tensors that are kept."""
    beside = {
        str(key(call, side, (*place, *path), precision))
        for call in calls
        for side, place, tree in placed_trees(call)
        for path, _ in tensors(tree)
        for precision in PRECISIONS
    }
    return beside.intersection(names)


def keeps(
    call: CallEntry, chosen: frozenset[int], windows: frozenset[int], steps: int
) -> tuple[bool, bool]:
    """Whether a call keeps what it was given, and what it gave.

    Args:
        call: With its place in the run.
        chosen: Steps at which models are run.
        windows: Steps at which schedulers are.
        steps: How many there are.
    """
    if call.step is None or call.step in chosen:
        return True, True
    decoded = call.step == steps - 1 and call.method == STEP
    inside = call.step in windows
    if call.kind == str(Kind.MODEL) or call.component == BLOCK:
        return False, decoded
    leads_in = call.method == STEP and call.step + 1 in windows
    return inside, inside or leads_in or decoded


def answerable(subject: Subject, reference: CallRecording) -> tuple[CallRecording, str]:
    """A recording whose models are made at every step where its own subject needs that.

    A pipeline may look at what a model does inside: at attention maps that it had kept, say.

    Returns:
        The recording, and what is said of it where that is so.
    """
    if _plays_back(subject, reference):
        return reference, ""
    predicting = {c.component for c in reference.calls if c.stage == "prediction"}
    models = {c.component for c in reference.calls if c.kind == str(Kind.MODEL)}
    for live in (predicting & models, models):
        calls = tuple(replace(c, live=c.live or c.component in live) for c in reference.calls)
        manifest = reference.recording.manifest.model_copy(update={"calls": calls})
        made = reference.with_manifest(manifest)
        if _plays_back(subject, made):
            named = ", ".join(sorted(live))
            return made, f"{named}: run at every step, for what it does beside what it returns"
    return reference, "played back, the run is not what it was: something changes from run to run"


def _plays_back(subject: Subject, reference: CallRecording) -> bool:
    """Whether a recording's own subject gives, bit for bit, everything that it keeps."""
    result = Forcing(reference, Plan(made=lambda call: False)).run(subject)
    if result.raised or result.missing or result.unexpected:
        return False
    for seen in result.seen:
        if seen.odd or seen.actual is None:
            return False
        recorded = seen.recorded
        if isinstance(recorded, str) and not same_bits(seen.actual, reference.recording[recorded]):
            return False
    return True


def _read(subject: Subject, reference: CallRecording) -> frozenset[tuple[int, Path]]:
    """Place of a call and path of every output, of those before the steps, that something reads."""
    watching = _Reading(reference)
    result = watching.run(subject)
    every = {
        (number, path)
        for number, call in enumerate(reference.calls)
        for path, _ in tensors(call.output)
    }
    return frozenset(every if result.raised else every - set(watching.unread()))


@dataclass
class _Mark:
    """Whether a tensor was used."""

    read: bool = False


class _Marked(torch.Tensor):
    """A tensor that tells when anything is done with it."""

    mark: _Mark

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Mark what is used, and go on with plain tensors."""
        given = held_marks((args, kwargs or {}))
        for tensor in given:
            tensor.mark.read = True
        with torch._C.DisableTorchFunctionSubclass():
            plain = {id(tensor): tensor.as_subclass(torch.Tensor) for tensor in given}
            args, kwargs = laid_over((tuple(args), dict(kwargs or {})), Swaps(plain))
            return func(*args, **kwargs)


def held_marks(value: Any) -> list[_Marked]:
    """The marked tensors in a value."""
    if isinstance(value, _Marked):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in held_marks(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in held_marks(part)]
    return []


class _Reading(Forcing):
    """Plays a recording back with outputs that tell when they are used."""

    def __init__(self, reference: CallRecording) -> None:
        super().__init__(reference, Plan(made=lambda call: False))
        self._marks: dict[tuple[int, Path], _Mark] = {}
        self._numbers = {id(call): number for number, call in enumerate(reference.calls)}

    def _answer(self, arrival: Arrival, call: CallEntry, arguments: Arguments) -> Any:
        output = super()._answer(arrival, call, arguments)
        if call.step is not None or call.stage != "text":
            return output
        marked: dict[int, torch.Tensor] = {}
        for path, tensor in held_tensors(output).items():
            twin = tensor.as_subclass(_Marked)
            twin.mark = self._marks[self._numbers[id(call)], path] = _Mark()
            marked[id(tensor)] = twin
        return laid_over(output, Swaps(marked))

    def _run_block(self, arrival: Arrival, call: CallEntry) -> Any:
        return arrival.proceed(*arrival.args, **arrival.kwargs)

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is compared: only what is used counts."""

    def unread(self) -> Iterator[tuple[int, Path]]:
        """Outputs that nothing used."""
        return (place for place, mark in self._marks.items() if not mark.read)
