"""Which step and stage a call belongs to: told from when calls happen. No names of components.

A step ends with the scheduler's `step`. What is called in the steps is a prediction; what comes
before the first belongs to the text, or to the latent where the same component is also called
after the last step, as one that both encodes and decodes; what comes after is decoding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from truestep.calls.blocks import BLOCK
from truestep.calls.classes import SET_TIMESTEPS, STEP, Kind

_OF_SCHEDULER = {STEP: "update", SET_TIMESTEPS: "schedule"}
_OF_FUNCTION = {"step": "update", "schedule": "schedule", "guidance": "guidance"}
_NOISING = ("add_noise", "scale_noise")


@dataclass(frozen=True)
class Happened:
    """One call, as far as its role goes.

    Attributes:
        component, method, kind: What is called.
        inside: The place of the call that it is part of.
        begins: Of a block, which stands where it ends: the place at which it began.
    """

    component: str
    method: str
    kind: Kind
    inside: int | None = None
    begins: int = 0


@dataclass(frozen=True)
class Role:
    """Where a call belongs; `call` is its number within step and stage."""

    stage: str
    step: int | None
    call: int


Place = tuple[str, int | None]
"""Stage and step."""


def roles(calls: Sequence[Happened]) -> list[Role]:
    """The role of every call of a run, in the order in which they began, and of its blocks."""
    others = [index for index, call in enumerate(calls) if call.component != BLOCK]
    number = {index: place for place, index in enumerate(others)}
    rest = [
        replace(calls[index], inside=None if inside is None else number[inside])
        for index in others
        for inside in [calls[index].inside]
    ]
    ends = _ends(rest)
    if not ends:
        return _numbered(calls, [("output", None)] * len(calls))
    known = _places(rest, ends)
    often = Counter(_named(call) for call in calls)
    places = []
    for index, call in enumerate(calls):
        if call.component != BLOCK:
            places.append(known[number[index]])
            continue
        before = bisect_left(others, index)
        begins = bisect_left(others, call.begins)
        within = often[_named(call)] > 1 and begins < len(rest) and known[begins][1] is not None
        stage = known[before - 1][0] if before else "text"
        stage = "latent" if within and begins == before else stage  # no call is inside of it
        places.append((stage, sum(end < begins for end in ends) if within else None))
    return _numbered(calls, places)


def _places(calls: Sequence[Happened], ends: Sequence[int]) -> list[Place]:
    """Stage and step of every call that is no block."""
    segments = [sum(end < index for end in ends) for index in range(len(calls))]
    every = _at_every_step(calls, segments, len(ends))
    first = next(
        (i for i, call in enumerate(calls) if _named(call) in every and segments[i] == 0), ends[0]
    )
    begin = _back_to_scaling(calls, first)
    after = {c.component for i, c in enumerate(calls) if segments[i] == len(ends)}
    places: list[Place] = []
    for index, call in enumerate(calls):
        inside = begin <= index <= ends[-1]
        step = segments[index] if inside else None
        late = index > ends[-1]
        if call.inside is not None:
            places.append(("update" if inside or late else "latent", places[call.inside][1]))
            continue
        places.append((_stage(call, every, inside=inside, late=late, after=after), step))
    return places


def _named(call: Happened) -> tuple[str, str]:
    return call.component, call.method


def _ends(calls: Sequence[Happened]) -> list[int]:
    """Index of the last call of each step.

    Schedulers that step one after another, each once, end the same step: of video and of sound.
    """
    ends: list[int] = []
    stepped: set[str] = set()
    for index, call in enumerate(calls):
        if call.kind is Kind.MODEL:
            stepped = set()
        elif call.method == STEP and call.kind in (Kind.SCHEDULER, Kind.FUNCTION):
            if stepped and call.component not in stepped:
                ends[-1] = index
            else:
                ends.append(index)
                stepped = set()
            stepped.add(call.component)
    return ends


def _at_every_step(
    calls: Sequence[Happened], segments: Sequence[int], steps: int
) -> set[tuple[str, str]]:
    """Methods of models that are called inside the steps; of a single one, the last before it."""
    models = [
        (segment, _named(call))
        for segment, call in zip(segments, calls, strict=True)
        if call.kind is Kind.MODEL
    ]
    last = [name for segment, name in models if segment == 0][-1:]
    return {name for segment, name in models if 0 < segment < steps} | set(last)


def _back_to_scaling(calls: Sequence[Happened], first: int) -> int:
    """A step begins where its scheduler scales the latent, just before the first model."""
    while first and calls[first - 1].kind is Kind.SCHEDULER:
        if calls[first - 1].method in (SET_TIMESTEPS, *_NOISING):
            break
        first -= 1
    return first


def _stage(
    call: Happened,
    every: set[tuple[str, str]],
    *,
    inside: bool,
    late: bool,
    after: set[str],
) -> str:
    if call.kind is Kind.SCHEDULER:
        return "latent" if call.method in _NOISING else _OF_SCHEDULER.get(call.method, "schedule")
    if call.kind is Kind.GUIDER:
        return "guidance"
    if call.kind is Kind.FUNCTION and call.method in _OF_FUNCTION:
        return _OF_FUNCTION[call.method]
    if late or call.kind is Kind.RUN:
        return "decoding"
    if call.kind is Kind.RANDOM:
        return "update" if inside else "latent"
    if inside:
        return "prediction" if _named(call) in every else "latent"
    return "latent" if call.component in after else "text"


def _numbered(calls: Sequence[Happened], places: Sequence[Place]) -> list[Role]:
    seen: Counter[tuple[object, ...]] = Counter()
    numbered = []
    for call, (stage, step) in zip(calls, places, strict=True):
        place = (stage, step, *_named(call))
        numbered.append(Role(stage, step, seen[place]))
        seen[place] += 1
    return numbered
