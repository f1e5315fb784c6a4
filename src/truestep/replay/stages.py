"""Replay in isolation: feed each stage of a pipeline a recording's inputs, and keep its outputs.

Nothing a stage makes is fed to the next one, so rounding is not amplified and a fault shows where
it is made. Guidance and update cost no forward and are replayed at every step; multistep schedulers
are driven through all steps in order on the recorded predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from truestep.errors import FileFormatError
from truestep.joint import AUDIO, Value, each
from truestep.keys import STAGES, step_name
from truestep.replay.kept import Kept, Replay, unchanged_by
from truestep.replay.steps import (
    chosen_steps,
    given,
    keeps_step,
    kept_steps,
    left_out,
    recorded_schedule,
    stored_name,
)
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
    kept = set(chosen) if thinned else kept_steps(recording)
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
    recording = source.recording
    stage = "text" if pipe.connect is None else "connector"
    runnable = [
        branch for branch in pipe.passes(pipe) if f"{stage}/{text_branch(branch)}" in recording
    ]
    if first_pass and not _together(pipe):
        runnable = runnable[:1]

    latents = _Latents(pipe, source, Adaptive(pipe.settings, len(source.schedule.timesteps)))
    latents.begin(steps)

    def together(step: Step, held: dict[str, Value]) -> None:
        latent = latents.at(step.index)
        texts = recorded_texts(pipe, recording, stage)
        with unchanged_by(latent, *texts.values()):
            made = pipe.predict_passes(pipe, latent, step, texts, runnable)
        held.update({step_name(step.index, branch): value for branch, value in made.items()})

    def alone(step: Step, branch: Branch, held: dict[str, Value]) -> None:
        latent = latents.at(step.index)
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
        for name, value in held.items():  # after all passes: one may write over another's answer
            result.attempt(name, partial(show, Kept(outputs), name, value))
        made = {
            branch: held[name] for branch in runnable if (name := step_name(index, branch)) in held
        }
        result.attempt(step_name(index, "guided"), partial(latents.go_on, step, made))
        if progress:
            progress(done + 1, len(steps))


@dataclass
class _Latents:
    """Latents that predictions are made from: the recorded ones. Between the steps that a thinned
    recording keeps, for a model that must see them all, what a free run makes of the last of them.

    Attributes:
        free: Whether there are such steps.
        guided, latent: The last guided prediction, and the latent after it.
    """

    pipe: Pipeline
    source: _Inputs
    adaptive: Adaptive
    free: bool = False
    guided: Value = None
    latent: Value = None

    def begin(self, steps: Iterable[int]) -> None:
        """Before some steps are predicted, in order."""
        recording = self.source.recording
        names = (stored_name(recording, step_name(step, "latent")) for step in steps)
        self.free = any(name not in recording for name in names)
        if self.free:
            _reset(self.pipe, self.source.schedule)

    def at(self, index: int) -> Value:
        """What a step is given: a copy."""
        name = step_name(index, "latent")
        if stored_name(self.source.recording, name) in self.source.recording:
            return given(self.pipe, self.source.recording, name, like=self.source.like)
        return each(torch.clone, self.latent)

    def go_on(self, step: Step, made: Mapping[Branch, Value]) -> None:
        """After the predictions of a step."""
        recording, name = self.source.recording, step_name(step.index, "guided")
        if not self.free:
            return
        if name in recording:
            self.guided = given(self.pipe, recording, name, like=self.source.like)
        elif "cond" in made:
            skipped = self.adaptive.skips(step.index, step.expert)
            self.guided = guide(self.pipe, step, made, self.adaptive, skipped=skipped)
        self.latent = self.pipe.update(self.pipe, step, self.guided, self.at(step.index))


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
            latent = given(pipe, recording, step_name(step.index, "latent"))
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
                before = step_name(step.index - 1, "guided")
                if before not in recording:
                    what = f"what step {step.index} skips was left out of this recording"
                    left_out(what, recording, keep=step.index - 1)
                return given(pipe, recording, before, like=like)
            made = {
                branch: given(pipe, recording, step_name(step.index, branch), like=like)
                for branch in wanted
                if step_name(step.index, branch) in recording
            }
            return guide(pipe, step, made, adaptive, skipped=skipped)

        if kept is None or index in kept or (adaptive.on and keeps_step(recording, index)):
            result.keep(step_name(index, "guided"), combined, kept=kept is None or index in kept)


def _updates(pipe: Pipeline, source: _Inputs, result: Replay, kept: Collection[int] | None) -> None:
    """Drive a freshly reset scheduler through all steps on recorded latents and predictions.

    Of a thinned recording, through the steps that it keeps; those before one of them are there as
    far back as its scheduler needs them.
    """
    recording, recorded, like = source.recording, source.schedule, source.like
    total = len(recorded.timesteps)

    result.attempt("schedule/sigmas", lambda: _reset(pipe, recorded))
    for index in range(total):
        step = recorded_step(pipe, recorded, index, recorded.experts)
        name = step_name(index + 1, "latent") if index + 1 < total else "latent/final"
        if (
            step_name(index, "guided") in recording
        ):  # else a scheduler that counts is given the last
            guided = given(pipe, recording, step_name(index, "guided"), like=like)
            latent = given(pipe, recording, step_name(index, "latent"), like=like)
        result.keep(
            name,
            lambda s=step, g=guided, z=latent: pipe.update(pipe, s, g, z),  # type: ignore[misc]
            kept=kept is None or index in kept,
        )


def _reset(pipe: Pipeline, recorded: Schedule) -> None:
    """Begin a scheduler's run on the recorded schedule."""
    own_steps, pipe.settings.steps = pipe.settings.steps, len(recorded.timesteps)
    try:
        pipe.make_schedule(pipe)
    finally:
        pipe.settings.steps = own_steps
    for name, value in (("sigmas", recorded.sigmas), ("timesteps", recorded.timesteps)):
        own = getattr(pipe.scheduler, name, None)
        if isinstance(own, torch.Tensor):
            setattr(pipe.scheduler, name, value.to(own.device, copy=True))
