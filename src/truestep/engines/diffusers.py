"""diffusers: any of its pipelines, loaded by a case, recorded and checked by its own call."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from truestep.call_case import CallCase
from truestep.calls.subject import components_of
from truestep.engines.arguments import (
    named_missing,
    other_defaults,
    plain,
    refuse_arguments,
    said,
    signature_of,
)
from truestep.engines.folders import Model, no_class, refuse_code, scheduler_class, still
from truestep.engines.idle import settings_idle
from truestep.engines.modular import is_modular, look_at
from truestep.engines.pipelines import (
    Change,
    Judging,
    Told,
    changed,
    changed_alone,
    check_pipeline,
    opened,
    record_pipeline,
    recorded_arguments,
)
from truestep.engines.pipelines import more_runs as pipeline_runs
from truestep.engines.preparing import (
    idle_loras,
    parts_of,
    prepared,
    refuse_preparation,
    removed_named,
)
from truestep.environment import attention_kernel, usable_device
from truestep.errors import (
    MissingExtraError,
    ProcessEndedError,
    surviving,
)
from truestep.floors import NoiseRun
from truestep.judge.floor import pair_of
from truestep.progress import Progress
from truestep.recording.format import Recording
from truestep.recording.manifest import Keep, Manifest
from truestep.recording.media import read_input
from truestep.recording.partial import NOWHERE, Partial
from truestep.replay.check import (
    OPENS,
    Depth,
    ended,
    label_of,
    of_another_case,
    recorded_case,
    said_idle,
)
from truestep.replay.record import FloorChoice
from truestep.replay.shared_code import taken_back
from truestep.runtime.compiling import compile_pipeline
from truestep.runtime.loading import failures, fingerprint, folder_of, index_of, model_index, quiet
from truestep.runtime.pipeline import Code
from truestep.runtime.stored import in_files, refuse_compiled
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Difference, Side

_FILES = "sha256."
"""How the key of what a file of a case held begins; see `CallCase.sha256`."""


@taking_turns()
def record(
    case: CallCase,
    *,
    floor: FloorChoice = "steps",
    keep: Keep = (),
    apply: Change | None = None,
    progress: Progress | None = None,
    kept: Partial = NOWHERE,
) -> Recording:
    """Record a case on its pipeline; see `truestep.record`.

    Raises:
        CaseError, ModelLoadError, UsageError: The case cannot be run.
        FileFormatError: An input cannot be read.
        ProcessEndedError: The model or the change called sys.exit.
    """
    model = _looked_at(case)
    case = case.with_hashes()
    files = {name: read_input(case.files(name)) for name in case.input}
    call = {**model.signature.always, **case.call, **files}
    pipe = _in_files(case, model)
    with taken_back(pipe):  # of several cases, none has another's change
        parts = parts_of(pipe)
        pipe = changed(prepared(pipe, case), apply)
        refuse_compiled((components_of(pipe) or {}).values())
        idle = idle_loras(case)
        settings = {
            "label": "reference",
            "pipeline": model.name,
            "call": said(model.signature, call),
            "components": _components(pipe),
            "scheduler_config": _configuration(getattr(pipe, "scheduler", None)),
            **({"prepared": case.prepared} if case.prepared else {}),
            **({"idle": idle} if idle else {}),
        }
        told = Told(settings, _environment(case, model), case.id, case.canonical())
        without = removed_named(parts, pipe, case=case, change=apply)
        with named_missing(model.signature), without:
            return record_pipeline(
                pipe,
                call,
                floor=floor,
                keep=keep,
                seed=case.seed,
                told=told,
                progress=progress,
                kept=kept,
            ).recording


@taking_turns()
def check(  # 11 parameters: those of `truestep.check` that a case of calls has
    case: CallCase,
    reference: Recording | str | Path,
    *,
    apply: Change | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] | None = None,
    tolerance: float | None = None,
    depth: Depth = "steps",
    rename: Mapping[str, str] | None = None,
    meant: str | None = None,
    remade: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Check a case's pipeline, as it is changed, against a reference of the case.

    Args:
        case: The reference's case; its files are not read, the recording holds what they held.
        reference: A recording of it, or its path.
        apply: The change under test: receives the pipeline and changes it or returns another.
        settings: Values that differ from the case; see `CallCase.replace`.
        steps: At which steps models are run; default first, last and three in a row.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        depth: `modules` also opens the component of the first call that fails, beside the case's
            own model loaded here, and names the module; `final` judges the end of a free run.
        rename: At `modules`, names of the candidate's modules to the case's, `*` for one part.
        meant: What the change is declared to be; see `truestep.check`.
        remade: The reference was recorded just now, by other code: files of the case that are
            others are part of the change.
        progress: Told (what, done, total) while it runs.

    Raises:
        CaseError, ModelLoadError, FileFormatError, UsageError: Case, model or reference cannot be
            used.
    """
    recording = opened(reference)
    manifest = recording.recording.manifest
    where = str(recording.recording.path or "reference")
    case = case.with_hashes()
    candidate = case.replace(**settings).with_hashes() if settings else case
    content = recorded_case(manifest, where=where)
    label = label_of(case, candidate, apply)
    notes = [*_prepared_notes(case, candidate), *_absent_notes(case, candidate)]
    differences, others = _differences(case, content, remade=remade)
    notes += others
    if differences:
        side = Side(label=manifest.case_id or "", path=where)
        result = _of_another_case(case, differences, label, side)
        return result.model_copy(update={"notes": tuple(notes)})
    model = _looked_at(candidate)
    call = _called(case, candidate, recorded_arguments(recording))
    judging = Judging(
        steps=steps,
        tolerance=tolerance,
        pair=pair_of(candidate.dtype, case.dtype),
        label=label,
        environment=_environment(candidate, model),
        depth=depth,
        rename=rename,
        progress=progress,
        meant=meant,
        trusted=(lambda: _alone(case, _looked_at(case))) if depth in OPENS or meant else None,
    )
    try:
        with surviving("the model's code"):
            pipe, code = _alone(candidate, model)
            here = _facts(pipe, model, call, judging.environment)
            pipe, code, touches = changed_alone(pipe, apply, code)
            refuse_compiled((components_of(pipe) or {}).values())
            idle = bool(settings or apply) and settings_idle(
                case, candidate, _recorded_facts(manifest), here
            )
            idle = idle and not touches
            result = check_pipeline(pipe, recording, call, replace(judging, code=code))
    except ProcessEndedError as error:
        side = Side(label="reference", path=where)
        return ended(case, f"{error.what}, {error.where}", label=label, reference=side)
    notes += other_defaults(model.signature, manifest.settings.get("call"), call)
    result = result.model_copy(update={"notes": (*notes, *result.notes)})
    return said_idle(result) if idle else result


@taking_turns()
def more_runs(
    case: CallCase,
    reference: Recording,
    *,
    runs: int,
    progress: Progress | None = None,
) -> tuple[Comparison, list[NoiseRun]]:
    """Check that a case's pipeline still gives what its recording holds, and run it benignly.

    Returns:
        The check; and the runs, none where it did not pass.

    Raises:
        CaseError, ModelLoadError, FileFormatError, UsageError: Case, model or reference cannot be
            used.
    """
    recording = opened(reference)
    case = case.with_hashes()
    model = _looked_at(case)
    call = _called(case, case, recorded_arguments(recording))
    with surviving("the model's code"):
        pipe, code = _alone(case, model)
        with code():
            judging = Judging(label="unchanged", environment=_environment(case, model))
            same = check_pipeline(pipe, recording, call, judging)
            if not same.verdict.passed:
                return same, []
            return same, pipeline_runs(pipe, recording, call, runs=runs, progress=progress)


def _differences(
    case: CallCase, content: Mapping[str, Any], *, remade: bool
) -> tuple[tuple[Difference, ...], list[str]]:
    """Differences from the recorded case; where it was remade, those of files as a note."""
    differences = case.differences(content)
    if not remade:
        return differences, []
    others = [d.key.removeprefix(_FILES) for d in differences if d.key.startswith(_FILES)]
    notes = [f"changed in the case: {', '.join(others)}"] if others else []
    return tuple(d for d in differences if not d.key.startswith(_FILES)), notes


def _of_another_case(
    case: CallCase, differences: tuple[Difference, ...], label: str, reference: Side
) -> Comparison:
    """What is said where the recorded case is another, or its files were."""
    other = any(difference.key.startswith(_FILES) for difference in differences)
    hint = "truestep record CASE --update  # takes the files as they are now" if other else ""
    return of_another_case(case, differences, label=label, reference=reference, hint=hint)


def _called(case: CallCase, candidate: CallCase, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the candidate is called with: what was recorded, but for what its case changes."""
    other = [name for name in candidate.input if candidate.input[name] != case.input.get(name)]
    call = {**recorded, **candidate.call}
    call |= {name: read_input(candidate.files(name)) for name in other}
    dropped = {*case.call, *case.input} - {*candidate.call, *candidate.input}
    return {name: value for name, value in call.items() if name not in dropped}


def _prepared_notes(case: CallCase, candidate: CallCase) -> list[str]:
    """How both sides are prepared, where one is."""
    if candidate.prepared == case.prepared:
        return [f"prepared: {case.prepared}"] if case.prepared else []
    sides = f"reference {case.prepared or 'not'}; candidate {candidate.prepared or 'not'}"
    return [f"prepared: {sides}"]


def _absent_notes(case: CallCase, candidate: CallCase) -> list[str]:
    """Which inputs are judged as they were recorded, since their files are not there."""
    return [
        f"judged with the recorded {name}; {', '.join(map(str, case.files(name)))} is not there"
        for name in case.input
        if f"input.{name}" not in case.sha256 and candidate.input.get(name) == case.input[name]
    ]


def _facts(
    pipe: Any, model: Model, call: Mapping[str, Any], environment: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a loaded candidate is, in the words of a recording."""
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "call": said(model.signature, call),
        "pipeline": model.name,
        "scheduler": (type(scheduler).__name__, _configuration(scheduler)),
        "weights": (environment or {}).get("model.weights"),
    }


def _recorded_facts(manifest: Manifest) -> dict[str, Any]:
    kept = manifest.settings
    parts = kept.get("components")
    name = parts.get("scheduler") if isinstance(parts, dict) else None
    return {
        "call": kept.get("call"),
        "pipeline": kept.get("pipeline"),
        "scheduler": (name, kept.get("scheduler_config")) if name else None,
        "weights": manifest.environment.get("model.weights"),
    }


def refuse(case: CallCase) -> None:
    """Refuse what can be told of a case before its weights are loaded.

    Raises:
        CaseError, ModelLoadError: The model, its class, an argument or the scheduler is wrong.
    """
    _looked_at(case)


def _looked_at(case: CallCase) -> Model:
    """Everything that can be wrong before weights are loaded."""
    try:
        importlib.import_module("diffusers")
        importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "diffusers", "running a model") from None
    folder = folder_of(case)
    index = model_index(folder)
    with still("transformers"):
        modular = is_modular(case, folder)
        model = (look_at if modular else _standard)(case, folder, index)
        refuse_arguments(model.signature, case)
        refuse_preparation(case, model.pipeline)
        return model


def _standard(case: CallCase, folder: Path, index: Mapping[str, Any]) -> Model:
    """A pipeline of one class."""
    refuse_code(index_of(folder), index)
    pipeline: Any = _pipeline_class(case, str(index.get("_class_name")), folder)

    def load(dtype: Any) -> Any:
        return pipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )

    return Model(
        folder=folder,
        name=pipeline.__name__,
        pipeline=pipeline,
        signature=signature_of(pipeline),
        scheduler=scheduler_class(case, index.get("scheduler"), folder),
        load=load,
    )


def _pipeline_class(case: CallCase, own: str, folder: Path) -> type:
    import diffusers

    name = case.pipeline or own
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and any("__call__" in vars(base) for base in cls.__mro__):
        return cls
    where = str(folder / "model_index.json") if case.pipeline is None else "pipeline"
    raise no_class(name, "Pipeline", where=where)


def unread(case: CallCase) -> tuple[Any, dict[str, Any]]:
    """The prepared pipeline of a case, with its weights in their files, and what it is called with.

    Raises:
        CaseError, ModelLoadError, FileFormatError: The case cannot be run.
    """
    model = _looked_at(case)
    files = {name: read_input(case.files(name)) for name in case.input}
    pipe = compile_pipeline(prepared(_in_files(case, model), case), case.compile)
    return pipe, {**model.signature.always, **case.call, **files}


def _in_files(case: CallCase, model: Model) -> Any:
    """The pipeline, with its weights in their files where a lender is on."""
    with in_files():
        return _loaded(case, model)


def _alone(case: CallCase, model: Model) -> tuple[Any, Code]:
    """The prepared pipeline, and what is entered while it runs: what preparing it replaced for the
    whole process is not there for another one, which is prepared by itself."""
    pipe = _in_files(case, model)
    with taken_back(pipe) as shared:
        pipe = prepared(pipe, case)
    return compile_pipeline(pipe, case.compile), shared.on


def _loaded(case: CallCase, model: Model) -> Any:
    """The pipeline, as `from_pretrained` loads it, with the scheduler that the case asks for."""
    import torch

    device = usable_device(case.device)
    with quiet(), still("transformers"), failures(case.model, model.folder):
        pipe = model.load(getattr(torch, case.dtype))
        pipe.to(device)
        if model.scheduler is not None:
            scheduler: Any = model.scheduler
            config = pipe.scheduler.config
            pipe.scheduler = scheduler.from_config(config, **case.scheduler_settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _environment(case: CallCase, model: Model) -> dict[str, str]:
    """Where it runs and what: facts that a result names where they differ."""
    from truestep.environment import Environment

    device = usable_device(case.device)
    kernel = attention_kernel(device, case.dtype)
    here = dict(Environment.current(device, attention=kernel))
    return {**here, "model.weights": fingerprint(model.folder)}


def _components(pipe: Any) -> dict[str, str]:
    return {k: type(v).__name__ for k, v in pipe.components.items() if v is not None}


def _configuration(scheduler: Any) -> dict[str, Any]:
    config = dict(getattr(scheduler, "config", {}))
    return {str(key): plain(value) for key, value in config.items()}
