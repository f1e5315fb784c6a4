"""Rows of what a run on recorded inputs gave, what it looked at, and what both sides decode to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truestep.judge.floor import Limits, sample_sizes
from truestep.judge.repeats import with_second_answers
from truestep.keys import SAMPLES, is_prediction, key_of
from truestep.verdict import Comparison, Media, Row, Verdict

if TYPE_CHECKING:
    from truestep.recording.format import Recording
    from truestep.replay.answers import Answers
    from truestep.replay.kept import Replay

_NOT_KEPT = "not in this recording: --keep all"


def rows_of(run: Answers, recording: Recording, limits: Limits) -> list[Row]:
    """Judge what a run gave against what the recording holds."""
    from truestep.judge.rows import compare_tensors
    from truestep.keys import address
    from truestep.measure.structure import sample_mean

    expected = {name: recording[name] for name in run.wanted}
    actual = {
        k: v for k, v in run.replayed.outputs.items() if k in expected or address(k).stage == "text"
    }
    floor = limits.floor
    benign = [each for each in floor.runs if each.pair == limits.pair] if floor else []
    averaged = any(m.name == SAMPLES for each in benign for m in each.tensors)
    sizes = sample_sizes(benign) if averaged else {}
    if sizes and set(sizes) <= {name for name in expected if is_prediction(name)}:
        mean = sample_mean(actual, expected, sizes)
        if mean is not None:
            actual[SAMPLES], expected[SAMPLES] = mean
    rows = compare_tensors(actual, expected, limits=limits)
    rows = with_second_answers(rows, run.second, expected, run.second, limits)
    rows = [_text_by_effect(row, run.replayed, recording, limits) for row in rows]
    return [_beneath_rounding(_failed(row, run.replayed), rows) for row in rows]


def _beneath_rounding(row: Row, rows: list[Row]) -> Row:
    """Say of a drifted raised tensor that the working precision hides what it shows."""
    key = key_of(row.name)
    if row.verdict is not Verdict.DRIFTED or not key.precision or not row.metrics:
        return row
    own = str(key.working)
    working = next((r.floor for r in rows if r.name == own and r.floor), None)
    if working is None or row.metrics.rel_l2 > working.rel_l2:
        return row
    note = f"below the rounding of {working.pair.partition('/')[0]}: a small fault or a cast inside"
    return row.model_copy(update={"note": "; ".join(part for part in (note, row.note) if part)})


def coverage(recording: Recording, run: Answers) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """In words: what a run looked at, and what it did not."""
    if run.depth == "final":
        return (
            ("final latents of two free runs, one after the other",),
            (
                "each stage on its own (--depth steps)",
                "decoding: shown, not judged",
                *_one_size(recording),
            ),
        )
    from truestep.keys import STAGES, address
    from truestep.replay.steps import left_out_steps, named_steps, steps_recorded

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
    others, left = total - len(predicted), left_out_steps(recording)
    unseen = [f"guidance and update at {named_steps(left)} ({_NOT_KEPT})"] if left else []
    unseen += [f"prediction at the other {others} step{'s' * (others > 1)}"] if others else []
    if run.unseen:
        unseen.append(run.unseen)
    if "video/frames" not in recording:
        unseen.append("decoding (the reference holds no frames)")
    unseen += ["accumulation over a free run (--depth final)", *_one_size(recording)]
    return tuple(looked), tuple(unseen)


def begins_earlier(comparison: Comparison, recording: Recording) -> Comparison:
    """Say of a place at a step that those before it are not in the recording, where that is so.

    Predictions are made at the same steps by a recording that keeps all of them.
    """
    from truestep.replay.steps import left_out_steps, named_steps

    first = comparison.first_divergence
    if first is None or first.step is None or first.stage == "prediction":
        return comparison
    before = {step for step in left_out_steps(recording) if step < first.step}
    if not before:
        return comparison
    note = (
        f"{first.stage} may fail earlier: {named_steps(before)} could not be judged ({_NOT_KEPT})"
    )
    return comparison.model_copy(update={"notes": (note, *comparison.notes)})


def _one_size(recording: Recording) -> tuple[str, ...]:
    """What a reference of one size and one batch cannot show."""
    settings = recording.manifest.settings
    if not {"width", "height", "num_frames"} <= settings.keys():
        return ()
    size = "x".join(str(settings[key]) for key in ("width", "height", "num_frames"))
    clips = settings.get("videos_per_prompt") or 1
    batch = "batches (one sample only)" if clips == 1 else f"other batches than {clips} samples"
    return (f"other sizes than {size}", batch)


def _text_by_effect(row: Row, replayed: Replay, recording: Recording, limits: Limits) -> Row:
    """Judge text of another length by the prediction that the candidate makes of it."""
    from truestep.judge.rows import compare_tensors

    if row.name not in replayed.effects:
        return row
    prediction, made = replayed.effects[row.name]
    (effect,) = compare_tensors(
        {prediction: made}, {prediction: recording[prediction]}, limits=limits
    )
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
    return key_of(name).head


def _failed(row: Row, replayed: Replay) -> Row:
    """A stage that raised is `invalid`, with what it raised; a tensor it took along likewise."""
    text = replayed.failures.get(row.name)
    if text is None and row.verdict is Verdict.MISSING:
        stage = _head(row.name)
        text = next((t for n, t in replayed.failures.items() if _head(n) == stage), None)
    return (
        row
        if text is None
        else row.model_copy(update={"verdict": Verdict.INVALID, "note": f"the stage {text}"})
    )


def media_of(run: Answers, recording: Recording) -> tuple[Media, ...]:
    """What both sides decode to, from the same latent or at the end of a free run."""
    own = "the candidate's free run" if run.depth == "final" else "the reference's latent"
    found = (*_frames(run.replayed, recording), *_sound(run.replayed, recording))
    return tuple(media.model_copy(update={"origin": own}) for media in found)


def _frames(replayed: Replay, recording: Recording) -> tuple[Media, ...]:
    from truestep.judge.media import frame_media

    actual, reference = replayed.outputs.get("video/frames"), recording.get("video/frames")
    if actual is None or reference is None or actual.shape != reference.shape:
        return ()
    return (frame_media(actual, reference, name="video/frames"),)


def _sound(replayed: Replay, recording: Recording) -> tuple[Media, ...]:
    from truestep.judge.media import sound_media
    from truestep.measure.sound import sample_rate_of

    actual, reference = replayed.outputs.get("audio/waveform"), recording.get("audio/waveform")
    rate = sample_rate_of(recording.manifest.settings)
    if actual is None or reference is None or rate is None:
        return ()
    if any(side.ndim != 3 or not side.numel() for side in (actual, reference)):
        return ()
    return (sound_media(actual, reference, name="audio/waveform", sample_rate=rate),)
