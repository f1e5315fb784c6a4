"""Record a trusted run of a case: generate, capture, measure the noise floor, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from truestep.case import Case
from truestep.errors import surviving
from truestep.randomness import own_randomness
from truestep.turns import taking_turns

if TYPE_CHECKING:
    import torch

    from truestep.floors import NoiseFloor
    from truestep.progress import Progress
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Implementation, Keep, Level, Manifest
    from truestep.recording.partial import Partial
    from truestep.replay.floor import Measuring
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
    keep: Keep = "all",
    apply: Apply | None = None,
    progress: Progress | None = None,
    kept: Partial | None = None,
) -> Recording:
    """Generate a case and keep everything: text, schedule, latents, predictions, frames, floor.

    Args:
        case: What to generate.
        path: Where to write the recording (atomically); None keeps it in memory.
        level: `full` keeps the tensors; `sketch` the moments and 1,024 floats of each, from which
            distances are estimated within 5 %; `stats` the moments only.
        floor: `steps` measures the noise floor of every stage in isolation (about two generations);
            `final` also that of the final latent of a free run (about nine more); `none` neither.
        keep: Steps that are kept beside those that checks read by default, or `all`.
        apply: A change to the pipeline before it runs.
        progress: Told (what, done, total).
        kept: What is finished, of a record that is stopped.

    Returns:
        The recording: a read-only mapping from tensor name to tensor, with a manifest.

    Raises:
        CaseError, ModelLoadError, UsageError: The case cannot be run.
        UsageError: What was generated could judge nothing, or comes out otherwise each time.
        ProcessEndedError: The model or the change called sys.exit.
        WriteError: It cannot be written; an existing file is left untouched.
    """
    from truestep.replay.shared_code import taken_back
    from truestep.runtime.applying import apply_change
    from truestep.runtime.loading import load
    from truestep.runtime.stored import in_files, refuse_compiled

    with in_files():
        pipe = load(case)
    with taken_back(pipe):
        pipe = apply_change(pipe, apply)
        refuse_compiled(vars(pipe).values())
        recording = record_pipeline(
            pipe, case=case, level=level, floor=floor, keep=keep, progress=progress, kept=kept
        )
    return recording.kept(path)


@taking_turns()
@surviving("the pipeline")
def record_pipeline(
    pipe: Pipeline,
    *,
    case: Case,
    level: Level = "full",
    floor: FloorChoice = "steps",
    keep: Keep = "all",
    progress: Progress | None = None,
    kept: Partial | None = None,
) -> Recording:
    """Record a loaded pipeline; see `record`."""
    from truestep.calls.instructions import prepare
    from truestep.recording.format import Recording
    from truestep.recording.partial import NOWHERE, RUN
    from truestep.recording.table import tensor_table
    from truestep.replay.floor import Measuring
    from truestep.replay.implementation import examine

    if floor != "none" and pipe.device == "cpu":
        prepare()
    implementation = examine(pipe)
    kept = kept or NOWHERE
    if kept is not NOWHERE:
        kept.begin(_identity(pipe, case, implementation))

    def first(note: Callable[[str], None]) -> Recording:
        return _trusted_run(pipe, case, implementation, progress)

    if floor == "none":
        return _at_level(pipe, first(lambda text: None), level, keep)
    notes: list[str] = []
    run = kept.recording(RUN, first, notes.append)
    if kept.has(RUN):
        pipe.prepare(pipe)  # as a run does
    tensors = dict(run)
    known = repr((case.canonical(), pipe.weights, implementation)) if pipe.weights else ""
    how = Measuring(case, floor == "final", progress, notes.append, known, kept)
    measured = _noise_floor(pipe, tensors, run.manifest, how)
    update = {
        "tensors": tensor_table(tensors),
        "noise_floor": measured,
        "notes": (*run.manifest.notes, *notes),
    }
    whole = Recording.in_memory(tensors, run.manifest.model_copy(update=update))
    return _at_level(pipe, whole, level, keep)


def _at_level(pipe: Pipeline, whole: Recording, level: Level, keep: Keep) -> Recording:
    """What is kept of a recording; moments and sketches are small, and of every step."""
    from truestep.replay.thinning import thinned

    return thinned(pipe, whole, keep) if level == "full" else whole.at_level(level)


def _trusted_run(
    pipe: Pipeline, case: Case, implementation: Implementation, progress: Progress | None
) -> Recording:
    """Generate once and keep everything."""
    from truestep.judge.refusals import refuse_empty_run
    from truestep.recording.format import Recording
    from truestep.recording.table import manifest_of
    from truestep.replay.capture import (
        Capture,
        attention_observed,
        recorded_settings,
        run_environment,
    )
    from truestep.runtime.pipeline import generate

    capture = Capture(progress=progress, label="record")
    before = pipe.forwards
    with attention_observed(pipe) as kernels:
        generate(pipe, observer=capture, output="frames")
    refuse_empty_run(capture.tensors, where=case.id)
    manifest = manifest_of(
        capture.tensors,
        run_environment(pipe, attention=kernels()),
        case_id=case.id,
        case=case.canonical(),
        settings=recorded_settings(pipe),
        timings_s={stage: tuple(times) for stage, times in capture.seconds.items()},
        forwards=pipe.forwards - before,
        notes=tuple(pipe.fallbacks),
        implementation=implementation,
    )
    return Recording.in_memory(capture.tensors, manifest)


def _identity(pipe: Pipeline, case: Case, implementation: Implementation) -> dict[str, str]:
    """All that the numbers of a recording depend on."""
    from truestep.replay.capture import recorded_settings, run_environment
    from truestep.runtime.identity import content_of, weights_of
    from truestep.runtime.pipeline import models_of

    return {
        **content_of(case.model_dump(mode="json"), "case"),
        **run_environment(pipe, attention=None),
        **content_of(recorded_settings(pipe), "settings"),
        "implementation": implementation.model_dump_json(),
        **weights_of(models_of(pipe)),
    }


def _noise_floor(
    pipe: Pipeline, tensors: dict[str, torch.Tensor], manifest: Manifest, how: Measuring
) -> NoiseFloor:
    """Measure the floor of a run; what its raised stages give is added to its tensors before."""
    from truestep.recording.format import Recording
    from truestep.recording.table import tensor_table
    from truestep.replay.floor import measure
    from truestep.replay.raised import raised_replay
    from truestep.replay.steps import floor_steps
    from truestep.runtime.precision import raised_precision

    precision = raised_precision(pipe.settings.dtype)

    def lifted(note: Callable[[str], None]) -> Recording:
        assert precision is not None
        found = raised_replay(pipe, tensors, steps=floor_steps(tensors), precision=precision)
        outputs = {name: _as_stored(tensor) for name, tensor in found.outputs.items()}
        table = manifest.model_copy(update={"tensors": tensor_table(outputs)})
        return Recording.in_memory(outputs, table)

    if precision:
        tensors.update(how.kept.recording("raised", lifted, how.note))
    return measure(pipe, tensors, how)


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """A copy laid out as one that is read again."""
    from truestep.measure.plain import plain

    return plain(tensor).to("cpu", copy=True).contiguous()
