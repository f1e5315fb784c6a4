"""Record a trusted run of a case: generate, capture, measure the noise floor, write."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from truestep.case import Case
from truestep.environment import library_version
from truestep.errors import surviving
from truestep.randomness import own_randomness
from truestep.turns import taking_turns

if TYPE_CHECKING:
    import torch

    from truestep.floors import NoiseFloor
    from truestep.progress import Progress
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Level
    from truestep.runtime.applying import Apply
    from truestep.runtime.pipeline import Pipeline

FloorChoice = Literal["none", "steps", "final"]


@taking_turns()
@surviving("the model")
@own_randomness()
def record(
    case: Case,
    *,
    path: str | Path | None = None,
    level: Level = "full",
    floor: FloorChoice = "steps",
    apply: Apply | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Generate a case and keep everything: text, schedule, latents, predictions, frames, floor.

    Args:
        case: What to generate.
        path: Where to write the recording (atomically); None keeps it in memory.
        level: `full` keeps the tensors; `sketch` the moments and 1,024 floats of each, from which
            distances are estimated within 5 %; `stats` the moments only.
        floor: `steps` measures the noise floor of every stage in isolation (about two generations);
            `final` also that of the final latent of a free run (about nine more); `none` neither.
        apply: A change to the pipeline before it runs.
        progress: Told (what, done, total).

    Returns:
        The recording: a read-only mapping from tensor name to tensor, with a manifest.

    Raises:
        CaseError, ModelLoadError, UsageError: The case cannot be run.
        UsageError: What was generated could judge nothing, or comes out otherwise each time.
        ProcessEndedError: The model or the change called sys.exit.
        WriteError: It cannot be written; an existing file is left untouched.
    """
    from truestep.runtime.applying import apply_change
    from truestep.runtime.loading import load

    recording = record_pipeline(
        apply_change(load(case), apply), case=case, level=level, floor=floor, progress=progress
    )
    if path is None:
        return recording
    recording.save(path)
    return type(recording).open(path)


@taking_turns()
@surviving("the pipeline")
def record_pipeline(
    pipe: Pipeline,
    *,
    case: Case,
    level: Level = "full",
    floor: FloorChoice = "steps",
    progress: Progress | None = None,
) -> Recording:
    """Record a loaded pipeline; see `record`."""
    from truestep.calls.instructions import prepare
    from truestep.judge.refusals import refuse_empty_run
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.recording.table import tensor_table
    from truestep.replay.capture import (
        Capture,
        attention_observed,
        recorded_settings,
        run_environment,
    )
    from truestep.replay.implementation import examine
    from truestep.runtime.pipeline import generate

    if floor != "none" and pipe.device == "cpu":
        prepare()
    implementation = examine(pipe)
    capture = Capture(progress=progress, label="record")
    before = pipe.forwards
    with attention_observed(pipe) as kernels:
        generate(pipe, observer=capture, output="frames")
    forwards = pipe.forwards - before
    refuse_empty_run(capture.tensors, where=case.id)
    notes: list[str] = []
    measured: NoiseFloor | None = None
    if floor != "none":
        measured = _noise_floor(
            pipe,
            capture.tensors,
            case=case,
            final=floor == "final",
            progress=progress,
            note=notes.append,
            identity=repr((case.canonical(), pipe.weights, implementation)) if pipe.weights else "",
        )
    manifest = Manifest(
        tool_version=library_version("truestep") or "",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        level=level,
        case_id=case.id,
        case=case.canonical(),
        settings=recorded_settings(pipe),
        environment=dict(run_environment(pipe, attention=kernels())),
        tensors=tensor_table(capture.tensors),
        timings_s={stage: tuple(times) for stage, times in capture.seconds.items()},
        forwards=forwards,
        noise_floor=measured,
        notes=(*pipe.fallbacks, *notes),
        implementation=implementation,
    )
    return Recording.in_memory(capture.tensors, manifest)


def _noise_floor(pipe: Pipeline, tensors: dict[str, torch.Tensor], **options: Any) -> NoiseFloor:
    """Measure the floor of a run; what its raised stages give is added to its tensors before."""
    from truestep.replay.floor import measure
    from truestep.replay.raised import raised_replay
    from truestep.replay.stages import floor_steps
    from truestep.runtime.precision import raised_precision

    precision = raised_precision(pipe.settings.dtype)
    if precision:
        lifted = raised_replay(pipe, tensors, steps=floor_steps(tensors), precision=precision)
        tensors.update(lifted.outputs)
    return measure(pipe, tensors, **options)
