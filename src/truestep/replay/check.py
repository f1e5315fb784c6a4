"""Check a candidate against a reference: replay its stages on recorded inputs, or generate anew."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from truestep.case import AnyCase, Case
from truestep.environment import library_version
from truestep.errors import (
    FOREIGN,
    ProcessEndedError,
    ReferenceNotFoundError,
    TruestepError,
    UsageError,
    is_foreign,
    one_line,
    surviving,
)
from truestep.judge.floor import Limits, free_running, pair_of
from truestep.judge.repeats import said_unsteady
from truestep.judge.seen import with_seen
from truestep.randomness import own_randomness
from truestep.replay.judging import begins_earlier, coverage, media_of, rows_of
from truestep.runtime.pipeline import by_its_code
from truestep.text import quoted
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Cost, Difference, Row, Rule, Side, Verdict

if TYPE_CHECKING:
    from truestep.progress import Progress
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.replay.answers import Answers
    from truestep.runtime.applying import Apply
    from truestep.runtime.pipeline import Pipeline

Depth = Literal["steps", "modules", "cause", "final"]
OPENS = ("modules", "cause")
"""Depths that open models."""
Expect = Literal["same", "different"]


@taking_turns()
@own_randomness()
def check(  # 12 parameters: those of `truestep.check`, without what is of pipeline objects
    case: Case,
    reference: Recording | str | Path,
    *,
    depth: Depth = "steps",
    apply: Apply | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] | None = None,
    tolerance: float | None = None,
    rename: Mapping[str, str] | None = None,
    accept: Collection[str] = (),
    expect: Expect | None = None,
    meant: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Say whether a candidate is still the same model as a recorded reference.

    Args:
        case: The reference's case.
        reference: A full recording of it, or its path.
        depth: `steps` feeds every stage the reference's recorded inputs and judges its output
            (a few forwards); `modules` also opens the model of the first stage that fails, beside
            the case's own model loaded here, and names the module; `final` generates freely and
            compares the latents.
        apply: The change under test: receives the pipeline and changes it or returns another.
        settings: Values that differ from the case (`guidance_scale`, `model`, `dtype`, ...).
        steps: At `steps`: where predictions are made; default the first and last step of every
            expert and three in a row. A model that keeps state from step to step is
            followed through all steps.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        rename: At `modules`: names of the candidate's modules to the reference's, `*` for one part
            of a dotted name. It goes before the pairs that equal names or weights give.
        accept: What a reference may be that was made by a quantised or patched implementation: each
            a part of what it is said to be (`float8_e4m3fn`, `stage combine`).
        meant: What the change is declared to be, one of `replay.meant.NAMES`: what it explains is
            told from what is broken underneath.
        progress: Told (what, done, total).

    Returns:
        The comparison. Only `assert_equivalent` raises on failure.

    Raises:
        CaseError, ModelLoadError, FileFormatError: Case, model or reference cannot be used.
        UsageError: The change raised, the reference holds no tensors to replay, or the rename map
            names modules that there are not, or is given at another depth.
    """
    from truestep.recording.format import Recording
    from truestep.replay.meant import as_meant
    from truestep.replay.shared_code import changed_alone
    from truestep.replay.touched import snapshot
    from truestep.runtime.loading import load
    from truestep.runtime.stored import beside, in_files, refuse_compiled

    refuse_options(rename, meant, depth)
    recording = reference if isinstance(reference, Recording) else Recording.open(reference)
    candidate = case.replace(**dict(settings or {}))
    label = label_of(case, candidate, apply)
    if (refused := _refuse(case, recording, accept)) is not None:
        return refused
    before: Mapping[str, object] = {}
    try:
        with surviving("the model's code"):
            with in_files():
                pipe = load(candidate)
            before = snapshot(pipe) if apply is not None else {}
            pipe = changed_alone(pipe, apply)
        refuse_compiled(vars(pipe).values())
    except ProcessEndedError as error:
        return _invalid(case, recording, label, f"{error.what}, {error.where}")
    idle = _idle(pipe, case, candidate, recording, before) if apply or settings else False
    if rename:
        with beside(vars(pipe).values()), in_files():
            _check_rename(rename, pipe, load(case))
    result = check_pipeline(
        pipe,
        recording,
        case=case,
        candidate=candidate,
        depth=depth,
        steps=steps,
        tolerance=tolerance,
        label=label,
        progress=progress,
    )
    result = expected(said_idle(result) if idle else result, expect)
    with beside(vars(pipe).values()):
        if meant is not None:
            return as_meant(pipe, case, recording, result, meant, check=check_pipeline)
        if depth not in OPENS or result.verdict in _NOTHING_TO_OPEN:
            return result
        return _opened(pipe, case, recording, result, rename, explain=depth == "cause")


@by_its_code
def _idle(
    pipe: Pipeline,
    case: Case,
    candidate: Case,
    recording: Recording,
    before: Mapping[str, object],
) -> bool:
    """Whether settings and change together left everything as the case has it."""
    from truestep.replay.touched import snapshot, touched

    changed = {difference.key for difference in candidate.differences(case.canonical())}
    where = ("device", "attention_backend")  # no part of a case's content
    changed |= {k for k in where if getattr(candidate.settings, k) != getattr(case.settings, k)}
    if pipe.weights and pipe.weights == recording.manifest.environment.get("model.weights"):
        changed -= {"model", "revision"}  # another folder with the same files
    return not changed and not (before and touched(before, snapshot(pipe)))


def said_idle(result: Comparison) -> Comparison:
    """A result whose change touched nothing says so in its first line and its last.

    Not where it is not bit for bit the same: something was touched that is not looked at.
    """
    from truestep.replay.touched import NOTHING

    if result.verdict is not Verdict.IDENTICAL:
        return result

    label = f"{result.actual.label}: {NOTHING.partition(':')[0]}"
    return result.model_copy(
        update={
            "actual": result.actual.model_copy(update={"label": label}),
            "sentence": f"{result.sentence}; the change {NOTHING}",
        }
    )


def expected(result: Comparison, expect: Expect | None) -> Comparison:
    """A result set against what the change is for."""
    if expect != "different":
        return result
    if result.verdict.passed:
        sentence = f"unmet: expected different, but {result.sentence}"
        return result.model_copy(
            update={"expect": expect, "verdict": Verdict.UNMET, "sentence": sentence}
        )
    sentence = result.sentence
    if result.verdict is Verdict.DRIFTED:
        sentence += "; as expected"
    return result.model_copy(update={"expect": expect, "sentence": sentence})


def refuse_options(rename: Mapping[str, str] | None, meant: str | None, depth: str) -> None:
    """Refuse options that another depth has, or that are not known.

    Raises:
        UsageError: See above.
    """
    from truestep.replay.meant import refuse_meant

    refuse_rename(rename, depth)
    refuse_meant(meant, depth)


def refuse_rename(rename: Mapping[str, str] | None, depth: str) -> None:
    """Refuse a rename map where no model is opened.

    Raises:
        UsageError: It is of no use.
    """
    if rename and depth not in OPENS:
        raise UsageError(
            f"a rename map is of no use at depth {depth!r}",
            hint="depth='modules' opens the models",
        )


_NOTHING_TO_OPEN = (Verdict.IDENTICAL, Verdict.EQUIVALENT, Verdict.UNMET)


def _check_rename(rename: Mapping[str, str], pipe: Pipeline, trusted: Pipeline) -> None:
    """Refuse a map that names what none of the models has, before any forward."""
    from truestep.pairing.partners import check_rename
    from truestep.runtime.pipeline import models_of

    sides = [models_of(side).values() for side in (pipe, trusted)]
    check_rename(rename, candidate=sides[0], trusted=sides[1])


def _opened(
    pipe: Pipeline,
    case: Case,
    recording: Recording,
    result: Comparison,
    rename: Mapping[str, str] | None,
    *,
    explain: bool,
) -> Comparison:
    """Follow a failing stage into its model, beside the reference's model loaded here."""
    from truestep.replay.locating import locate_module
    from truestep.runtime.loading import load
    from truestep.runtime.stored import in_files

    with in_files():
        trusted = load(case)
    same = check_pipeline(trusted, recording, case=case)
    if not same.verdict.passed:
        note = f"no module named: the case's own model is not the reference here ({same.sentence})"
        return result.model_copy(update={"notes": (*result.notes, note)})
    return locate_module(pipe, trusted, recording, result, rename=rename, explain=explain)


@taking_turns()
@by_its_code
def check_pipeline(  # 9 parameters: those of `check` that are left when the pipeline is loaded
    pipe: Pipeline,
    recording: Recording,
    *,
    case: Case,
    candidate: Case | None = None,
    depth: Depth = "steps",
    steps: tuple[int, ...] | None = None,
    tolerance: float | None = None,
    label: str = "candidate",
    progress: Progress | None = None,
) -> Comparison:
    """Check a loaded pipeline; see `check`."""
    from truestep.environment import Environment
    from truestep.judge.rows import build_comparison
    from truestep.measure.sound import sample_rate_of
    from truestep.replay.capture import attention_observed, run_environment
    from truestep.replay.shifting import with_stages

    manifest = recording.manifest
    before, start = pipe.forwards, time.perf_counter()
    limits = Limits(
        floor=free_running(manifest.noise_floor) if depth == "final" else manifest.noise_floor,
        pair=pair_of((candidate or case).dtype, case.dtype),
        tolerance=tolerance,
    )
    try:
        with attention_observed(pipe) as kernels:
            run, rows = _answered(pipe, recording, limits, depth, steps, progress)
    except TruestepError:
        raise
    except FOREIGN as error:  # outside every stage: the candidate's outcome, or our fault
        if not is_foreign(error):
            raise
        return _invalid(case, recording, label, f"the candidate raised {one_line(error)}")
    seconds = time.perf_counter() - start
    environment = run_environment(pipe, attention=kernels())
    looked, not_looked = coverage(recording, run)
    result = build_comparison(
        rows,
        case_id=case.id,
        case=case.canonical(),
        actual=Side(label=label, environment=dict(environment)),
        reference=build_side(recording),
        environment_differences=Environment(environment).differences(manifest.environment),
        looked_at=looked,
        not_looked_at=not_looked,
        media=media_of(run, recording),
        sample_rate=sample_rate_of(manifest.settings),
        notes=(*run.notes, *pipe.fallbacks),
        cost=_cost(manifest, forwards=pipe.forwards - before, seconds=seconds),
    )
    result = with_seen(said_unsteady(result), run.replayed.outputs, recording)
    result = begins_earlier(result, recording)
    if depth != "final" or tolerance is not None:
        return result
    again = partial(check_pipeline, pipe, recording, case=case, candidate=candidate)
    return with_stages(result, pipe, recording, limits, partial(again, progress=progress))


def _answered(
    pipe: Pipeline,
    recording: Recording,
    limits: Limits,
    depth: Depth,
    steps: tuple[int, ...] | None,
    progress: Progress | None,
) -> tuple[Answers, list[Row]]:
    """What a pipeline gives, freely or stage by stage, and its rows."""
    from truestep.replay.answers import repeat_failure, run_freely, run_stages

    if depth == "final":
        run = run_freely(pipe, recording, limits)
        return run, rows_of(run, recording, limits)
    run = run_stages(pipe, recording, steps, limits, progress)
    rows = rows_of(run, recording, limits)
    return run, repeat_failure(pipe, recording, rows, run, limits)


def _cost(manifest: Manifest, *, forwards: int, seconds: float) -> Cost:
    """What a check cost, beside what the recorded generation did."""
    return Cost(
        forwards=forwards,
        forwards_generation=manifest.forwards,
        seconds=seconds,
        seconds_generation=sum(sum(times) for times in manifest.timings_s.values()) or None,
    )


def _invalid(case: Case, recording: Recording, label: str, what: str) -> Comparison:
    return ended(case, what, label=label, reference=build_side(recording))


def ended(case: AnyCase, what: str, *, label: str, reference: Side) -> Comparison:
    """The result for a candidate that could not be run to its end."""
    rule = Rule(name="run", text="a candidate is judged by what it gives")
    return _unjudged(
        case, Verdict.INVALID, what, rule=rule, actual=Side(label=label), reference=reference
    )


def of_another_case(
    case: AnyCase,
    differences: Sequence[Difference],
    *,
    label: str,
    reference: Side,
    hint: str = "",
) -> Comparison:
    """The result for a reference that is not of the case."""
    keys = ", ".join(difference.key for difference in differences)
    return _unjudged(
        case,
        Verdict.INCOMPARABLE,
        f"the reference is of another case ({keys} differ)",
        rule=Rule(name="case", text="a reference judges its own case only"),
        actual=Side(label=label),
        reference=reference,
        case_differences=tuple(differences),
        hint=hint,
    )


def _unjudged(case: AnyCase, verdict: Verdict, what: str, **fields: Any) -> Comparison:
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        sentence=f"{verdict.value}: {what}",
        case_id=case.id,
        case=case.canonical(),
        **fields,
    )


def recorded_case(manifest: Manifest, *, where: str) -> dict[str, Any]:
    """The case that a reference is of.

    Raises:
        UsageError: It is of none.
    """
    if manifest.case is None:
        raise UsageError(
            "the reference is not a recording of a case",
            where=where,
            hint=f"truestep show {quoted(where)}  # truestep compare judges plain tensors",
        )
    return manifest.case


def build_side(recording: Recording) -> Side:
    """The reference as a result names it."""
    return Side(
        label="reference",
        path=str(recording.path) if recording.path else None,
        environment=dict(recording.manifest.environment),
    )


def _refuse(case: Case, recording: Recording, accept: Collection[str]) -> Comparison | None:
    """`incomparable` where the reference is of another case, or was not made by what it goes by; an
    error where it is unusable."""
    manifest = recording.manifest
    where = str(recording.path or "reference")
    recorded = recorded_case(manifest, where=where)
    recording.require_tensors(where=where)
    differences = case.differences(recorded)
    made = manifest.implementation
    strange = [
        thing
        for thing in (*made.quantised, *made.patched)
        if not any(name and name in thing for name in accept)
    ]
    side = Side(label=manifest.case_id or "", path=where, environment=dict(manifest.environment))
    if differences:
        return of_another_case(
            case,
            differences,
            label=case.id,
            reference=side,
            hint="truestep record CASE  # seeds a reference of this case; "
            "check --set KEY=VALUE tests a change of it",
        )
    if strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        kind = "quantised" if strange[0] in made.quantised else "patched"
        return _unjudged(
            case,
            Verdict.INCOMPARABLE,
            f"the reference was made by a {kind} implementation ({strange[0]}{more})",
            rule=Rule(
                name="implementation", text="a reference is what it goes by, or is asked for"
            ),
            actual=Side(label=case.id),
            reference=side,
            hint=f"--accept {quoted(strange[0])}  # compares with it all the same",
        )
    from truestep.replay.steps import require_run

    require_run(recording, where=where)
    return None


def label_of(case: AnyCase, candidate: AnyCase, apply: Apply | None) -> str:
    """What a candidate differs in, by its own account."""
    tables = ("settings.", "call.")
    parts = []
    for difference in candidate.differences(case.canonical()):
        table = next((each for each in tables if difference.key.startswith(each)), "")
        parts.append(f"{difference.key.removeprefix(table)}={difference.actual}")
    if apply is not None:
        parts.append(f"apply {getattr(apply, '__name__', 'change')}")
    return ", ".join(parts) or "unchanged"


def missing_reference(case: AnyCase, error: ReferenceNotFoundError) -> Comparison:
    """The result for a case without a reference: `missing`, with where it was looked for."""
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=Verdict.MISSING,
        sentence=error.what,
        rule=Rule(name="reference", text="a case is judged against its own reference"),
        case_id=case.id,
        case=case.canonical(),
        actual=Side(label=case.id),
        reference=Side(label="(none)"),
        notes=tuple(part for part in (error.where, error.measured, error.likely) if part),
        hint=error.hint,
    )
