"""A recording small enough for an issue thread: sketches of some steps, and all that it says."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from truestep.errors import UsageError
from truestep.measure.reduced import SKETCH_SIZE
from truestep.recording.format import Recording
from truestep.recording.manifest import LEFT_OUT, Manifest, TensorEntry

LIMIT = 1_000_000
"""Bytes of a bundle."""

BUNDLED = "bundled_steps"
"""Setting of a bundle: the steps that it holds, where it does not hold all."""

_EACH = 4 * SKETCH_SIZE + 8 * 8 + 700
"""Bytes that a tensor takes at most: sketch, moments, and its rows in header and manifest."""


def bundled(recording: Recording, *, limit: int = LIMIT) -> Recording:
    """Sketches of as many steps as fit, the first two, the last, and others evenly between.

    Args:
        recording: At level `full`.
        limit: Bytes.

    Returns:
        At level `sketch`. Names of what is left out are in its manifest, as of a thinned recording.

    Raises:
        UsageError: Not even its first step fits, or it holds no tensors.
    """
    manifest = recording.manifest
    recording.require_tensors(where=str(recording.path or "recording"))
    steps = sorted({entry.step for entry in manifest.tensors if entry.step is not None})
    for count in range(len(steps), -1, -1):
        chosen = _evenly(steps, count)
        kept = [e for e in manifest.tensors if e.step is None or e.step in chosen]
        if len(kept) * _EACH + _bytes_of_calls(manifest, chosen) <= limit and (count or not steps):
            return _of(recording, kept, chosen if len(chosen) < len(steps) else None)
    raise UsageError(
        f"the recording does not fit into {limit / 1e6:g} MB",
        where=str(recording.path or "recording"),
        measured=f"{len(manifest.tensors)} tensors, {_EACH} bytes each at most",
    )


def _evenly(steps: Sequence[int], count: int) -> frozenset[int]:
    """So many of the steps: first, last, second, and evenly between."""
    if count >= len(steps):
        return frozenset(steps)
    begin = [*steps[:1], *steps[-1:], *steps[1:2]]
    every = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    return frozenset(list(dict.fromkeys([*begin, *every]))[:count])


def _bytes_of_calls(manifest: Manifest, steps: Collection[int]) -> int:
    calls = [call for call in manifest.calls if call.step is None or call.step in steps]
    return sum(len(json.dumps([c.arguments, c.output, c.state])) + 400 for c in calls)


def _of(
    recording: Recording, kept: Sequence[TensorEntry], steps: Collection[int] | None
) -> Recording:
    manifest = recording.manifest
    settings: dict[str, Any] = dict(manifest.settings)
    calls, notes = manifest.calls, manifest.notes
    if steps is not None:
        names = {entry.name for entry in kept}
        left = [entry.name for entry in manifest.tensors if entry.name not in names]
        settings[LEFT_OUT] = [*settings.get(LEFT_OUT, ()), *left]
        settings[BUNDLED] = sorted(steps)
        calls = tuple(call for call in calls if call.step is None or call.step in steps)
        shown = ", ".join(map(str, sorted(steps)))
        notes = (*notes, f"a bundle: steps {shown} of {_count(manifest)}")
    update = {
        "level": "sketch",
        "tensors": tuple(kept),
        "settings": settings,
        "calls": calls,
        "notes": notes,
    }
    content = {entry.name: recording[entry.name] for entry in kept}
    return Recording.in_memory(content, manifest.model_copy(update=update))


def _count(manifest: Manifest) -> int:
    """Number of steps of a recording."""
    return len({entry.step for entry in manifest.tensors if entry.step is not None})
