"""Why what a plain pipeline hands from one call to the next is wrong, or what its scheduler gives.

The candidate is run once more on what was recorded, its models answered from there: what it then
hands on is a function of recorded tensors. A hypothesis is one such function; it is accepted where
it gives the candidate's tensors to their floors, at every step where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from truestep.calls.judging import Recorded
from truestep.calls.keys import Key, key_of
from truestep.calls.precision import raised
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Seen, number
from truestep.calls.subject import Subject
from truestep.keys import PRECISIONS
from truestep.recording.manifest import CallEntry
from truestep.replay.causes.combined import combination
from truestep.replay.causes.exchanged import exchanged
from truestep.replay.causes.guesses import LEAST, Failing, Guess, apart, cause_of, explains
from truestep.replay.causes.latents import normalised, statistics
from truestep.replay.causes.material import Handed, Material
from truestep.replay.causes.parts import part_of
from truestep.replay.causes.pictures import pictures
from truestep.replay.causes.relations import casts, fits, named_fits, orders
from truestep.replay.causes.remade import (
    Setting,
    Values,
    answered,
    lacks_tensors,
    other_settings,
    read_settings,
    run_with,
    values_of,
)
from truestep.replay.causes.times import setting, times
from truestep.replay.causes.tokens import masks, tokens
from truestep.verdict import Cause, Comparison, Row, Verdict

_RELATIONS: Sequence[Callable[[Handed], Iterator[Guess]]] = (
    times,
    setting,
    masks,
    tokens,
    statistics,
    combination,
    pictures,
    orders,
    casts,
    named_fits,
    exchanged,
    normalised,
    fits,
)
"""From what leaves no number open to what does."""

_OF_PARTS: Sequence[Callable[[Handed], Iterator[Guess]]] = (
    orders,
    casts,
    named_fits,
    exchanged,
    normalised,
    fits,
)
"""Of a part: what does not ask where in the whole it stands."""

_WRONG = (Verdict.DRIFTED, Verdict.INVALID)


def handed_cause(
    candidate: Subject,
    trusted: Subject,
    reference: CallRecording,
    comparison: Comparison,
    *,
    name: str,
    arguments: Mapping[str, Any],
) -> tuple[Cause | None, int]:
    """Why a failing place that is in no torch module is wrong; and how much was tried.

    Args:
        candidate: What was checked.
        trusted: The reference's pipeline.
        reference: The recording.
        comparison: The candidate's check.
        name: Of the place's row.
        arguments: What the reference was called with.
    """
    rows = {row.name: row for row in comparison.rows}
    place = _sharpest(key_of(name), rows)
    sides, tried = (candidate, trusted), 0
    for guess in _by_settings(sides, reference, str(replace(place, precision=""))):
        tried += 1
        if isinstance(guess, Cause):
            return guess.model_copy(update={"tried": tried}), tried
    with raised(candidate, place.precision, _silent) if place.precision else nullcontext():
        seen = answered(candidate, reference, place.precision, whole=True).seen
    scene = _scene(Material(reference, trusted.components, arguments), seen, rows, place)
    if scene is None:
        return _not_given(seen, place, tried), tried
    if scene.failing[0].actual.dim() > 2 and place.side == "in":  # embeddings: of which layer
        unkept: dict[str, torch.Tensor] = {}
        answered(trusted, reference, whole=True, unkept=unkept)
        scene = replace(scene, material=Material(reference, trusted.components, arguments, unkept))
    for of, relations in ((scene, _RELATIONS), *((part, _OF_PARTS) for part in part_of(scene))):
        for relation in relations:
            for one in relation(of):
                tried += 1
                if explains(one, of.failing):
                    return cause_of(one, of.failing, tried), tried
    return None, tried


def _sharpest(place: Key, rows: Mapping[str, Row]) -> Key:
    """The place raised to a precision that tells hypotheses apart, where it fails there as well."""
    for precision in PRECISIONS if not place.precision else ():
        row = rows.get(str(replace(place, precision=precision)))
        if row is not None and row.verdict in _WRONG:
            return replace(place, precision=precision)
    return place


def _not_given(seen: Sequence[Seen], place: Key, tried: int) -> Cause | None:
    """An argument that the candidate does not give."""
    lacking = (s for s in seen if s.key == place and s.actual is None and s.recorded is not None)
    if place.side != "in" or next(lacking, None) is None:
        return None
    what = ".".join(place.path)
    return Cause(
        kind="mask" if "mask" in what else "not given",
        text=f"`{what}` of {place.component}.{place.method} is not given",
        error_before=float("inf"),
        error_after=0.0,
        tried=tried + 1,
    )


def _silent(note: str) -> None:
    """What cannot be raised was said by the check."""


def _scene(
    material: Material, seen: Sequence[Seen], rows: Mapping[str, Row], place: Key
) -> Handed | None:
    """The failing place at every step; None where there is nothing to compute with."""
    reference = material.reference
    failing, keys, calls = [], [], []
    for one in seen:
        row = rows.get(str(one.key))
        if not _same_place(one.key, place) or row is None or row.verdict not in _WRONG:
            continue
        call = _call_of(reference, one.key)
        recorded = _recorded(reference, one)
        if call is None or one.actual is None or recorded is None:
            return None
        actual = one.actual.double()
        if actual.numel() == recorded.numel() == 1:
            actual = actual.reshape(recorded.shape)
        limit = max(LEAST, row.floor.rel_l2 if row.floor else 0.0)
        failing.append(Failing(str(one.key), actual, recorded, limit))
        keys.append(one.key)
        calls.append(call)
    if not failing or failing[0].name != str(place):
        return None
    return Handed(failing, keys, calls, material)


def _same_place(key: Key, place: Key) -> bool:
    return (key.component, key.method, key.side, key.path, key.precision) == (
        place.component,
        place.method,
        place.side,
        place.path,
        place.precision,
    )


def _call_of(reference: CallRecording, key: Key) -> CallEntry | None:
    calls = reference.by_method.get((key.component, key.method), ())
    wanted = (key.stage, key.step, key.call)
    return next((c for c in calls if (c.stage, c.step, c.call) == wanted), None)


def _recorded(reference: CallRecording, seen: Seen) -> torch.Tensor | None:
    """What was recorded there, in the precision that it was raised to, if to any."""
    raised = Recorded(reference, [seen])
    if str(seen.key) in raised:
        return raised[str(seen.key)].double()
    if seen.recorded is None:
        return None
    if isinstance(seen.recorded, str):
        return reference.recording[seen.recorded].double()
    return number(seen.recorded).double()


# Settings


def _by_settings(
    sides: tuple[Subject, Subject], reference: CallRecording, name: str
) -> Iterator[Cause | Setting]:
    """Each setting that is tried, and the cause where one gives what the candidate gave."""
    candidate, trusted = sides
    came, plain = values_of(answered(candidate, reference)), run_with(trusted, reference, None)
    group = _group(came, plain, name)
    if not group or _needs_models(candidate, reference, came, group):
        return
    wanted = list(read_settings(candidate.components, trusted.components))
    if key_of(name).stage == "schedule" or _of_scheduler(trusted, key_of(name)):
        wanted += other_settings(trusted.components)
    for tried in wanted:
        made = run_with(trusted, reference, tried)
        if all(key in made and _alike(came[key], made[key]) for key in group):
            kind, text, mend = tried.said(_own(trusted, tried))
            yield Cause(
                kind=kind,
                text=text,
                patch=mend,
                error_before=_apart(plain.get(name), came[name]),
                error_after=_apart(made[name], came[name]),
                tried=0,
            )
            return
        yield tried


def _group(came: Values, plain: Values, name: str) -> list[str]:
    """Keys of all that a setting has to give: the failing place at every step, and all else that
    differs in its call."""
    place = key_of(name)
    wrong = [key_of(key) for key in came if not _alike(came[key], plain.get(key))]
    if place not in wrong:
        return []
    call = (place.component, place.method, place.step, place.call)
    return [
        str(key)
        for key in wrong
        if _same_place(key, place) or (key.component, key.method, key.step, key.call) == call
    ]


def _needs_models(
    candidate: Subject, reference: CallRecording, came: Values, group: Sequence[str]
) -> bool:
    """Whether the failing place is of something that models gave and that was not kept."""
    if not lacks_tensors(reference):
        return False
    whole = values_of(answered(candidate, reference, whole=True))
    return not all(key in whole and _alike(came[key], whole[key]) for key in group)


def _of_scheduler(trusted: Subject, place: Key) -> bool:
    """Whether a place is a scheduler's call, or a number that one makes."""
    part = trusted.components.get(place.component)
    named = any(word in ".".join(place.path) for word in ("time", "sigma"))
    return hasattr(part, "set_timesteps") or named


def _own(trusted: Subject, tried: Setting) -> Mapping[str, Any]:
    part = trusted.components[tried.component]
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        return config
    return {name: getattr(part, name, None) for name in tried.values}


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return _apart(one, other) <= LEAST


def _apart(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    if one.numel() == other.numel() == 1:
        one = one.reshape(other.shape)
    same = one.shape == other.shape and bool(torch.equal(one, other))
    return 0.0 if same else apart(one.double(), other.double())
