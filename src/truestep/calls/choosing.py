"""Which calls of models are made in a check; all others are answered from the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from truestep.calls.recording import CallRecording
from truestep.calls.seen import Number
from truestep.calls.subject import Subject
from truestep.errors import UsageError
from truestep.recording.manifest import CallEntry

_REPEATED = ("prediction", "text")
"""Stages of which an earlier call is made again: what is decoded costs too much to decode twice."""


def chosen_steps(reference: CallRecording, steps: Iterable[int] | None = None) -> frozenset[int]:
    """Steps at which models are run: the given ones, or those of `default_steps`.

    Raises:
        UsageError: A step is out of range, or none was chosen.
    """
    kept = reference.judged_steps
    if steps is None:
        return default_steps(reference) if kept is None else kept
    chosen = frozenset(steps)
    left = [] if kept is None else sorted(chosen - kept)
    if kept is not None and left:
        raise UsageError(
            f"step {left[0]} was left out of this recording",
            measured=f"it keeps what models need at steps {', '.join(map(str, sorted(kept)))}",
            hint="record it again with this step",
        )
    bad = sorted(step for step in chosen if not 0 <= step < reference.steps)
    if bad or (not chosen and reference.steps):
        raise UsageError(
            f"no step {bad[0]} in the reference" if bad else "no steps were chosen",
            measured=f"its steps are 0 to {reference.steps - 1}",
        )
    return chosen


def default_steps(reference: CallRecording) -> frozenset[int]:
    """First and last step of every set of models, and three in a row: halfway, or beside a switch.

    What a model keeps from one step to the next acts only where a step follows its neighbour; of
    three in a row a cache that answers every other step answers one, whichever it begins with.
    """
    models: list[set[str]] = [set() for _ in range(reference.steps)]
    for call in reference.calls:
        if call.step is not None and call.stage == "prediction":
            models[call.step].add(call.component)
    total = len(models)
    switches = [step for step in range(1, total) if models[step] != models[step - 1]]
    ends = [0, *switches, total]
    chosen: set[int] = set()
    for begin, end in pairwise(ends):
        beside = begin if begin else end - 3
        row = (begin + end) // 2 - 1 if len(ends) == 2 else beside
        chosen |= {begin, end - 1}
        chosen |= {step for step in range(row, row + 3) if begin <= step < end}
    return frozenset(step for step in chosen if 0 <= step < total)


def made_at(
    steps: frozenset[int], stateful: frozenset[str] = frozenset()
) -> Callable[[CallEntry], bool]:
    """Which calls are made: those at some steps; of some components also those before the last."""
    last = max(steps, default=-1)

    def made(call: CallEntry) -> bool:
        if call.step is None or call.step in steps:
            return True
        return call.component in stateful and call.step <= last

    return made


def cached_components(subject: Subject) -> set[str]:
    """Components that say they keep something from one call to the next."""
    return {name for name, part in subject.components.items() if _has_cache(part)}


def _has_cache(component: Any) -> bool:
    return getattr(component, "_cache_config", None) is not None


def repeats(
    reference: CallRecording, chosen: frozenset[int], stateful: Iterable[str]
) -> Mapping[Number, Sequence[CallEntry]]:
    """After which calls earlier ones are made once more: after the last of a model.

    They are those of two steps, so that a cache that answers every other step answers one of them,
    not of the first step, where caches are emptied, and in reverse, so that a cache that counts
    calls does not give each of them what it gave before.
    """
    kept = set(stateful)
    later = sorted(chosen)[1:] or sorted(chosen)
    twice = set(later[:2])
    again: dict[Number, Sequence[CallEntry]] = {}
    for (component, method), calls in reference.by_method.items():
        made = [
            (number, call)
            for number, call in enumerate(calls)
            if call.kind == "model"
            and call.stage in _REPEATED
            and (call.step is None or call.step in chosen)
        ]
        if made and component not in kept and not any(call.live for _, call in made):
            inside = [call for _, call in reversed(made) if call.step in twice]
            again[component, method, made[-1][0]] = inside or [made[0][1]]
    return again
