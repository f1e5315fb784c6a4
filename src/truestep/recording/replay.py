"""Replay in isolation: feed each stage of a pipeline a recording's inputs, and keep its outputs.

Nothing a stage makes is fed to the next one, so rounding is not amplified and a fault shows where
it is made. Guidance and update cost no forward and are replayed at every step; multistep schedulers
are driven through all steps in order on the recorded predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from truestep.errors import TruestepError, UsageError
from truestep.recording.capture import Progress
from truestep.recording.names import STAGES, step_name
from truestep.runtime.guidance import Adaptive
from truestep.runtime.pipeline import (
    Branch,
    Observer,
    Pipeline,
    Schedule,
    Step,
    Text,
    encode,
    predict_branches,
    schedule,
)


@dataclass
class Replay:
    """What the stages of a pipeline gave on recorded inputs.

    Attributes:
        outputs: By the name of the recorded tensor that each answers to.
        failures: What a stage raised instead.
        effects: Where the text's length differs from the recorded one: text name to (prediction
            name, prediction made with the pipeline's own text). Rows of padding cannot be compared
            element by element, but what the model makes of them can.
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    effects: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)

    def attempt(self, name: str, run: Callable[[], object]) -> None:
        """Run a stage; what it raises becomes its failure."""
        try:
            run()
        except TruestepError:  # a setting that cannot be, not a stage that went wrong
            raise
        except Exception as error:  # whatever a candidate's stage raises is that stage's outcome
            text = str(error).strip().splitlines()
            self.failures[name] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]

    def keep(self, name: str, run: Callable[[], torch.Tensor]) -> None:
        """Run a stage and keep a host copy of its output."""

        def kept() -> None:
            self.outputs[name] = run().detach().to("cpu", copy=True)

        self.attempt(name, kept)


class _Keep(Observer):
    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def tensor(self, name: str, value: torch.Tensor) -> None:
        self._outputs[name] = value.detach().to("cpu", copy=True)


def steps_recorded(recording: Mapping[str, torch.Tensor]) -> int:
    """Number of denoise steps in a recording."""
    return sum(1 for name in recording if name.startswith("step/") and name.endswith("/latent"))


def recorded_schedule(recording: Mapping[str, torch.Tensor]) -> Schedule:
    """The schedule that a recording holds."""
    return Schedule(
        recording["schedule/sigmas"],
        recording["schedule/timesteps"],
        recording["schedule/experts"],
    )


def default_steps(recording: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """First, middle and last step, and both sides of an expert switch."""
    total = steps_recorded(recording)
    chosen = {0, total // 2, total - 1}
    experts = recording["schedule/experts"]
    switches = (experts[1:] != experts[:-1]).nonzero().flatten().tolist()
    for switch in switches:
        chosen |= {switch, switch + 1}
    return tuple(sorted(chosen))


def chosen_steps(
    recording: Mapping[str, torch.Tensor], steps: Iterable[int] | None
) -> tuple[int, ...]:
    """Steps to predict at: the given ones, or the default.

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
    progress: Progress | None = None,
    label: str = "replay",
) -> Replay:
    """Run every stage on a recording's inputs.

    Args:
        pipe: The pipeline under test; its settings say what it would generate.
        recording: A full recording of the same case.
        steps: Where predictions are made; default first, middle, last and around expert switches.
        only: Stages to run.
        progress: Told about each forward.
        label: What the progress is called.

    Returns:
        Outputs under the names of the recorded tensors they answer to. A stage that raises is a
        failure of that stage; the others still run.
    """
    result, wanted = Replay(), set(only)
    chosen = chosen_steps(recording, steps)
    recorded = recorded_schedule(recording)
    with torch.no_grad():
        pipe.prepare(pipe)
        keep = _Keep(result.outputs)
        if "text" in wanted:
            result.attempt("text/cond", lambda: encode(pipe, keep))
        if "schedule" in wanted:
            result.attempt("schedule/sigmas", lambda: schedule(pipe, keep))
        if "latent" in wanted:
            result.keep("latent/initial", lambda: pipe.make_latent(pipe))
        experts = result.outputs.get("schedule/experts", recorded.experts)
        if "prediction" in wanted:
            _predictions(pipe, recording, recorded, experts, chosen, result, progress, label)
            _text_effects(
                pipe, recording, recorded_step(pipe, recorded, chosen[0], experts), result
            )
        if "guidance" in wanted:
            _guidance(pipe, recording, recorded, result)
        if "update" in wanted:
            _updates(pipe, recording, recorded, result)
        if "decoding" in wanted and "video/frames" in recording:
            final = recording["latent/final"]
            result.keep("video/frames", lambda: pipe.decode(pipe, final.to(pipe.device)))
    return result


def recorded_step(pipe: Pipeline, recorded: Schedule, index: int, experts: torch.Tensor) -> Step:
    """A recorded step on the pipeline's device, with the pipeline's own choice of expert."""
    expert = int(experts[index]) if index < len(experts) else int(recorded.experts[index])
    return Step(
        index=index,
        timestep=recorded.timesteps[index].to(pipe.device),
        sigma=float(recorded.sigmas[index]),
        expert=expert,
    )


def _predictions(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    recorded: Schedule,
    experts: torch.Tensor,
    chosen: tuple[int, ...],
    result: Replay,
    progress: Progress | None,
    label: str,
) -> None:
    for done, index in enumerate(chosen):
        step = recorded_step(pipe, recorded, index, experts)
        latent = recording[step_name(index, "latent")].to(pipe.device)
        branches: tuple[Branch, ...] = ("cond", "uncond") if pipe.settings.guided else ("cond",)
        texts = {
            branch: recording[f"text/{branch}"].to(pipe.device)
            for branch in branches
            if f"text/{branch}" in recording
        }
        together = pipe.settings.cfg != "sequential" and len(texts) == 2

        def both(
            step: Step = step,
            latent: torch.Tensor = latent,
            texts: dict[Branch, torch.Tensor] = texts,
        ) -> None:
            text = Text(texts["cond"].clone(), texts["uncond"].clone())
            made = predict_branches(pipe, latent.clone(), step, text)
            for branch, prediction in zip(("cond", "uncond"), made, strict=True):
                if prediction is not None:
                    name = step_name(step.index, branch)
                    result.outputs[name] = prediction.detach().to("cpu", copy=True)

        if together:
            result.attempt(step_name(index, "cond"), both)
        for branch, embeddings in () if together else texts.items():
            result.keep(
                step_name(index, branch),
                lambda s=step, e=embeddings, b=branch, z=latent: pipe.predict(  # type: ignore[misc]
                    pipe, z.clone(), s, e.clone(), b
                ),
            )
        if progress:
            progress(label, done + 1, len(chosen))


def _text_effects(
    pipe: Pipeline, recording: Mapping[str, torch.Tensor], step: Step, result: Replay
) -> None:
    """Predict with the pipeline's own text where its length is not the recorded one."""
    branches: tuple[Branch, ...] = ("cond", "uncond")
    for branch in branches:
        name = f"text/{branch}"
        own, recorded = result.outputs.get(name), recording.get(name)
        if own is None or recorded is None or own.shape == recorded.shape:
            continue
        if own.ndim != 3 or own.shape[::2] != recorded.shape[::2]:
            continue

        def predict(name: str = name, text: torch.Tensor = own, branch: Branch = branch) -> None:
            latent = recording[step_name(step.index, "latent")].to(pipe.device, copy=True)
            made = pipe.predict(pipe, latent, step, text.to(pipe.device), branch)
            result.effects[name] = (step_name(step.index, branch), made.detach().to("cpu"))

        result.attempt(name, predict)


def _guidance(
    pipe: Pipeline, recording: Mapping[str, torch.Tensor], recorded: Schedule, result: Replay
) -> None:
    """Combine the recorded branches at every step; unguided, the prediction passes through."""
    adaptive = Adaptive(pipe.settings, len(recorded.timesteps))
    for index in range(len(recorded.timesteps)):
        step = recorded_step(pipe, recorded, index, recorded.experts)
        cond = recording[step_name(index, "cond")].to(pipe.device)
        uncond = recording.get(step_name(index, "uncond"))

        def combined(
            step: Step = step, cond: torch.Tensor = cond, uncond: torch.Tensor | None = uncond
        ) -> torch.Tensor:
            if not pipe.settings.guided:
                return cond
            if adaptive.skips(step.index, step.expert):
                stand_in = adaptive.stand_in(cond.clone(), scale=pipe.output_scale(step))
                return pipe.combine(pipe, step, cond.clone(), stand_in)
            if uncond is None:
                return cond
            other = uncond.to(pipe.device, copy=True)
            adaptive.saw(cond, other, step.expert, scale=pipe.output_scale(step))
            return pipe.combine(pipe, step, cond.clone(), other)

        result.keep(step_name(index, "guided"), combined)


def _updates(
    pipe: Pipeline, recording: Mapping[str, torch.Tensor], recorded: Schedule, result: Replay
) -> None:
    """Drive a freshly reset scheduler through all steps on recorded latents and predictions."""
    total = len(recorded.timesteps)

    def reset() -> None:
        own_steps, pipe.settings.steps = pipe.settings.steps, total
        try:
            pipe.make_schedule(pipe)
        finally:
            pipe.settings.steps = own_steps
        for name, value in (("sigmas", recorded.sigmas), ("timesteps", recorded.timesteps)):
            own = getattr(pipe.scheduler, name, None)
            if isinstance(own, torch.Tensor) and own.shape == value.shape:
                setattr(pipe.scheduler, name, value.to(own.device, copy=True))

    result.attempt("schedule/sigmas", reset)
    for index in range(total):
        step = recorded_step(pipe, recorded, index, recorded.experts)
        name = step_name(index + 1, "latent") if index + 1 < total else "latent/final"
        guided = recording[step_name(index, "guided")].to(pipe.device, copy=True)
        latent = recording[step_name(index, "latent")].to(pipe.device, copy=True)
        result.keep(
            name,
            lambda s=step, g=guided, z=latent: pipe.update(pipe, s, g, z),  # type: ignore[misc]
        )
