"""Check a candidate against a reference: replay its stages on recorded inputs, or generate anew."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from truestep.case import Case
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
from truestep.noise import (
    RAISED,
    SAMPLES,
    NoiseFloor,
    free_running,
    is_prediction,
    pair_of,
    sample_sizes,
)
from truestep.recording.names import FINALS
from truestep.runtime.joint import AUDIO
from truestep.verdict import Comparison, Cost, Media, Row, Rule, Side, Verdict

if TYPE_CHECKING:
    import torch

    from truestep.recording.capture import Progress
    from truestep.recording.format import Recording
    from truestep.recording.replay import Replay
    from truestep.runtime.pipeline import Apply, Pipeline

Depth = Literal["steps", "modules", "final"]


def check(
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
        steps: At `steps`: where predictions are made; default first, middle, last and both sides
            of an expert switch.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        rename: At `modules`: names of the candidate's modules to the reference's, `*` for one part
            of a dotted name. It goes before the pairs that equal names or weights give.
        accept: What a reference may be that was made by a quantised or patched implementation: each
            a part of what it is said to be (`float8_e4m3fn`, `stage combine`).
        progress: Told (what, done, total).

    Returns:
        The comparison. Only `assert_equivalent` raises on failure.

    Raises:
        CaseError, ModelLoadError, FileFormatError: Case, model or reference cannot be used.
        UsageError: The change raised, the reference holds no tensors to replay, or the rename map
            names modules that there are not, or is given at another depth.
    """
    from truestep.recording.format import Recording
    from truestep.runtime.loading import load
    from truestep.runtime.pipeline import apply_change

    if rename and depth != "modules":
        raise UsageError(
            f"a rename map is of no use at depth {depth!r}", hint="--depth modules opens the models"
        )
    recording = reference if isinstance(reference, Recording) else Recording.open(reference)
    candidate = case.replace(**dict(settings or {}))
    refused = _refuse(case, recording, accept)
    if refused is not None:
        return refused
    try:
        with surviving("the model's code"):
            pipe = apply_change(load(candidate), apply)
    except ProcessEndedError as error:
        label = _label(case, candidate, apply)
        return _invalid(case, recording, label, f"{error.what}, {error.where}")
    if rename:
        _check_rename(rename, pipe, load(case))
    result = check_pipeline(
        pipe,
        recording,
        case=case,
        candidate=candidate,
        depth=depth,
        steps=steps,
        tolerance=tolerance,
        label=_label(case, candidate, apply),
        progress=progress,
    )
    if depth != "modules" or result.verdict.passed:
        return result
    return _opened(pipe, case, recording, result, rename)


def _check_rename(rename: Mapping[str, str], pipe: Pipeline, trusted: Pipeline) -> None:
    """Refuse a map that names what none of the models has, before any forward."""
    from truestep.runtime.pipeline import MODELS
    from truestep.tracing.partners import check_rename

    sides = [[getattr(side, name) for name in MODELS] for side in (pipe, trusted)]
    check_rename(rename, candidate=sides[0], trusted=sides[1])


def _opened(
    pipe: Pipeline,
    case: Case,
    recording: Recording,
    result: Comparison,
    rename: Mapping[str, str] | None,
) -> Comparison:
    """Follow a failing stage into its model, beside the reference's model loaded here."""
    from truestep.runtime.loading import load
    from truestep.tracing.locating import locate_module

    trusted = load(case)
    same = check_pipeline(trusted, recording, case=case)
    if not same.verdict.passed:
        note = f"no module named: the case's own model is not the reference here ({same.sentence})"
        return result.model_copy(update={"notes": (*result.notes, note)})
    return locate_module(pipe, trusted, recording, result, rename=rename)


def check_pipeline(
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
    from truestep.comparison.matching import build_comparison
    from truestep.environment import Environment
    from truestep.recording.capture import attention_observed, run_environment

    manifest = recording.manifest
    before, start = pipe.forwards, time.perf_counter()
    try:
        with attention_observed(pipe) as kernels:
            run = (
                _final(pipe, recording)
                if depth == "final"
                else _steps(pipe, recording, steps, progress)
            )
    except TruestepError:
        raise
    except FOREIGN as error:  # outside every stage: the candidate's outcome, or our fault
        if not is_foreign(error):
            raise
        return _invalid(case, recording, label, f"the candidate raised {one_line(error)}")
    seconds = time.perf_counter() - start
    judge = _Judge(
        floor=free_running(manifest.noise_floor) if depth == "final" else manifest.noise_floor,
        pair=pair_of((candidate or case).dtype, case.dtype),
        tolerance=tolerance,
    )
    environment = run_environment(pipe, attention=kernels())
    looked, not_looked = _coverage(recording, run)
    return build_comparison(
        _rows(run, recording, judge),
        case_id=case.id,
        case=case.canonical(),
        actual=Side(label=label, environment=dict(environment)),
        reference=build_side(recording),
        environment_differences=Environment(environment).differences(manifest.environment),
        looked_at=looked,
        not_looked_at=not_looked,
        media=_media(run, recording),
        sample_rate=_sample_rate(recording),
        notes=pipe.fallbacks,
        cost=Cost(
            forwards=pipe.forwards - before,
            forwards_generation=manifest.forwards,
            seconds=seconds,
            seconds_generation=sum(sum(times) for times in manifest.timings_s.values()) or None,
        ),
    )


def _invalid(case: Case, recording: Recording, label: str, what: str) -> Comparison:
    """The result for a candidate that could not be run to its end."""
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=Verdict.INVALID,
        sentence=f"invalid: {what}",
        rule=Rule(name="run", text="a candidate is judged by what it gives"),
        case_id=case.id,
        case=case.canonical(),
        actual=Side(label=label),
        reference=build_side(recording),
    )


def build_side(recording: Recording) -> Side:
    """The reference as a result names it."""
    return Side(
        label="reference",
        path=str(recording.path) if recording.path else None,
        environment=dict(recording.manifest.environment),
    )


@dataclass(frozen=True)
class _Run:
    """What the candidate gave, the names of the recorded tensors that it answers to, and what it
    could not be asked."""

    depth: Depth
    replayed: Replay
    wanted: tuple[str, ...]
    unseen: str = ""


class _Judge(TypedDict):
    """How rows are judged; see `compare_tensors`."""

    floor: NoiseFloor | None
    pair: str
    tolerance: float | None


def _final(pipe: Pipeline, recording: Recording) -> _Run:
    """Generate freely; what the pipeline raises is the outcome of the latent."""
    from truestep.recording.replay import Kept, Replay
    from truestep.runtime.pipeline import generate

    replayed = Replay()
    decodes = "video/frames" in recording
    watch = Kept(replayed.outputs, (*FINALS, "video/frames", f"{AUDIO}waveform"))
    run = partial(generate, pipe, observer=watch, output="frames" if decodes else "latent")
    replayed.attempt("latent/final", run)
    return _Run("final", replayed, tuple(name for name in FINALS if name in recording))


def _steps(
    pipe: Pipeline,
    recording: Recording,
    steps: tuple[int, ...] | None,
    progress: Progress | None,
) -> _Run:
    from truestep.recording.replay import chosen_steps, replay

    chosen = chosen_steps(recording, steps)
    replayed = replay(pipe, recording, steps=chosen, progress=progress, label="check")
    replayed, unseen = _with_raised(pipe, recording, replayed, chosen)
    wanted = _looked_at(recording, chosen)
    if not any(name.startswith(RAISED) for name in replayed.outputs):
        wanted = tuple(name for name in wanted if not name.startswith(RAISED))
    return _Run("steps", replayed, wanted, unseen)


def _with_raised(
    pipe: Pipeline, recording: Recording, replayed: Replay, chosen: tuple[int, ...]
) -> tuple[Replay, str]:
    """Add the stages raised to a higher precision, where the reference has them.

    A candidate that agrees bit for bit in its own precision is the same, whatever casts are written
    into it: it is not raised.

    Returns:
        The replay, and why it could not be raised, if so.
    """
    from truestep.comparison.distance import same_bits
    from truestep.recording.raised import raised_precision, raised_replay
    from truestep.recording.replay import Replay

    recorded = [name for name in recording if name.startswith(RAISED)]
    agrees = all(same_bits(v, recording[k]) for k, v in replayed.outputs.items() if k in recording)
    if not recorded or (agrees and not replayed.failures):
        return replayed, ""
    precision = recorded[0].partition("/")[0]
    if raised_precision(pipe.settings.dtype) != precision:
        return replayed, f"{precision} replay of a {pipe.settings.dtype} candidate"
    try:
        more = raised_replay(pipe, recording, steps=chosen, precision=precision)
    except (TypeError, RuntimeError) as error:
        return replayed, f"{precision} replay ({str(error).splitlines()[0]})"
    answered = [name for name in more.outputs if name in recording]
    failed = [text for text in more.failures.values() if text]
    if failed and not answered:
        return replayed, f"{precision} replay (the candidate raised {failed[0]})"
    return Replay(
        outputs={**replayed.outputs, **more.outputs},
        failures={**replayed.failures, **more.failures},
        effects={**replayed.effects, **more.effects},
    ), ""


def _rows(run: _Run, recording: Recording, judge: _Judge) -> list[Row]:
    from truestep.comparison.matching import compare_tensors
    from truestep.comparison.structure import sample_mean
    from truestep.recording.names import address

    expected = {name: recording[name] for name in run.wanted}
    actual = {
        k: v for k, v in run.replayed.outputs.items() if k in expected or address(k).stage == "text"
    }
    floor = judge["floor"]
    runs = [run for run in floor.runs if run.pair == judge["pair"]] if floor else []
    averaged = any(m.name == SAMPLES for run in runs for m in run.tensors)
    sizes = sample_sizes(runs) if averaged else {}
    if sizes and set(sizes) == {name for name in expected if is_prediction(name)}:
        mean = sample_mean(actual, expected, sizes)
        if mean is not None:
            actual[SAMPLES], expected[SAMPLES] = mean
    rows = compare_tensors(actual, expected, **judge)
    rows = [_text_by_effect(row, run.replayed, recording, judge) for row in rows]
    return [_beneath_rounding(_failed(row, run.replayed), rows) for row in rows]


def _beneath_rounding(row: Row, rows: list[Row]) -> Row:
    """Say of a drifted raised tensor that the working precision hides what it shows."""
    own = row.name.partition("/")[2]
    if row.verdict is not Verdict.DRIFTED or not row.name.startswith(RAISED) or not row.metrics:
        return row
    working = next((r.floor for r in rows if r.name == own and r.floor), None)
    if working is None or row.metrics.rel_l2 > working.rel_l2:
        return row
    note = f"below the rounding of {working.pair.partition('/')[0]}: a small fault or a cast inside"
    return row.model_copy(update={"note": "; ".join(part for part in (note, row.note) if part)})


def _refuse(case: Case, recording: Recording, accept: Collection[str]) -> Comparison | None:
    """`incomparable` where the reference is of another case, or was not made by what it goes by; an
    error where it is unusable."""
    manifest = recording.manifest
    where = str(recording.path or "reference")
    if manifest.case is None:
        raise UsageError(
            "the reference is not a recording of a case",
            where=where,
            hint="truestep compare ACTUAL REFERENCE judges plain tensors",
        )
    if manifest.level != "full":
        raise UsageError(
            f"the reference holds level {manifest.level!r} only: there are no tensors to replay",
            where=where,
            hint="truestep record CASE --level full --update",
        )
    differences = case.differences(manifest.case)
    made = manifest.implementation
    strange = [
        thing
        for thing in (*made.quantised, *made.patched)
        if not any(name and name in thing for name in accept)
    ]
    if differences:
        keys = ", ".join(d.key for d in differences)
        sentence = f"the reference is of another case ({keys} differ)"
        rule = Rule(name="case", text="a reference judges its own case only")
        hint = (
            "truestep record CASE seeds a reference of this case; "
            "--set KEY=VALUE tests a change of it"
        )
    elif strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        kind = "quantised" if strange[0] in made.quantised else "patched"
        sentence = f"the reference was made by a {kind} implementation ({strange[0]}{more})"
        rule = Rule(name="implementation", text="a reference is what it goes by, or is asked for")
        hint = f"--accept '{strange[0]}' compares with it all the same"
    else:
        from truestep.recording.replay import require_run

        require_run(recording, where=where)
        return None
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=Verdict.INCOMPARABLE,
        sentence=f"incomparable: {sentence}",
        rule=rule,
        case_id=case.id,
        case=case.canonical(),
        actual=Side(label=case.id),
        reference=Side(
            label=manifest.case_id or "", path=where, environment=dict(manifest.environment)
        ),
        case_differences=differences,
        hint=hint,
    )


def _label(case: Case, candidate: Case, apply: Apply | None) -> str:
    parts = [
        f"{key}={value}"
        for difference in candidate.differences(case.canonical())
        for key, value in [(difference.key.removeprefix("settings."), difference.actual)]
    ]
    if apply is not None:
        parts.append(f"apply {getattr(apply, '__name__', 'change')}")
    return ", ".join(parts) or "unchanged"


def _looked_at(recording: Mapping[str, torch.Tensor], chosen: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the recorded tensors that a replay at these steps answers to, in order."""
    from truestep.recording.names import address

    names = []
    for name in recording:
        place = address(name)
        if place.stage == "prediction" and place.step not in chosen:
            continue
        if name.endswith("step/0000/latent"):  # the initial latent once more
            continue
        names.append(name)
    return tuple(names)


def _coverage(recording: Recording, run: _Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """In words: what a run looked at, and what it did not."""
    if run.depth == "final":
        return (
            ("final latent of a free run",),
            ("each stage on its own (--depth steps)", "decoding: shown, not judged"),
        )
    from truestep.recording.names import STAGES, address
    from truestep.recording.replay import steps_recorded

    total = steps_recorded(recording)
    places = [address(name) for name in run.wanted]
    looked = []
    for stage in STAGES:
        steps = sorted({p.step for p in places if p.stage == stage and p.step is not None})
        branches = sorted({p.branch for p in places if p.stage == stage and p.branch})
        if not any(p.stage == stage for p in places):
            continue
        detail = f" at steps {', '.join(map(str, steps))} of {total}" if steps else ""
        if len(steps) == total - (stage == "update"):  # the first latent is no update
            detail = " at every step"
        looked.append(f"{stage}{detail}" + (f" ({', '.join(branches)})" if branches else ""))
    predicted = {p.step for p in places if p.stage == "prediction"}
    others = total - len(predicted)
    unseen = [f"prediction at the other {others} step{'s' * (others > 1)}"] if others else []
    if run.unseen:
        unseen.append(run.unseen)
    if "video/frames" not in recording:
        unseen.append("decoding (the reference holds no frames)")
    return tuple(looked), (*unseen, "accumulation over a free run (--depth final)")


def _text_by_effect(row: Row, replayed: Replay, recording: Recording, judge: _Judge) -> Row:
    """Judge text of another length by the prediction that the candidate makes of it."""
    from truestep.comparison.matching import compare_tensors

    if row.name not in replayed.effects:
        return row
    prediction, made = replayed.effects[row.name]
    effect = compare_tensors({prediction: made}, {prediction: recording[prediction]}, **judge)[0]
    lengths = (
        f"length {row.actual.shape[1]} against {row.reference.shape[1]}"
        if (row.actual and row.reference)
        else "another length"
    )
    note = f"{lengths}: judged by its effect on {prediction}"
    return effect.model_copy(
        update={
            "name": row.name,
            "stage": row.stage,
            "step": None,
            "actual": row.actual,
            "reference": row.reference,
            "note": "; ".join(part for part in (note, effect.note) if part),
        }
    )


def _head(name: str) -> str:
    """First part of a name, whatever the modality."""
    return name.removeprefix(AUDIO).split("/")[0]


def _failed(row: Row, replayed: Replay) -> Row:
    """A stage that raised is `invalid`, with what it raised; a tensor it took along likewise."""
    text = replayed.failures.get(row.name)
    if text is None and row.verdict is Verdict.MISSING:
        stage = _head(row.name)
        text = next((t for n, t in replayed.failures.items() if _head(n) == stage), None)
    return (
        row
        if text is None
        else row.model_copy(update={"verdict": Verdict.INVALID, "note": f"the stage raised {text}"})
    )


def _media(run: _Run, recording: Recording) -> tuple[Media, ...]:
    """What both sides decode to, from the same latent or at the end of a free run."""
    own = "the candidate's free run" if run.depth == "final" else "the reference's latent"
    found = (*_frames(run.replayed, recording), *_sound(run.replayed, recording))
    return tuple(media.model_copy(update={"origin": own}) for media in found)


def _frames(replayed: Replay, recording: Recording) -> tuple[Media, ...]:
    from truestep.comparison.media import frame_media

    actual, reference = replayed.outputs.get("video/frames"), recording.get("video/frames")
    if actual is None or reference is None or actual.shape != reference.shape:
        return ()
    return (frame_media(actual, reference, name="video/frames"),)


def _sound(replayed: Replay, recording: Recording) -> tuple[Media, ...]:
    from truestep.comparison.media import sound_media

    actual, reference = replayed.outputs.get("audio/waveform"), recording.get("audio/waveform")
    rate = _sample_rate(recording)
    if actual is None or reference is None or rate is None:
        return ()
    if any(side.ndim != 3 or not side.numel() for side in (actual, reference)):
        return ()
    return (sound_media(actual, reference, name="audio/waveform", sample_rate=rate),)


def _sample_rate(recording: Recording) -> int | None:
    from truestep.comparison.audio import sample_rate_of

    return sample_rate_of(recording.manifest.settings)


def missing_reference(case: Case, error: ReferenceNotFoundError) -> Comparison:
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
