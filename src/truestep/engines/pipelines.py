"""Record and check a pipeline that is there, called with its own arguments.

The arguments are kept in the recording, decoded: a check needs neither them nor their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from truestep.calls.benign import more
from truestep.calls.blocks import BLOCK
from truestep.calls.check import check, check_end
from truestep.calls.choosing import chosen_steps, made_at
from truestep.calls.keys import key_of
from truestep.calls.rebuilding import CannotBuildError, build
from truestep.calls.record import record
from truestep.calls.recording import (
    CallRecording,
    content_name,
    host_copy,
    read,
    refuse_unplayable,
)
from truestep.calls.scouting import found_layouts
from truestep.calls.seen import Plan
from truestep.calls.subject import Subject, components_of, subject_of
from truestep.calls.trees import check_tree
from truestep.calls.values import Path as Place
from truestep.calls.values import encode, qualified
from truestep.environment import Environment
from truestep.errors import FileFormatError, UsageError, surviving
from truestep.floors import NoiseRun
from truestep.pairing.naming import unwrapped
from truestep.pairing.partners import check_rename
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.manifest import Keep
from truestep.recording.partial import NOWHERE, Partial
from truestep.recording.table import table_entry
from truestep.replay.check import Depth
from truestep.replay.locating import noted
from truestep.replay.meant import with_meant
from truestep.replay.opening import open_call
from truestep.replay.record import FloorChoice
from truestep.replay.shared_code import taken_back
from truestep.replay.touched import snapshot_of, touched
from truestep.runtime.applying import call_change, not_a_pipeline
from truestep.runtime.identity import content_of, device_of, weights_of
from truestep.runtime.pipeline import Code
from truestep.runtime.stored import beside
from truestep.verdict import Comparison

ARGUMENTS = "arguments"
"""Where the manifest keeps what the pipeline was called with."""

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Told:
    """What a recording says about itself beside its calls.

    Attributes:
        settings: Further settings of the manifest.
        environment: Further facts of the machine and the model.
        case_id, case: Of a case.
    """

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    case_id: str | None = None
    case: dict[str, Any] | None = None


def record_pipeline(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    floor: FloorChoice,
    keep: Keep = (),
    seed: int = 0,
    told: Told | None = None,
    progress: Progress | None = None,
    kept: Partial = NOWHERE,
) -> CallRecording:
    """Record a pipeline's calls, and what it was called with.

    Args:
        pipe: A pipeline object, or anything that `subject_of` takes.
        call: Its arguments by name.
        floor: Which noise floor is measured.
        keep: Of which steps.
        seed: Of the generator, where the call has none.
        told: What the recording is to say.
        progress: Told (what, done, total) while it runs.
        kept: What is finished, of a record that is stopped.
    """
    told = told or Told({}, {})
    with surviving("the pipeline"):
        subject = subject_of(pipe, seed=seed, **call)
        if kept is not NOWHERE:
            kept.begin(_identity(subject, call, seed, told))
        recording = record(
            subject,
            floor=floor != "none",
            keep=keep,
            end=floor == "final",
            progress=progress,
            kept=kept,
        )
    return _with_arguments(recording, call, seed, told)


def _identity(subject: Subject, call: Mapping[str, Any], seed: int, told: Told) -> dict[str, str]:
    """All that the numbers of a recording depend on."""

    def content(path: Place, tensor: torch.Tensor) -> str:
        return content_name(host_copy(tensor))

    classes = {name: qualified(type(part)) for name, part in subject.components.items()}
    return {
        **content_of(told.case or {}, "case"),
        **Environment.current(device_of(subject.components)),
        **told.environment,
        **{f"argument.{name}": repr(encode(value, content)) for name, value in call.items()},
        **{f"component.{name}": text for name, text in classes.items()},
        **content_of(told.settings.get("scheduler_config", {}), "scheduler"),
        "seed": str(seed),
        **weights_of(subject.components),
    }


def _with_arguments(
    recording: CallRecording, call: Mapping[str, Any], seed: int, told: Told
) -> CallRecording:
    manifest = recording.recording.manifest
    entries = list(manifest.tensors)
    tensors: dict[str, torch.Tensor] = {}

    def keep(path: Place, tensor: torch.Tensor) -> str:
        name = "/".join(("input", *path))
        tensors[name] = host_copy(tensor)
        entries.append(table_entry(name, tensor, len(entries), kind="input"))
        return name

    trees = {name: encode(value, keep, (name,)) for name, value in call.items()}
    update = {
        "tensors": tuple(entries),
        "settings": {**manifest.settings, ARGUMENTS: trees, "seed": seed, **told.settings},
        "environment": {**manifest.environment, **told.environment},
        "case_id": told.case_id,
        "case": told.case,
    }
    return recording.with_manifest(manifest.model_copy(update=update), tensors)


def recorded_arguments(recording: CallRecording) -> dict[str, Any]:
    """What a recorded pipeline was called with.

    Raises:
        FileFormatError: The manifest was written by something else.
        UsageError: An argument was of a kind that is not kept, such as a function.
    """
    manifest = recording.recording.manifest
    trees = manifest.settings.get(ARGUMENTS, {})
    ranks = {entry.name: len(entry.shape) for entry in manifest.tensors}
    where = str(recording.recording.path or "a recording in memory")
    values = {}
    for name, tree in trees.items() if isinstance(trees, dict) else ():
        try:
            check_tree(tree, ranks)
            values[str(name)] = build(tree, lambda n: recording.recording[n].clone(), ())
        except CannotBuildError as error:
            raise UsageError(
                f"argument {name!r} was not kept: {error}",
                where=where,
                hint="give what it is called with: check(pipeline, reference, call={...})",
            ) from None
        except ValueError as error:
            raise FileFormatError(
                f"argument {str(name)[:80]!r} cannot be read", where=where, measured=str(error)
            ) from error
    return values


def opened(reference: Recording | str | Path) -> CallRecording:
    """A recording of calls, from a path or as `record` returns it.

    Raises:
        FileFormatError: It is unreadable, or holds no calls.
        UsageError: It was recorded at a level that keeps no tensors.
    """
    if isinstance(reference, str | Path):
        return read(reference)
    if reference.path is not None:
        return read(reference.path)
    refuse_unplayable(reference, where="a recording in memory")
    return CallRecording(reference)


@dataclass(frozen=True)
class Judging:
    """How a candidate is judged: see `truestep.check`.

    Attributes:
        trusted: Makes the trusted pipeline, where the component that fails is to be opened, or a
            declared change judged; and what is entered while it runs.
        meant: What the change is declared to be.
        progress: Told (what, done, total) while it runs.
        code: Entered while the candidate runs; see `Subject.code`.
    """

    steps: tuple[int, ...] | None = None
    tolerance: float | None = None
    pair: str | None = None
    label: str = "unchanged"
    environment: Mapping[str, str] | None = None
    depth: Depth = "steps"
    rename: Mapping[str, str] | None = None
    trusted: Callable[[], tuple[Any, Code]] | None = None
    meant: str | None = None
    progress: Progress | None = None
    code: Code = nullcontext


def check_pipeline(
    pipe: Any, reference: CallRecording, call: Mapping[str, Any], judging: Judging
) -> Comparison:
    """Check a pipeline against a recording, called with arguments."""
    manifest = reference.recording.manifest
    subject = replace(_subject(pipe, reference, call), code=judging.code)
    trusted = _trusted(subject, reference, judging)
    named = replace(subject, label=judging.label)
    result = _judged(named, reference, judging)
    if trusted is not None and judging.meant is not None:
        result = _as_meant(named, trusted, reference, result, judging)
    elif trusted is not None and not result.verdict.passed:
        result = _opened(subject, trusted, reference, result, judging)
    environment = Environment({**result.actual.environment, **(judging.environment or {})})
    known = {k: v for k, v in manifest.environment.items() if k in environment}
    return result.model_copy(
        update={
            "case_id": manifest.case_id,
            "case": manifest.case or {},
            "actual": result.actual.model_copy(update={"environment": dict(environment)}),
            "environment_differences": environment.differences(
                known if judging.environment is None else manifest.environment
            ),
        }
    )


def _judged(candidate: Subject, reference: CallRecording, judging: Judging) -> Comparison:
    """The check itself."""
    with candidate.code():  # the environment that it reports is that of its change, too
        if judging.depth == "final":
            return check_end(candidate, reference, tolerance=judging.tolerance, pair=judging.pair)
        return check(
            candidate,
            reference,
            steps=judging.steps,
            tolerance=judging.tolerance,
            pair=judging.pair,
            progress=judging.progress,
        )


def _as_meant(
    candidate: Subject,
    trusted: Callable[[], Subject],
    reference: CallRecording,
    result: Comparison,
    judging: Judging,
) -> Comparison:
    """What a declared change explains of it, beside the trusted pipeline."""
    with beside(candidate.components.values()), own_randomness():
        other = trusted()
        return with_meant(
            result,
            _models(candidate),
            _models(other),
            judging.meant or "",
            code=candidate.code,
            check=lambda: _judged(candidate, reference, judging),
            locate=lambda rest: _opened(candidate, lambda: other, reference, rest, judging),
        )


def _models(subject: Subject) -> dict[str, torch.nn.Module]:
    """The components that are models, each once."""
    models: dict[str, torch.nn.Module] = {}
    for name, part in subject.components.items():
        if isinstance(part, torch.nn.Module) and unwrapped(part) not in models.values():
            models[name] = unwrapped(part)
    return models


def more_runs(
    pipe: Any,
    reference: CallRecording,
    call: Mapping[str, Any],
    *,
    runs: int,
    progress: Progress | None = None,
) -> list[NoiseRun]:
    """Further benign runs of the trusted pipeline that a recording is of; see `calls.benign`."""
    subject = _subject(pipe, reference, call)
    with own_randomness():
        plan = Plan(made_at(chosen_steps(reference, None)))
        return more(subject, reference, plan, runs=runs, progress=progress)


def _opened(
    candidate: Subject,
    trusted: Callable[[], Subject],
    reference: CallRecording,
    result: Comparison,
    judging: Judging,
) -> Comparison:
    """Open the component of the first call that failed, unless its batches are others."""
    first = result.first_divergence
    if first is not None and key_of(first.name).component == BLOCK:
        return noted(result, f"no module named: {first.fqn} is code of the pipeline itself")
    with own_randomness():
        layouts = found_layouts(candidate, reference)
    others = [str(layout) for layout in layouts.values() if not layout.same_sizes]
    if others:
        return noted(result, f"no module named: its batches are others ({'; '.join(others)})")
    with beside(candidate.components.values()), own_randomness():
        return open_call(
            candidate,
            trusted,
            reference,
            result,
            steps=judging.steps,
            rename=judging.rename,
            explain=judging.depth == "cause",
            arguments=_known_arguments(reference),
        )


def _known_arguments(reference: CallRecording) -> dict[str, Any]:
    """What a recorded pipeline was called with; nothing where that was not kept."""
    try:
        return recorded_arguments(reference)
    except UsageError:
        return {}


def _trusted(
    candidate: Subject, reference: CallRecording, judging: Judging
) -> Callable[[], Subject] | None:
    """What makes the trusted side, where it is wanted; names are checked now."""
    make = judging.trusted
    if make is None:
        return None

    def trusted() -> Subject:
        pipe, code = make()
        return replace(_subject(pipe, reference, recorded_arguments(reference)), code=code)

    if judging.rename:
        with beside(candidate.components.values()):
            sides = [side.components.values() for side in (candidate, trusted())]
            check_rename(judging.rename, candidate=sides[0], trusted=sides[1])
    return trusted


def _subject(pipe: Any, reference: CallRecording, call: Mapping[str, Any]) -> Subject:
    """A pipeline, called as the recorded one was but for its arguments."""
    seed = reference.recording.manifest.settings.get("seed", 0)
    return subject_of(pipe, seed=seed if isinstance(seed, int) else 0, **call)


def changed_alone(
    pipe: Any, change: Change | None, code: Code = nullcontext
) -> tuple[Any, Code, bool]:
    """A pipeline as a change makes it, and nothing else of the process.

    Args:
        pipe: What it is given.
        change: The user's function.
        code: Entered while the pipeline runs, as it is so far.

    Returns:
        It, what is entered while it runs, and whether the change touched anything.

    Raises:
        UsageError, ProcessEndedError: As `changed` does.
    """
    if change is None:
        return pipe, code, False
    with code():
        before = snapshot_of(pipe)
        with taken_back(pipe) as shared:
            pipe = changed(pipe, change)
            after = snapshot_of(pipe)

    @contextmanager
    def both() -> Iterator[None]:
        with code(), shared.on():
            yield

    return pipe, both, bool(touched(before, after))


def changed(pipe: Any, change: Change | None, *, what: str = "the change") -> Any:
    """What a change under test makes of a pipeline: it changes it in place, or returns another.

    Raises:
        UsageError: The function raised.
        ProcessEndedError: It called sys.exit.
    """
    if change is None:
        return pipe
    names = ", ".join(map(str, components_of(pipe) or ()))
    likely = f"it is called with a {type(pipe).__name__}: {names}"
    result = call_change(pipe, change, likely=likely, what=what)
    parts = (components_of(pipe) or {}).values()
    if result is not None and (not callable(result) or any(result is each for each in parts)):
        raise not_a_pipeline(change, result, what=what)
    return pipe if result is None else result
