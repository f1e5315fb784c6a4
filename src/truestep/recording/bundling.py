"""A recording small enough for an issue thread: sketches of some steps, and all that it says."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from truestep.errors import UsageError
from truestep.files import beside, settle
from truestep.recording.format import Recording
from truestep.recording.keyframes import Frames, KeyFrames, key_frames
from truestep.recording.manifest import KEY_FRAMES, LEFT_OUT, Manifest, TensorEntry
from truestep.records import SKETCH_SIZE

LIMIT = 1_000_000
"""Bytes of a bundle."""

BUNDLED = "bundled_steps"
"""Setting of a bundle: the steps that it holds, where it does not hold all."""

INSIDE, INNER = "inside", ("module", "weight")
"""Setting and kinds of what an engine's modules were given, gave and hold: left out."""

FOR_FRAMES = 0.35
"""Share of a bundle that its pictures may take where tensors need the rest."""

_EACH = 4 * SKETCH_SIZE + 8 * 8 + 700
"""Bytes that a tensor takes at most: sketch, moments, and its rows in header and manifest."""


def bundled(recording: Recording, *, limit: int = LIMIT, frames: Frames | None = None) -> Recording:
    """Sketches of as many steps as fit, the first two, the last, and others evenly between.

    Args:
        recording: At level `full`.
        limit: Bytes.
        frames: Of what it made: pictures of these are kept, as large as there is room for.

    Returns:
        At level `sketch`. Names of what is left out are in its manifest, as of a thinned recording.

    Raises:
        UsageError: Not even its first step fits, or it holds no tensors.
    """
    recording.require_tensors(where=str(recording.path or "recording"))
    manifest, notes = _outer(recording.manifest)
    entries = manifest.tensors
    steps = sorted({entry.step for entry in entries if entry.step is not None})
    room = limit - _bytes_of_the_rest(manifest)
    held = int(FOR_FRAMES * limit) if frames is not None else 0
    for count in range(len(steps), -1, -1):
        chosen = _evenly(steps, count)
        kept = [e for e in entries if e.step is None or e.step in chosen]
        need = len(kept) * _EACH + _bytes_of_calls(manifest, chosen)
        need += sum(len(e.name) + 4 for e in entries) - sum(len(e.name) + 4 for e in kept)
        if need + held <= room and (count or not steps):
            pictures = key_frames(frames, room - need) if frames is not None else None
            few = chosen if len(chosen) < len(steps) else None
            return _of(recording, manifest, kept, few, pictures, notes)
    raise UsageError(
        f"the recording does not fit into {limit / 1e6:g} MB",
        where=str(recording.path or "recording"),
        measured=f"{len(entries)} tensors, {_EACH} bytes each at most",
    )


def write_bundle(recording: Recording, path: Path, *, frames: Frames | None = None) -> Recording:
    """Write a bundle that is never larger than `LIMIT`.

    Args:
        recording: At level `full`.
        path: Where it goes.
        frames: Of what it made.

    Raises:
        UsageError: It does not fit.
        WriteError: It cannot be written.
    """
    limit = LIMIT
    while True:
        bundle = bundled(recording, limit=limit, frames=frames)
        with beside(path, "the bundle") as temporary:
            bundle.save(temporary)
            size = temporary.stat().st_size
            if size <= LIMIT:
                settle(temporary, path)
                return bundle
        limit -= max(size - LIMIT, LIMIT // 20)


def _outer(manifest: Manifest) -> tuple[Manifest, list[str]]:
    """A manifest without what is inside of an engine's models, and what is to be said of that."""
    kept = tuple(entry for entry in manifest.tensors if entry.kind not in INNER)
    if len(kept) == len(manifest.tensors):
        return manifest, []
    settings = {name: value for name, value in manifest.settings.items() if name != INSIDE}
    note = f"{len(manifest.tensors) - len(kept)} tensors of modules and weights are left out"
    return manifest.model_copy(update={"tensors": kept, "settings": settings}), [note]


def _bytes_of_the_rest(manifest: Manifest) -> int:
    """Bytes of a manifest beside its tables of tensors and calls."""
    bare = manifest.model_copy(update={"tensors": (), "calls": ()})
    return len(bare.model_dump_json().encode()) + 2000


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
    recording: Recording,
    manifest: Manifest,
    kept: Sequence[TensorEntry],
    steps: Collection[int] | None,
    pictures: KeyFrames | None,
    told: Sequence[str],
) -> Recording:
    settings: dict[str, Any] = dict(manifest.settings)
    calls, notes = manifest.calls, (*manifest.notes, *told)
    if pictures is not None:
        settings[KEY_FRAMES] = pictures.told()
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
