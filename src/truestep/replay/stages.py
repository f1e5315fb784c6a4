"""Replay in isolation: feed each stage of a pipeline a recording's inputs, and keep its outputs.

Nothing a stage makes is fed to the next one, so rounding is not amplified and a fault shows where
it is made. Guidance and update cost no forward and are replayed at every step; multistep schedulers
are driven through all steps in order on the recorded predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch

from truestep.errors import FileFormatError, UsageError
from truestep.joint import AUDIO, Value, each, gather
from truestep.keys import STAGES, step_name
from truestep.replay.kept import Kept, Replay, unchanged_by
from truestep.runtime.guidance import Adaptive
from truestep.runtime.pipeline import (
    Branch,
    Pipeline,
    Schedule,
    Step,
    Texts,
    connect,
    encode,
    forget,
    guide,
    schedule,
    show,
    show_decoded,
    text_branch,
    text_branches,
)

_SCHEDULE = ("schedule/sigmas", "schedule/timesteps", "schedule/experts")


def steps_recorded(recording: Mapping[str, torch.Tensor]) -> int:
    """Number of denoise steps in a recording."""
    return sum(1 for name in recording if name.startswith("step/") and name.endswith("/latent"))


def given(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    name: str,
    *,
    like: Value | None = None,
) -> Value:
    """A recorded value as a stage's input: a copy on the pipeline's device.

    Args:
        like: A value of the same shape whose order in memory the copy is given: tokens that are a
            view of frames may take another kernel than the same tokens in a row.
    """
    value = each(lambda tensor: tensor.to(pipe.device, copy=True), gather(recording, name))
    return value if like is None else _in_order_of(value, like)


def _in_order_of(value: Value, like: Value) -> Value:
    if isinstance(value, tuple) is not isinstance(like, tuple):
        return value

    def ordered(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if tensor.shape != own.shape:
            return tensor
        return torch.empty_like(own, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    return each(ordered, value, like)


def recorded_schedule(recording: Mapping[str, torch.Tensor]) -> Schedule:
    """The schedule that a recording holds."""
    return Schedule(*(recording[name] for name in _SCHEDULE))


def require_run(recording: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Refuse a recording that lacks what every run has, before anything is loaded or run.

    Raises:
        FileFormatError: The schedule, a latent, what a scheduler was given or the end is missing,
            or the schedule's parts are of other lengths than the steps that are there.
    """
    total = steps_recorded(recording)
    names = ["text/cond", "latent/initial", "latent/final", *_SCHEDULE]
    names += [step_name(step, what) for step in range(total) for what in ("latent", "guided")]
    lacks = [name for name in names if name not in recording]
    hint = "truestep record CASE --update  # records it again"
    if lacks or not total:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise FileFormatError(
            "the reference is not a whole run: it cannot be replayed",
            where=where,
            measured=f"it lacks {', '.join(lacks[:3])}{more}" if lacks else "it has no steps",
            hint=hint,
        )
    shapes = {name: tuple(recording[name].shape) for name in _SCHEDULE}
    fits = all(len(shape) == 1 and shape[0] >= total for shape in shapes.values())
    if not fits or len(recording[_SCHEDULE[1]]) != total:
        raise FileFormatError(
            "the reference's schedule is not that of its steps",
            where=where,
            measured=f"{total} steps; " + ", ".join(f"{n} {list(s)}" for n, s in shapes.items()),
            hint=hint,
        )


def floor_steps(recording: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """First, middle and last step: where benign runs predict."""
    total = steps_recorded(recording)
    return tuple(sorted({0, total // 2, total - 1}))


def default_steps(recording: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """First and last step of every expert, and three in a row: halfway, or beside a switch.

    What a model keeps from one step to the next acts only where a step follows its neighbour; of
    three in a row a cache that answers every other step answers one, whichever it begins with.
    """
    experts = recording["schedule/experts"].tolist()[: steps_recorded(recording)]
    switches = [step for step in range(1, len(experts)) if experts[step] != experts[step - 1]]
    ends = [0, *switches, len(experts)]
    chosen: set[int] = set()
    for begin, end in pairwise(ends):
        beside = begin if begin else end - 3
        row = (begin + end) // 2 - 1 if len(ends) == 2 else beside
        inside = (step for step in range(row, row + 3) if begin <= step < end)
        chosen |= {begin, end - 1, *inside}
    return tuple(sorted(chosen))


def chosen_steps(
    recording: Mapping[str, torch.Tensor], steps: Iterable[int] | None
) -> tuple[int, ...]:
    """Steps to predict at: the given ones, or `default_steps`.

    Raises:
        UsageError: A step is out of range.
    """
    if steps is None:
        return default_steps(recording)
    total = steps_recorded(recording)
    chosen = tuple(sorted(set(steps)))
    bad = [step for step in chosen if not 0 <= step < total]
    if bad or not chosen:
        raise UsageError(
            f"no step {bad[0]} in the reference" if bad else "no steps were chosen",
            measured=f"its steps are 0 to {total - 1}",
        )
    return chosen


def replay(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    *,
    steps: Iterable[int] | None = None,
    only: Iterable[str] = STAGES,
    thinned: bool = False,
    again: bool = False,
    in_order: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Run every stage on a recording's inputs.

    Args:
        pipe: The pipeline under test; its settings say what it would generate.
        recording: A full recording of the same case.
        steps: Where predictions are made; default `default_steps`.
        only: Stages to run.
        thinned: Keep guidance and update at `steps` only, not at every step.
        again: Also encode the texts, and predict one or two steps of each expert, a second time.
        in_order: Predict at every step up to the last of `steps`, as a model that keeps state needs
            it; None is where it says so (`keeps_state`).
        progress: Told (done, total) after the predictions of each step.

    Returns:
        Outputs under the names of the recorded tensors they answer to. A stage that raises is a
        failure of that stage; the others still run.
    """
    _check_parts(pipe, recording)
    result, wanted = Replay(), set(only)
    chosen = chosen_steps(recording, steps)
    kept = set(chosen) if thinned else None
    recorded = recorded_schedule(recording)
    with torch.no_grad():
        pipe.prepare(pipe)
        forget(pipe)
        keep = Kept(result.outputs)
        alone = pipe if pipe.connect is None else replace(pipe, connect=None)
        if "text" in wanted:
            result.attempt("text/cond", lambda: encode(alone, keep))
        if "connector" in wanted and pipe.connect is not None:
            texts = recorded_texts(pipe, recording, "text")
            result.attempt("connector/cond", lambda: connect(pipe, texts, keep))
        if "schedule" in wanted:
            result.attempt("schedule/sigmas", lambda: schedule(pipe, keep))
        own: list[Value] = []
        if "latent" in wanted:

            def initial() -> Value:
                own.append(pipe.make_latent(pipe))
                return own[0]

            result.keep("latent/initial", initial)
        like = own[0] if own and "latent/initial" not in result.failures else None
        experts = result.outputs.get("schedule/experts", recorded.experts)
        source = _Inputs(recording, recorded, experts, like)
        if "prediction" in wanted:
            predict_at = predict_steps(pipe, chosen, in_order=in_order)
            _predictions(pipe, source, predict_at, result.outputs, result, progress)
            _text_effects(pipe, source, chosen[0], result)
            if again:
                forget(pipe)
                repeated = _repeated(source, predict_at, in_order=predict_at != chosen)
                _predictions(pipe, source, repeated, result.again, result, first_pass=True)
        if again and "text" in wanted:
            result.attempt("text/cond", lambda: encode(alone, Kept(result.again)))
        if "guidance" in wanted:
            _guidance(pipe, source, result, kept)
        if "update" in wanted:
            _updates(pipe, source, result, kept)
        if "decoding" in wanted and "video/frames" in recording:
            final = given(pipe, recording, "latent/final")
            result.attempt("video/frames", lambda: show_decoded(keep, pipe.decode(pipe, final)))
    return result


def _check_parts(pipe: Pipeline, recording: Mapping[str, torch.Tensor]) -> None:
    """Refuse to replay a recording of video alone on an audio-video model, and the reverse.

    Raises:
        FileFormatError: The recording has parts that the model has not, or lacks some.
    """
    has = AUDIO + "latent/initial" in recording
    if has != pipe.audio_video:
        lacks = "has no audio parts" if pipe.audio_video else "has audio parts"
        makes = "video and sound" if pipe.audio_video else "video alone"
        raise FileFormatError(
            f"the reference {lacks}, and the model makes {makes}",
            measured=f"{AUDIO}latent/initial is {'there' if has else 'missing'}",
            hint="truestep record CASE --update",
        )


def recorded_texts(pipe: Pipeline, recording: Mapping[str, torch.Tensor], stage: str) -> Texts:
    """What a recording holds of the texts that the pipeline needs, after `text` or `connector`."""
    return {
        branch: given(pipe, recording, f"{stage}/{branch}")
        for branch in text_branches(pipe)
        if f"{stage}/{branch}" in recording
    }


def recorded_step(pipe: Pipeline, recorded: Schedule, index: int, experts: torch.Tensor) -> Step:
    """A recorded step on the pipeline's device, with the pipeline's own choice of expert."""
    expert = int(experts[index]) if index < len(experts) else int(recorded.experts[index])
    return Step(
        index=index,
        timestep=recorded.timesteps[index].to(pipe.device),
        sigma=float(recorded.sigmas[index]),
        expert=expert,
    )


@dataclass(frozen=True)
class _Inputs:
    """What predictions are made from: the recording, its schedule, the expert of each step, and a
    latent whose order in memory the recorded ones are given."""

    recording: Mapping[str, torch.Tensor]
    schedule: Schedule
    experts: torch.Tensor
    like: Value | None


def keeps_state(pipe: Pipeline) -> bool:
    """Whether a transformer says that it keeps something from step to step (diffusers' caches)."""
    return any(bool(getattr(pipe.expert(number), "is_cache_enabled", False)) for number in (1, 2))


def predict_steps(
    pipe: Pipeline, chosen: Sequence[int], *, in_order: bool | None = None
) -> tuple[int, ...]:
    """Steps at which a pipeline predicts, where it is to be judged at the chosen ones.

    What keeps state is wrong at a step whose predecessors it did not see.
    """
    follows = keeps_state(pipe) if in_order is None else in_order
    return tuple(range(max(chosen) + 1)) if follows else tuple(chosen)


def _repeated(source: _Inputs, steps: Sequence[int], *, in_order: bool) -> tuple[int, ...]:
    """Steps of each expert to predict once more, after all others.

    The last two that followed their neighbours, backwards: what was kept from a neighbour shows,
    since now they follow another step. The first of its expert where there is none, or where steps
    only count in order.
    """
    expert = {step: int(source.experts[step]) for step in steps if step < len(source.experts)}
    repeated: list[int] = []
    for number in dict.fromkeys(expert.values()):
        own = [step for step in steps if expert.get(step) == number]
        followed = [step for step in own[:-1] if step - 1 in own]
        repeated += own[:1] if in_order or not followed else followed[:-3:-1]
    return tuple(repeated)


def _predictions(
    pipe: Pipeline,
    source: _Inputs,
    steps: Sequence[int],
    outputs: dict[str, torch.Tensor],
    result: Replay,
    progress: Callable[[int, int], None] | None = None,
    *,
    first_pass: bool = False,
) -> None:
    """Predict at steps, in order, into `outputs`; failures are the result's.

    `first_pass` leaves the other passes out, where each is a forward of its own.
    """
    recording, like = source.recording, source.like
    stage = "text" if pipe.connect is None else "connector"
    runnable = [
        branch for branch in pipe.passes(pipe) if f"{stage}/{text_branch(branch)}" in recording
    ]
    if first_pass and not _together(pipe):
        runnable = runnable[:1]

    def together(step: Step, held: dict[str, Value]) -> None:
        latent = given(pipe, recording, step_name(step.index, "latent"), like=like)
        texts = recorded_texts(pipe, recording, stage)
        with unchanged_by(latent, *texts.values()):
            made = pipe.predict_passes(pipe, latent, step, texts, runnable)
        held.update({step_name(step.index, branch): value for branch, value in made.items()})

    def alone(step: Step, branch: Branch, held: dict[str, Value]) -> None:
        latent = given(pipe, recording, step_name(step.index, "latent"), like=like)
        text = given(pipe, recording, f"{stage}/{text_branch(branch)}")
        with unchanged_by(latent, text):
            held[step_name(step.index, branch)] = pipe.predict(pipe, latent, step, text, branch)

    for done, index in enumerate(steps):
        step = recorded_step(pipe, source.schedule, index, source.experts)
        held: dict[str, Value] = {}
        if pipe.skips(pipe, index) and index:
            pass
        elif _together(pipe) and len(runnable) > 1:
            result.attempt(step_name(index, "cond"), partial(together, step, held))
        else:
            for branch in runnable:
                result.attempt(step_name(index, branch), partial(alone, step, branch, held))
        for name, made in held.items():  # after all passes: one may write over another's answer
            result.attempt(name, partial(show, Kept(outputs), name, made))
        if progress:
            progress(done + 1, len(steps))


def _together(pipe: Pipeline) -> bool:
    """Whether the passes of a step are run by a plan, and not one after the other.

    Those of an audio-video model always are: the plan says what text each is given.
    """
    return pipe.audio_video or pipe.settings.cfg != "sequential"


def _text_effects(pipe: Pipeline, source: _Inputs, index: int, result: Replay) -> None:
    """Predict with the pipeline's own text where its length is not the recorded one."""
    recording = source.recording
    step = recorded_step(pipe, source.schedule, index, source.experts)
    branches: tuple[Branch, ...] = ("cond", "uncond")
    for branch in branches:
        name = f"text/{branch}"
        own, recorded = result.outputs.get(name), recording.get(name)
        if own is None or recorded is None or own.shape == recorded.shape:
            continue
        if pipe.connect is not None or own.ndim != 3 or own.shape[::2] != recorded.shape[::2]:
            continue

        def predict(name: str = name, text: torch.Tensor = own, branch: Branch = branch) -> None:
            latent = recording[step_name(step.index, "latent")].to(pipe.device, copy=True)
            made = pipe.predict(pipe, latent, step, text.to(pipe.device), branch)
            result.effects[name] = (step_name(step.index, branch), made.detach().to("cpu"))

        result.attempt(name, predict)


def _guidance(
    pipe: Pipeline, source: _Inputs, result: Replay, kept: Collection[int] | None
) -> None:
    """Combine the recorded branches at every step; unguided, the prediction passes through."""
    recording, recorded, like = source.recording, source.schedule, source.like
    adaptive = Adaptive(pipe.settings, len(recorded.timesteps))
    passes = pipe.passes(pipe)
    for index in range(len(recorded.timesteps)):
        step = recorded_step(pipe, recorded, index, recorded.experts)
        skipped = adaptive.skips(step.index, step.expert)
        wanted = passes[:1] if skipped else passes

        def combined(
            step: Step = step, wanted: Sequence[Branch] = wanted, skipped: bool = skipped
        ) -> Value:
            if step.index and pipe.skips(pipe, step.index):
                return given(pipe, recording, step_name(step.index - 1, "guided"), like=like)
            made = {
                branch: given(pipe, recording, step_name(step.index, branch), like=like)
                for branch in wanted
                if step_name(step.index, branch) in recording
            }
            return guide(pipe, step, made, adaptive, skipped=skipped)

        if kept is None or index in kept or adaptive.on:
            result.keep(step_name(index, "guided"), combined, kept=kept is None or index in kept)


def _updates(pipe: Pipeline, source: _Inputs, result: Replay, kept: Collection[int] | None) -> None:
    """Drive a freshly reset scheduler through all steps on recorded latents and predictions."""
    recording, recorded, like = source.recording, source.schedule, source.like
    total = len(recorded.timesteps)

    def reset() -> None:
        own_steps, pipe.settings.steps = pipe.settings.steps, total
        try:
            pipe.make_schedule(pipe)
        finally:
            pipe.settings.steps = own_steps
        for name, value in (("sigmas", recorded.sigmas), ("timesteps", recorded.timesteps)):
            own = getattr(pipe.scheduler, name, None)
            if isinstance(own, torch.Tensor):
                setattr(pipe.scheduler, name, value.to(own.device, copy=True))

    result.attempt("schedule/sigmas", reset)
    for index in range(total):
        step = recorded_step(pipe, recorded, index, recorded.experts)
        name = step_name(index + 1, "latent") if index + 1 < total else "latent/final"
        guided = given(pipe, recording, step_name(index, "guided"), like=like)
        latent = given(pipe, recording, step_name(index, "latent"), like=like)
        result.keep(
            name,
            lambda s=step, g=guided, z=latent: pipe.update(pipe, s, g, z),  # type: ignore[misc]
            kept=kept is None or index in kept,
        )
