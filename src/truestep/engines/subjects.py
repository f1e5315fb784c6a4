"""Record and check whatever runs: a case of the runtime, the call of a pipeline, an object."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.call_case import CallCase
from truestep.case import Case
from truestep.errors import UsageError

if TYPE_CHECKING:
    from truestep.calls.recording import CallRecording
    from truestep.engines.pipelines import Judging
    from truestep.progress import Progress
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Keep, Level
    from truestep.recording.partial import Partial
    from truestep.replay.check import Depth, Expect
    from truestep.replay.record import FloorChoice
    from truestep.runtime.applying import Apply
    from truestep.verdict import Comparison


def record(  # 11 parameters: the public record, whose options are keywords
    subject: Case | CallCase | Any,
    *,
    call: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    level: Level = "full",
    floor: FloorChoice = "steps",
    keep: Keep = (),
    apply: Apply | None = None,
    from_disk: bool = False,
    low_memory: bool = False,
    progress: Progress | None = None,
    resume: bool | Partial = False,
) -> Recording:
    """Run what is trusted once and keep everything that it computes, and a measured noise floor.

    Args:
        subject: A case, or a pipeline object of diffusers.
        call: What a pipeline object is called with, by name.
        path: Where to write the recording (atomically); None keeps it in memory. What is finished
            is kept in `PATH.partial` until then.
        level: `full` keeps the tensors, `sketch` the moments and 1,024 floats of each, from which
            distances are estimated within 5 %, and `stats` the moments only. A check needs `full`;
            any two are told apart by `compare`.
        floor: `steps` measures the noise floor of every stage, or call of a pipeline, in
            isolation; `none` none; `final` also that of the final latent of a free run.
        keep: What checks read at their default steps, and at these further ones; or `all` (five
            to ten times as much at 50 steps). Levels below `full` keep every step, and so does
            `floor="final"` of a case of truestep's runtime where no steps are named.
        apply: A change to the pipeline before it runs.
        from_disk: Of a case: leave weights above 1 MiB in their safetensors files; see `check`.
        low_memory: Of a case: keep one model in memory at a time; see `check`.
        progress: Told (what, done, total).
        resume: Go on from the last benign run that a record of the same, which was stopped, has
            finished in `PATH.partial`; from the beginning where there is none.

    Returns:
        The recording: a read-only mapping from tensor name to tensor, with a manifest.

    Raises:
        CaseError, ModelLoadError, UsageError: It cannot be run.
        UsageError: What was generated could judge nothing, or comes out otherwise each time.
        ProcessEndedError: The model or the change called sys.exit.
        UsageError: What was stopped is of something else; the error says what differs.
        WriteError: It cannot be written; an existing file is left untouched.
    """
    from truestep.recording.partial import Partial, beside
    from truestep.runtime.identity import source_of
    from truestep.runtime.stored import apart

    if not isinstance(subject, Case | CallCase):
        _refuse_of_cases(None, "record", from_disk=from_disk, low_memory=low_memory)
    options = {"floor": floor, "keep": keep, "apply": apply, "progress": progress}
    known = {"floor": floor, **source_of(apply)}
    if keep and keep != "all":  # in 16 bits, they are run in a higher precision, too
        known["keep"] = ", ".join(map(str, sorted(set(keep))))
    if isinstance(resume, Partial):
        resume.know(known)
        with apart(from_disk=from_disk, low_memory=low_memory):
            return _recorded(subject, call, path, level, {**options, "kept": resume})
    weights = apart(from_disk=from_disk, low_memory=low_memory)
    with beside(path, resume=resume) as kept, weights:
        kept.know(known)
        recording = _recorded(subject, call, path, level, {**options, "kept": kept})
        kept.remove()
    return recording


def keeps_every_step(case: Case | CallCase, floor: FloorChoice, keep: Keep) -> bool:
    """Whether a recording of a case keeps every step: where that is asked for, and where a free run
    of truestep's runtime is to be judged, which is judged by its stages at every step."""
    return keep == "all" or (not keep and floor == "final" and isinstance(case, Case))


def _recorded(
    subject: Case | CallCase | Any,
    call: Mapping[str, Any] | None,
    path: str | Path | None,
    level: Level,
    options: dict[str, Any],
) -> Recording:
    """See `record`."""
    if isinstance(subject, Case):
        from truestep.replay import record as stages

        _refuse_call(call)
        if keeps_every_step(subject, options["floor"], options["keep"]):
            options["keep"] = "all"
        return stages.record(subject, path=path, level=level, **options)
    if isinstance(subject, CallCase):
        from truestep.engines import diffusers

        _refuse_call(call)
        recording = diffusers.record(subject, **options)
    else:
        from truestep.engines.pipelines import changed, record_pipeline

        pipe = changed(subject, options.pop("apply"))
        recording = record_pipeline(pipe, call or {}, **options).recording
    recording = recording.at_level(level)
    return recording.kept(path)


def check(  # 17 parameters: the public check, whose options are keywords
    subject: Case | CallCase | Any,
    reference: Recording | str | Path,
    *,
    call: Mapping[str, Any] | None = None,
    depth: Depth = "steps",
    apply: Apply | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] | None = None,
    tolerance: float | None = None,
    rename: Mapping[str, str] | None = None,
    accept: Collection[str] = (),
    trusted: Any = None,
    expect: Expect | None = None,
    meant: str | None = None,
    from_disk: bool = False,
    low_memory: bool = False,
    remade: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Say whether a candidate is still the same model as a recorded reference.

    Args:
        subject: The reference's case, or a pipeline object of diffusers, the candidate itself.
        reference: A full recording of it, or its path.
        call: Of a pipeline object: what it is called with; None is what was recorded.
        depth: `steps` feeds every stage, or every call of a pipeline, the reference's recorded
            inputs and judges its output (a few forwards). `modules` also opens the model of the
            first stage or call that fails, beside the trusted one, and names the module. `final`
            generates freely and compares the latents.
        apply: The change under test: receives the pipeline and changes it or returns another. What
            it replaces for the whole process (a method of a class, a function of a library) is put
            back before the trusted side runs, and when the check ends.
        settings: Values that differ from the case (`guidance_scale`, `model`, `dtype`, ...).
        steps: At `steps`: where predictions are made; default the first and last step of every
            expert and three in a row. A model that keeps state from step to step is
            followed through all steps.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        rename: At `modules`: names of the candidate's modules to the reference's, `*` for one part
            of a dotted name. It goes before the pairs that equal names or weights give.
        accept: Of a case of the runtime: what a reference may be that was made by a quantised or
            patched implementation: each a part of what it is said to be (`float8_e4m3fn`).
        trusted: At `modules` and with `meant`, of a pipeline object: the trusted pipeline, another
            object. A case loads its own.
        expect: `different` where the change is for something: `unmet` if nothing changes.
        meant: What the change is declared to be (`int8`, `fp8`, `gguf:Q4_K`, ..., `auto`,
            `siblings`): a layer that it does not explain is named.
        from_disk: Of a case: leave weights above 1 MiB in their safetensors files, and read each
            whenever it is used, so that a model can be judged that is larger than the memory.
        low_memory: Of a case: leave them there, too, until their model runs, and drop them when the
            next one does: one model of the pipeline is in memory at a time.
        remade: Of a case: the reference was recorded just now, by other code, so that files which
            the case names are part of what is judged.
        progress: Told (what, done, total).

    Returns:
        The comparison. Only `assert_equivalent` raises on failure.

    Raises:
        CaseError, ModelLoadError, FileFormatError: Case, model or reference cannot be used.
        UsageError: The change raised, the reference holds no tensors to replay, or an option does
            not apply.
    """
    from truestep.replay.check import expected

    options: dict[str, Any] = {
        "depth": depth,
        "apply": apply,
        "settings": settings,
        "steps": steps,
        "tolerance": tolerance,
        "rename": rename,
    }
    if isinstance(subject, Case | CallCase):
        _refuse_call(call)
        _refuse_trusted(trusted)
        if isinstance(subject, CallCase):
            refuse_checking(depth, rename, accept, meant)
            options["remade"] = remade
        options["progress"] = progress
        options["meant"] = meant
        stages = {"accept": accept, "expect": expect}
        result = _check_apart(
            subject, reference, options, stages, from_disk=from_disk, low_memory=low_memory
        )
        return result if isinstance(subject, Case) else expected(result, expect)
    refuse_checking(depth, rename, accept, meant)
    from truestep.engines.pipelines import Judging, opened
    from truestep.replay.check import OPENS

    _refuse_of_cases(settings, "check", from_disk=from_disk, low_memory=low_memory)
    recording = opened(reference)
    _refuse_alone(subject, trusted, depth, meant)
    judging = Judging(
        steps=steps,
        tolerance=tolerance,
        depth=depth,
        rename=rename,
        trusted=(lambda: (trusted, nullcontext)) if depth in OPENS or meant else None,
        meant=meant,
        progress=progress,
    )
    return expected(_check_object(subject, recording, call, apply, judging), expect)


def _check_apart(
    case: Case | CallCase,
    reference: Recording | str | Path,
    options: dict[str, Any],
    stages: dict[str, Any],
    *,
    from_disk: bool,
    low_memory: bool,
) -> Comparison:
    """Check a case whose weights stay in their files, if that was asked for, and say so."""
    from truestep.runtime.stored import apart

    with apart(from_disk=from_disk, low_memory=low_memory) as lender:
        result = _check_case(case, reference, options, stages)
    if lender is None:
        return result
    size = sum(lender.stored.values())
    how = "read whenever they were used"
    how = "read one model at a time, and dropped when the next one ran" if low_memory else how
    note = f"weights of {size / 1e9:.2g} GB stayed on disk, and were {how}"
    note = note if size else "nothing stayed on disk: no safetensors file has a weight of 1 MiB"
    return result.model_copy(update={"notes": (*result.notes, note)})


def _check_case(
    case: Case | CallCase,
    reference: Recording | str | Path,
    options: dict[str, Any],
    stages: dict[str, Any],
) -> Comparison:
    """Check a case, whose model is loaded here; `stages` are options of truestep's runtime."""
    if isinstance(case, CallCase):
        from truestep.engines import diffusers

        return diffusers.check(case, reference, **options)
    from truestep.replay.check import check

    return check(case, reference, **stages, **options)


def _refuse_of_cases(
    settings: Mapping[str, Any] | None, verb: str, *, from_disk: bool, low_memory: bool
) -> None:
    """Refuse what needs a model that is loaded here."""
    if settings:
        raise UsageError(
            "settings are of a case, and a pipeline object has none",
            hint="give what it is called with: check(pipeline, reference, call={...})",
        )
    if from_disk or low_memory:
        option = "from_disk" if from_disk else "low_memory"
        raise UsageError(
            "a pipeline object is in memory already, and cannot be read from disk",
            hint=f"give the case: {verb}(case, ..., {option}=True)",
        )


def _check_object(
    subject: Any,
    recording: CallRecording,
    call: Mapping[str, Any] | None,
    apply: Apply | None,
    judging: Judging,
) -> Comparison:
    """Check a pipeline object, as it is changed, called with arguments or as it was recorded."""
    from truestep.engines.pipelines import changed_alone, check_pipeline, recorded_arguments
    from truestep.replay.check import said_idle

    given = recorded_arguments(recording) if call is None else call
    pipe, code, touches = changed_alone(subject, apply)
    idle = apply is not None and not touches
    result = check_pipeline(pipe, recording, given, replace(judging, code=code))
    return said_idle(result) if idle else result


def refuse_checking(
    depth: str,
    rename: Mapping[str, str] | None = None,
    accept: Collection[str] = (),
    meant: str | None = None,
) -> None:
    """Refuse what a check of calls cannot do.

    Raises:
        UsageError: An option of another depth, of cases of the runtime, or not known.
    """
    from truestep.replay.check import refuse_options

    refuse_options(rename, meant, depth)
    if accept:
        raise UsageError(
            "a reference of a plain pipeline is taken as it is: there is nothing to accept",
            hint="leave --accept out",
        )


def _refuse_alone(subject: Any, trusted: Any, depth: str, meant: str | None) -> None:
    """Refuse to open a pipeline object without a trusted one beside it."""
    from truestep.replay.check import OPENS

    if depth not in OPENS and meant is None:
        _refuse_trusted(trusted)
        return
    if trusted is None or trusted is subject:
        what, said = ("a declared change is judged", f"meant={meant!r}")
        if meant is None:
            what, said = ("depth 'modules' opens the model", "depth='modules'")
        raise UsageError(
            f"{what} beside the trusted one, and an object cannot be loaded again as it was",
            measured="a truestep.CallCase loads its own",
            hint=f"check(pipeline, reference, {said}, trusted=another_pipeline)",
        )


def _refuse_trusted(trusted: Any) -> None:
    if trusted is not None:
        raise UsageError(
            "trusted is of a pipeline object at depth 'modules', or with meant: a case loads its "
            "own",
            hint="leave trusted out",
        )


def _refuse_call(call: Mapping[str, Any] | None) -> None:
    if call is not None:
        raise UsageError(
            "call is of a pipeline object: a case holds its own",
            hint="case.replace(prompt='a cat') gives it others",
        )
