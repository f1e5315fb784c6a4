"""diffusers: any of its pipelines, loaded by a case, recorded and checked by its own call."""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.call_case import CallCase
from truestep.engines.idle import settings_idle
from truestep.engines.pipelines import (
    Change,
    Judging,
    Told,
    changed,
    check_pipeline,
    opened,
    record_pipeline,
    recorded_arguments,
)
from truestep.engines.preparing import prepared, refuse_preparation
from truestep.environment import attention_kernel, library_version, usable_device
from truestep.errors import (
    CaseError,
    MissingExtraError,
    ModelLoadError,
    ProcessEndedError,
    surviving,
)
from truestep.judge.floor import pair_of
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.media import read_input
from truestep.replay.check import ended, label_of, of_another_case, recorded_case, said_idle
from truestep.replay.touched import snapshot_of, touched
from truestep.runtime.loading import failures, fingerprint, folder_of, model_index, quiet
from truestep.text import nearest
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Side

_LIBRARIES = ("diffusers", "transformers")
_NO_ARGUMENTS = ("self", "generator")


@dataclass(frozen=True)
class _Model:
    """A model folder that was looked at, and is not loaded yet."""

    folder: Path
    pipeline: type
    scheduler: type | None


@taking_turns()
def record(case: CallCase, *, floor: bool = True, apply: Change | None = None) -> Recording:
    """Record a case on its pipeline.

    Raises:
        CaseError, ModelLoadError, UsageError: The case cannot be run.
        FileFormatError: An input cannot be read.
        ProcessEndedError: The model or the change called sys.exit.
    """
    model = _looked_at(case)
    case = case.with_hashes()
    call = {**case.call, **{name: read_input(case.files(name)) for name in case.input}}
    pipe = changed(prepared(_loaded(case, model), case), apply)
    settings = {
        "label": "reference",
        "pipeline": model.pipeline.__name__,
        "call": _said(model.pipeline, call),
        "components": _components(pipe),
        "scheduler_config": _configuration(getattr(pipe, "scheduler", None)),
        **({"prepared": case.prepared} if case.prepared else {}),
    }
    told = Told(settings, _environment(case, model), case.id, case.canonical())
    return record_pipeline(pipe, call, floor=floor, seed=case.seed, told=told).recording


@taking_turns()
def check(
    case: CallCase,
    reference: Recording | str | Path,
    *,
    apply: Change | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] | None = None,
    tolerance: float | None = None,
    modules: bool = False,
    rename: Mapping[str, str] | None = None,
) -> Comparison:
    """Check a case's pipeline, as it is changed, against a reference of the case.

    Args:
        case: The reference's case; its files are not read, the recording holds what they held.
        reference: A recording of it, or its path.
        apply: The change under test: receives the pipeline and changes it or returns another.
        settings: Values that differ from the case; see `CallCase.replace`.
        steps: At which steps models are run; default first, last and three in a row.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        modules: Open the component of the first call that fails, beside the case's own model
            loaded here, and name the module.
        rename: Then, names of the candidate's modules to the case's, `*` for one part.

    Raises:
        CaseError, ModelLoadError, FileFormatError, UsageError: Case, model or reference cannot be
            used.
    """
    recording = opened(reference)
    manifest = recording.recording.manifest
    where = str(recording.recording.path or "reference")
    candidate = case.replace(**dict(settings or {})).with_hashes()
    case = case.with_hashes()
    content = recorded_case(manifest, where=where)
    label = label_of(case, candidate, apply)
    notes = [*_prepared_notes(case, candidate), *_absent_notes(case, candidate)]
    differences = case.differences(content)
    if differences:
        side = Side(label=manifest.case_id or "", path=where)
        other = any(difference.key.startswith("sha256.") for difference in differences)
        hint = "truestep record CASE --update  # takes the files as they are now" if other else ""
        result = of_another_case(case, differences, label=label, reference=side, hint=hint)
        return result.model_copy(update={"notes": tuple(notes)})
    model = _looked_at(candidate)
    call = _called(case, candidate, recorded_arguments(recording))
    judging = Judging(
        steps=steps,
        tolerance=tolerance,
        pair=pair_of(candidate.dtype, case.dtype),
        label=label,
        environment=_environment(candidate, model),
        rename=rename,
        trusted=(lambda: prepared(_loaded(case, _looked_at(case)), case)) if modules else None,
    )
    try:
        with surviving("the model's code"):
            pipe = prepared(_loaded(candidate, model), candidate)
            here = _facts(pipe, model, call, judging.environment)
            before = snapshot_of(pipe) if apply else {}
            pipe = changed(pipe, apply)
            idle = bool(settings or apply) and settings_idle(
                case, candidate, _recorded_facts(manifest), here
            )
            idle = idle and not touched(before, snapshot_of(pipe) if apply else {})
            result = check_pipeline(pipe, recording, call, judging)
    except ProcessEndedError as error:
        side = Side(label="reference", path=where)
        return ended(case, f"{error.what}, {error.where}", label=label, reference=side)
    notes += _other_defaults(model.pipeline, manifest.settings.get("call"), call)
    result = result.model_copy(update={"notes": (*notes, *result.notes)})
    return said_idle(result) if idle else result


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
    pipe: Any, model: _Model, call: Mapping[str, Any], environment: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a loaded candidate is, in the words of a recording."""
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "call": _said(model.pipeline, call),
        "pipeline": model.pipeline.__name__,
        "scheduler": (type(scheduler).__name__, _configuration(scheduler)),
        "weights": (environment or {}).get("model.weights"),
    }


def _recorded_facts(manifest: Manifest) -> dict[str, Any]:
    said = manifest.settings
    parts = said.get("components")
    name = parts.get("scheduler") if isinstance(parts, dict) else None
    return {
        "call": said.get("call"),
        "pipeline": said.get("pipeline"),
        "scheduler": (name, said.get("scheduler_config")) if name else None,
        "weights": manifest.environment.get("model.weights"),
    }


@contextmanager
def _still() -> Iterator[None]:
    """Let transformers say nothing of optional packages while its classes are imported."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def refuse(case: CallCase) -> None:
    """Refuse what can be told of a case before its weights are loaded.

    Raises:
        CaseError, ModelLoadError: The model, its class, an argument or the scheduler is wrong.
    """
    _looked_at(case)


def _looked_at(case: CallCase) -> _Model:
    """Everything that can be wrong before weights are loaded."""
    try:
        importlib.import_module("diffusers")
        importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "diffusers", "running a model") from None
    folder = folder_of(case)
    index = model_index(folder)
    with _still():
        _refuse_code(folder, index)
        pipeline = _pipeline_class(case, str(index.get("_class_name")), folder)
        _refuse_arguments(pipeline, case)
        refuse_preparation(case, pipeline)
        return _Model(folder, pipeline, _scheduler_class(case, index, folder))


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a model that brings code: none is run that is not an installed library's."""
    from diffusers import pipelines

    strange = "" if isinstance(index.get("_class_name"), str) else "the pipeline"
    for part, kind in index.items():
        if part.startswith("_") or not isinstance(kind, list) or len(kind) != 2 or kind[0] is None:
            continue
        library = str(kind[0])
        if library.partition(".")[0] not in _LIBRARIES and not hasattr(pipelines, library):
            strange = strange or f"{part} is of {library}.{kind[1]}"
    if strange:
        raise ModelLoadError(
            "the model brings code of its own, which is not run",
            where=str(folder / "model_index.json"),
            measured=f"{strange}, not of {' or '.join(_LIBRARIES)}",
            likely="made for custom_pipeline= or trust_remote_code=True",
            hint=f"truestep show {shlex.quote(str(folder))}  # says what it holds",
        )


def _pipeline_class(case: CallCase, own: str, folder: Path) -> type:
    import diffusers

    name = case.pipeline or own
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and any("__call__" in vars(base) for base in cls.__mro__):
        return cls
    where = str(folder / "model_index.json") if case.pipeline is None else "pipeline"
    raise _no_class(name, "Pipeline", where=where)


def _no_class(name: str, kind: str, *, where: str) -> CaseError:
    """The error for a class of a kind (`Pipeline`, `Scheduler`) that the library has not."""
    import diffusers

    known = [each for each in dir(diffusers) if each.endswith(kind)]
    return CaseError(
        f"diffusers has no {kind.lower()} class {name!r}",
        where=where,
        measured=f"diffusers {library_version('diffusers')}, {len(known)} classes",
        likely=nearest(name, known),
        hint="truestep doctor",
    )


def _refuse_arguments(pipeline: type, case: CallCase) -> None:
    """Refuse arguments that the call has not, and a call without what it needs."""
    parameters = inspect.signature(pipeline.__call__).parameters
    names = [name for name in parameters if name not in _NO_ARGUMENTS]
    given = [*case.call, *case.input]
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "generator" in given:
        raise CaseError(
            "a generator is made from the case's seed",
            where=f"{pipeline.__name__}.__call__",
            hint="leave generator out of the case",
        )
    for name in given:
        if name not in names and not free:
            raise CaseError(
                f"the call has no argument {name!r}",
                where=f"{pipeline.__name__}.__call__",
                measured=f"it has: {', '.join(names)}",
                likely=nearest(name, [*names, *CallCase.model_fields]),
            )
    for name in names:
        parameter = parameters[name]
        ordinary = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if ordinary and parameter.default is inspect.Parameter.empty and name not in given:
            raise CaseError(
                f"the call needs {name}, which is not given",
                where=f"{pipeline.__name__}.__call__",
                hint=f"give --input {name}=PATH or --set {name}=VALUE, or it in the case",
            )


def _scheduler_class(case: CallCase, index: Mapping[str, Any], folder: Path) -> type | None:
    """The scheduler class that a case asks for, if any."""
    import diffusers

    if case.scheduler is None and not case.scheduler_settings:
        return None
    own = index.get("scheduler")
    if not isinstance(own, list) or len(own) != 2 or own[1] is None:
        raise CaseError("the model has no scheduler to replace", where=str(folder))
    name = case.scheduler or str(own[1])
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and hasattr(cls, "set_timesteps")):
        raise _no_class(name, "Scheduler", where="scheduler")
    settings = [n for n in inspect.signature(cls).parameters if n != "self"]
    for key in case.scheduler_settings:
        if key not in settings:
            raise CaseError(
                f"{name} has no setting {key!r}",
                where="scheduler_settings",
                measured=f"it has: {', '.join(settings)}",
                likely=nearest(key, settings),
            )
    return cls


def _loaded(case: CallCase, model: _Model) -> Any:
    """The pipeline, as `from_pretrained` loads it, with the scheduler that the case asks for."""
    import torch

    cls: Any = model.pipeline
    device = usable_device(case.device)
    with quiet(), _still(), failures(case.model, model.folder):
        pipe = cls.from_pretrained(
            model.folder,
            dtype=getattr(torch, case.dtype),
            use_safetensors=True,
            local_files_only=True,
        )
        pipe.to(device)
        if model.scheduler is not None:
            scheduler: Any = model.scheduler
            config = pipe.scheduler.config
            pipe.scheduler = scheduler.from_config(config, **case.scheduler_settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _environment(case: CallCase, model: _Model) -> dict[str, str]:
    """Where it runs and what: facts that a result names where they differ."""
    from truestep.environment import Environment

    device = usable_device(case.device)
    kernel = attention_kernel(device, case.dtype)
    here = dict(Environment.current(device, attention=kernel))
    return {**here, "model.weights": fingerprint(model.folder)}


def _said(pipeline: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call as JSON: what was given, and the pipeline's defaults."""
    parameters = inspect.signature(pipeline.__call__).parameters
    names = [n for n, p in parameters.items() if p.default is not inspect.Parameter.empty]
    values = {**{name: parameters[name].default for name in names}, **call}
    return {k: _plain(v) for k, v in values.items() if k not in _NO_ARGUMENTS}


def _plain(value: Any) -> Any:
    """A value as JSON; of what JSON does not hold, what it is."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    size = getattr(value, "size", None)
    shape = getattr(value, "shape", size if isinstance(size, tuple) else ())
    sizes = "x".join(map(str, shape))
    return f"{type(value).__name__} {sizes}".strip()


def _other_defaults(pipeline: type, recorded: object, call: Mapping[str, Any]) -> list[str]:
    """Defaults that the pipeline had when it was recorded, and has no more."""
    now = _said(pipeline, call)
    before = recorded if isinstance(recorded, dict) else {}
    return [
        f"default of {name}: {now.get(name, '(none)')!r:.60} here, {before[name]!r:.60} recorded"
        for name in sorted(before)
        if name not in call and now.get(name) != before[name]
    ]


def _components(pipe: Any) -> dict[str, str]:
    return {k: type(v).__name__ for k, v in pipe.components.items() if v is not None}


def _configuration(scheduler: Any) -> dict[str, Any]:
    config = dict(getattr(scheduler, "config", {}))
    return {str(key): _plain(value) for key, value in config.items()}
