"""Names of the guidance passes in a batch: kept with a recording, and told of what fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from truestep.calls.guidance import guidance
from truestep.calls.keys import Key
from truestep.calls.layouts import grouped, sizes_of
from truestep.calls.recording import CallRecording
from truestep.calls.subject import Subject

PASSES = "passes"
"""Setting of a recording: component, method, number of the call in a step, and a name a row."""

ALONE = 10.0
"""A pass is named alone where it differs by so many times as much as any other."""

Names = Mapping[tuple[str, str, int], Sequence[str]]
"""By component, method and number of the call in its step: the name of the pass of each row."""


def with_passes(subject: Subject, recording: CallRecording) -> CallRecording:
    """Name the passes of calls that do not say which they are; see `guidance`.

    They are looked for at the second step: at the first some pipelines do not guide yet.
    """
    shape, steps = recording.shapes.__getitem__, grouped(recording).values()
    unnamed = [
        step
        for by_step in steps
        for step, calls in by_step.items()
        if sum(sizes_of(calls, shape)) > 1 and any(call.context is None for call in calls)
    ]
    if not unnamed:
        return recording
    step = next((step for step in sorted(unnamed) if step > 0), 0)
    found = guidance(subject, recording, step)
    names: dict[tuple[str, str, int], dict[int, str]] = {}
    for each in found.passes if found.affine else ():
        source = each.source
        if source.row is not None and each.name:
            place = (source.component, source.method, source.call)
            names.setdefault(place, {}).setdefault(source.row, each.name)
    entries = [
        [*place, [rows.get(row, "") for row in range(max(rows) + 1)]]
        for place, rows in names.items()
    ]
    manifest = recording.recording.manifest
    settings = {**manifest.settings, PASSES: entries}
    return recording.with_manifest(manifest.model_copy(update={"settings": settings}))


def names_of(recording: CallRecording) -> Names:
    """The names that a recording keeps; what is not of their form is no name."""
    entries = recording.recording.manifest.settings.get(PASSES, [])
    return dict(map(_entry, filter(_is_entry, entries if isinstance(entries, list) else [])))


def _is_entry(entry: Any) -> bool:
    kinds = (str, str, int, list)
    return (
        isinstance(entry, list)
        and len(entry) == len(kinds)
        and all(isinstance(part, kind) for part, kind in zip(entry, kinds, strict=True))
        and all(isinstance(name, str) for name in entry[3])
    )


def _entry(entry: list[Any]) -> tuple[tuple[str, str, int], list[str]]:
    component, method, call, names = entry
    return (component, method, call), names


def failing_pass(
    names: Names, key: Key, actual: torch.Tensor, recorded: torch.Tensor
) -> str | None:
    """The only pass of a call in which a tensor differs; None where there is no such.

    Args:
        names: Of passes.
        key: Of the tensor.
        actual, recorded: It, with a row for each sample.
    """
    rows = names.get((key.component, key.method, key.call), ())
    if not rows or actual.shape != recorded.shape or actual.shape[:1] != (len(rows),):
        return None
    apart = (actual.double() - recorded.double()).nan_to_num(nan=torch.inf)
    sizes = apart.reshape(len(rows), -1).norm(dim=1).tolist()
    passes = {name: max(s for s, n in zip(sizes, rows, strict=True) if n == name) for name in rows}
    first = max(passes, key=lambda name: passes[name])
    others = [size for name, size in passes.items() if name != first]
    return first if first and all(size * ALONE <= passes[first] for size in others) else None
