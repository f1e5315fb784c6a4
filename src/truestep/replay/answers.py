"""What a candidate answers to a recording: stages on recorded inputs, some of them asked twice, or
free runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from truestep.joint import AUDIO
from truestep.judge.floor import Limits
from truestep.judge.repeats import UNSTEADY, differing
from truestep.keys import FINALS, is_prediction, key_of
from truestep.verdict import Row, Verdict

if TYPE_CHECKING:
    import torch

    from truestep.progress import Progress
    from truestep.recording.format import Recording
    from truestep.replay.kept import Replay
    from truestep.runtime.pipeline import Pipeline

Depth = Literal["steps", "modules", "cause", "final"]


@dataclass(frozen=True)
class Answers:
    """What the candidate gave, the names of the recorded tensors that it answers to, what it could
    not be asked, and what there is to say.

    `second` holds answers that were given again and are not the first ones.
    """

    depth: Depth
    replayed: Replay
    wanted: tuple[str, ...]
    unseen: str = ""
    second: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def run_freely(pipe: Pipeline, recording: Recording, limits: Limits) -> Answers:
    """Generate freely, twice: the second run shows what the first one left behind.

    What the pipeline raises is the outcome of the latent.
    """
    from truestep.replay.kept import Kept, Replay
    from truestep.runtime.pipeline import generate

    runs = (Replay(), Replay())
    decodes = "video/frames" in recording
    for replayed in runs:
        watch = Kept(replayed.outputs, (*FINALS, "video/frames", f"{AUDIO}waveform"))
        run = partial(generate, pipe, observer=watch, output="frames" if decodes else "latent")
        replayed.attempt("latent/final", run)
    first, again = runs
    wanted = tuple(name for name in FINALS if name in recording)
    ended = {name: first.outputs[name] for name in wanted if name in first.outputs}
    second = {name: again.outputs[name] for name in differing(ended, again.outputs, limits)}
    first.failures |= {name: text for name, text in again.failures.items() if text}
    return Answers("final", first, wanted, second=second)


def run_stages(
    pipe: Pipeline,
    recording: Recording,
    steps: tuple[int, ...] | None,
    limits: Limits,
    progress: Progress | None,
) -> Answers:
    """Replay every stage; follow a model that keeps state through all steps, in order."""
    from truestep.replay.stages import predict_steps, replay
    from truestep.replay.steps import chosen_steps, keeps_step

    chosen = chosen_steps(recording, steps)
    told = progress and partial(progress, "check")
    replayed = replay(pipe, recording, steps=chosen, again=True, progress=told)
    changed = differing(replayed.outputs, replayed.again, limits)
    predicted = predict_steps(pipe, chosen)
    second = {name: replayed.again[name] for name in changed}
    notes: tuple[str, ...] = ()
    if any(is_prediction(name) for name in changed):
        predicted = predict_steps(pipe, chosen, in_order=True)
        told = progress and partial(progress, "replay")
        followed = replay(
            pipe, recording, steps=chosen, only=_UP_TO_PREDICTION, in_order=True, progress=told
        )
        second = _fresh(replayed, changed)
        replayed = _in_order(replayed, followed)
        notes = (_stateful(recording, max(chosen)),)
    in_order = predicted != chosen
    predicted = tuple(step for step in predicted if keeps_step(recording, step))
    replayed, unseen = _with_raised(pipe, recording, replayed, predicted, in_order=in_order)
    wanted = answered_names(recording, predicted)
    if not any(key_of(name).precision for name in replayed.outputs):
        wanted = tuple(name for name in wanted if not key_of(name).precision)
    elif unseen:
        made = replayed.outputs
        wanted = tuple(name for name in wanted if not key_of(name).precision or name in made)
    return Answers("steps", replayed, wanted, unseen, second, notes)


_UP_TO_PREDICTION = ("text", "connector", "schedule", "latent", "prediction")


def _stateful(recording: Recording, last: int) -> str:
    """What is said of a model that had to be followed."""
    from truestep.replay.steps import kept_steps

    kept, run = kept_steps(recording), f"at every step from 0 to {last}"
    judged = f"it was run, and is judged, {run}"
    if kept is not None and not kept.issuperset(range(last + 1)):
        steps = ", ".join(str(step) for step in sorted(kept) if step <= last)
        judged = f"it was run {run}, and is judged at steps {steps}: the recording keeps no others "
        judged += "(--keep all)"
    return f"the model keeps state from step to step, for {UNSTEADY}: {judged}"


def _fresh(replayed: Replay, changed: Collection[str]) -> dict[str, torch.Tensor]:
    """Answers to be judged beside those of a run in order: repeated texts, and what a model that
    had not run before said at step 0."""
    from truestep.keys import address

    texts = {name: replayed.again[name] for name in changed if not is_prediction(name)}
    start = {
        name: value
        for name, value in replayed.outputs.items()
        if is_prediction(name) and address(name).step == 0
    }
    return texts | start


def _in_order(replayed: Replay, followed: Replay) -> Replay:
    """A replay whose predictions are those of a run through all steps."""
    kept = {name: value for name, value in replayed.outputs.items() if not is_prediction(name)}
    ran = {name: value for name, value in followed.outputs.items() if is_prediction(name)}
    return replace(
        replayed, outputs=kept | ran, failures={**replayed.failures, **followed.failures}
    )


def repeat_failure(
    pipe: Pipeline, recording: Recording, rows: list[Row], run: Answers, limits: Limits
) -> list[Row]:
    """Give the input of the first failing prediction again, and say so where the answer differs."""
    from truestep.replay.stages import replay

    failing = [row for row in rows if is_prediction(row.name) and row.verdict in _FAILED]
    if not failing:
        return rows
    if not run.notes and failing[0].step is not None and failing[0].name in run.replayed.outputs:
        again = replay(pipe, recording, steps=(failing[0].step,), only=("prediction",))
        if failing[0].name not in differing(run.replayed.outputs, again.outputs, limits):
            return rows
    return [_unsteady(row) if row in failing else row for row in rows]


_FAILED = (Verdict.DRIFTED, Verdict.INVALID)


def _unsteady(row: Row) -> Row:
    if UNSTEADY in row.note:
        return row
    return row.model_copy(update={"note": "; ".join(p for p in (UNSTEADY, row.note) if p)})


def _with_raised(
    pipe: Pipeline,
    recording: Recording,
    replayed: Replay,
    chosen: tuple[int, ...],
    *,
    in_order: bool,
) -> tuple[Replay, str]:
    """Add the stages raised to a higher precision, where the reference has them.

    A candidate that agrees bit for bit in its own precision is the same, whatever casts are written
    into it: it is not raised.

    Returns:
        The replay, and why it could not be raised, if so.
    """
    from truestep.keys import address
    from truestep.measure.distance import same_bits
    from truestep.replay.kept import Replay
    from truestep.replay.raised import raised_replay
    from truestep.runtime.precision import raised_precision

    recorded = [name for name in recording if key_of(name).precision]
    agrees = all(same_bits(v, recording[k]) for k, v in replayed.outputs.items() if k in recording)
    if not recorded or (agrees and not replayed.failures):
        return replayed, ""
    precision = key_of(recorded[0]).precision
    if raised_precision(pipe.settings.dtype) != precision:
        return replayed, f"{precision} replay of a {pipe.settings.dtype} candidate"
    raised_at = {step for name in recorded if (step := address(name).step) is not None}
    at = tuple(chosen) if in_order else tuple(s for s in chosen if s in raised_at) or chosen
    try:
        more = raised_replay(
            pipe, recording, steps=at, precision=precision, in_order=in_order or None
        )
    except (TypeError, RuntimeError) as error:
        return replayed, f"{precision} replay ({str(error).splitlines()[0]})"
    answered = [name for name in more.outputs if name in recording]
    failed = [text for text in more.failures.values() if text]
    if failed and not answered:
        return replayed, f"{precision} replay (the candidate {failed[0]})"
    # What runs in its own precision alone has constants of it: that is no fault.
    alone = {
        name: text
        for name, text in more.failures.items()
        if text and not replayed.failures.get(str(key_of(name).working))
    }
    unseen = ""
    if alone:
        name, text = next(iter(alone.items()))
        unseen = f"{precision} replay of {address(name).stage} (the candidate {text})"
    failures = {name: text for name, text in more.failures.items() if name not in alone}
    return Replay(
        outputs={**replayed.outputs, **more.outputs},
        failures={**replayed.failures, **failures},
        effects={**replayed.effects, **more.effects},
    ), unseen


def answered_names(
    recording: Mapping[str, torch.Tensor], chosen: tuple[int, ...]
) -> tuple[str, ...]:
    """Names of the recorded tensors that a replay at these steps answers to, in order."""
    from truestep.keys import address
    from truestep.replay.steps import keeps_step

    names = []
    for name in recording:
        place = address(name)
        if place.stage == "prediction" and place.step not in chosen:
            continue
        if place.step is not None and not keeps_step(recording, place.step):
            continue  # only what the next steps need was kept of it
        if name.endswith("step/0000/latent"):  # the initial latent once more
            continue
        names.append(name)
    return tuple(names)
